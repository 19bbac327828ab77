"""Bad inputs: the base model."""

import json

import torch
from safetensors.torch import save_file

from tests.bad_inputs.place import Bad, Place

UNET = "base/unet/diffusion_pytorch_model.safetensors"
VAE = "base/vae/diffusion_pytorch_model.safetensors"
TEXT = "base/text_encoder/model.safetensors"
TEXT_2 = "base/text_encoder_2/model.safetensors"


def poison(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    next(iter(tensors.values())).view(-1)[0] = float("nan")
    return tensors


def cold(place: Place) -> Place:
    """An empty cache, so that everything is encoded."""
    place.set("cache.path", "cold")
    return place


def pickled(place: Place, name: str) -> None:
    place.remove(name)
    torch.save({"a": torch.zeros(2)}, place / name)


def only_pickle(place: Place) -> None:
    place.remove(UNET)
    torch.save({"a": torch.zeros(2)}, place / "base/unet/diffusion_pytorch_model.bin")


def checkpoint_file(place: Place) -> None:
    torch.save({"state_dict": {"a": torch.zeros(2)}}, place / "model.ckpt")
    place.set("model.path", "model.ckpt")


def without_scipy(place: Place) -> None:
    """A base whose own sampler diffusers makes by way of a package that is not there."""
    place.edit("base/scheduler/scheduler_config.json", _class_name="LMSDiscreteScheduler")
    index = json.loads((place / "base/model_index.json").read_text())
    place.edit("base/model_index.json", **index | {"scheduler": ["diffusers", "LMSDiscreteScheduler"]})
    place.patch.setattr("sdxl_trainer.sampling.samplers.find_spec", lambda package: None)


def not_all(place: Place) -> None:
    """One safetensors file that is no SDXL."""
    save_file({"head.weight": torch.zeros(2)}, place / "part.safetensors")
    place.set("model.path", "part.safetensors")


def fewer(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if "conv_out" not in name}


def wider(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.repeat_interleave(2, 0) if "conv_in" in name else tensor for name, tensor in tensors.items()}


def narrower_text(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor[:-1].clone() if "token_embedding" in name else tensor for name, tensor in tensors.items()}


def stable_diffusion_1(place: Place) -> None:
    for part in ("text_encoder_2", "tokenizer_2"):
        place.remove(f"base/{part}")
    place.edit("base/model_index.json", _class_name="StableDiffusionPipeline", text_encoder_2=None, tokenizer_2=None)


def refiner(place: Place) -> None:
    for part in ("text_encoder", "tokenizer"):
        place.remove(f"base/{part}")
    place.edit("base/model_index.json", _class_name="StableDiffusionXLImg2ImgPipeline", text_encoder=[None, None])


def override(place: Place, **config: object) -> None:
    """A VAE override that is not what it should be."""
    (place / "other").mkdir()
    place.put("other/config.json", json.dumps(config))
    place.put("other/diffusion_pytorch_model.safetensors", (place / VAE).read_bytes())
    place.set("model.vae", "other")


def adapter_file(place: Place, name: str) -> None:
    place.put(name, "")
    save_file({"lora_unet_mid_block.lora_down.weight": torch.zeros(4, 8)}, place / name)


HEADER_LONGER = b"\xff\xff\0\0\0\0\0\0{}"
ROWS = [
    Bad(
        "no model folder",
        "'no/such/dir/model' does not exist",
        "existing folder",
        "model.path",
        options={"model.path": "no/such/dir/model"},
    ),
    Bad(
        "hub model not reachable",
        "nobody/nothing-there.*cannot be fetched|neither a local",
        "network",
        "model.path",
        options={"model.path": "nobody/nothing-there"},
    ),
    Bad(
        "no model_index.json",
        r"no model_index.json",
        "save_pretrained",
        "base",
        make=lambda p: p.remove("base/model_index.json"),
    ),
    Bad(
        "empty model folder",
        "found: nothing",
        "save_pretrained",
        make=lambda p: ((p / "empty").mkdir(), p.set("model.path", "empty")),
    ),
    Bad(
        "an adapter as the base",
        "holds no UNet",
        "as adapter.start",
        "sks.safetensors",
        make=lambda p: adapter_file(p, "sks.safetensors"),
        options={"model.path": "sks.safetensors"},
    ),
    Bad(
        "a run's adapter as the base",
        "no model_index.json",
        "as adapter.start",
        "other",
        make=lambda p: adapter_file(p, "other/pytorch_lora_weights.safetensors"),
        options={"model.path": "other"},
    ),
    Bad(
        "a folder without a VAE as the VAE",
        "there is no VAE in 'other'",
        "remove model.vae",
        "model.vae",
        make=lambda p: (p / "other").mkdir(),
        options={"model.vae": "other"},
    ),
    Bad("part missing", "no 'text_encoder_2'", "complete SDXL", make=lambda p: p.remove("base/text_encoder_2")),
    Bad(
        "config of a part missing",
        "'unet' has no config.json",
        "copy",
        make=lambda p: p.remove("base/unet/config.json"),
    ),
    *(
        Bad(
            f"{name} = {size}",
            f"{name} = .* is not that of a text encoder",
            "download",
            "text_encoder_2/config.json",
            make=lambda p, name=name, size=size: p.edit("base/text_encoder_2/config.json", **{name: size}),
        )
        for name, size in {"num_hidden_layers": {"a": {}}, "hidden_size": 10**9}.items()
    ),
    Bad("weights missing", "'unet' has no .safetensors weights", "copy", make=lambda p: p.remove(UNET)),
    Bad(
        "tokenizer without vocabulary",
        "tokenizer",
        "copy",
        make=lambda p: [
            cold(p),
            *(p.remove(f"base/tokenizer/{n}") for n in ("vocab.json", "merges.txt", "tokenizer.json")),
        ],
    ),
    Bad("only a pickle", "only the pickle diffusion_pytorch_model.bin", "convert", make=only_pickle),
    Bad("pickle called .safetensors", "pickle", "convert|safetensors", UNET, make=lambda p: pickled(p, UNET)),
    Bad("a .ckpt file", "a pickle can run code", "convert", "model.ckpt", make=checkpoint_file),
    Bad("one file that is no SDXL", "holds no UNet", "full SDXL checkpoint", make=not_all),
    Bad("UNet cut short", "cut short", "copy", UNET, make=lambda p: p.cut(UNET)),
    Bad("UNet of zero bytes", "cut short|empty", "copy", UNET, make=lambda p: p.put(UNET, b"")),
    Bad("VAE cut short", "cut short", "copy", VAE, make=lambda p: p.cut(VAE, 0.99)),
    Bad("text encoder cut short", "cut short", "copy", TEXT, make=lambda p: p.cut(TEXT)),
    Bad("header longer than the file", "cut short|damaged", "copy", UNET, make=lambda p: p.put(UNET, HEADER_LONGER)),
    Bad(
        "shard of an index missing",
        "are missing: gone.safetensors",
        "copy",
        ".index.json",
        make=lambda p: p.put(f"{UNET}.index.json", json.dumps({"weight_map": {"conv_in.weight": "gone.safetensors"}})),
    ),
    Bad(
        "NaN in the UNet",
        "not finite.*conv_in|not finite",
        "copy|undamaged",
        "unet",
        make=lambda p: (p.weights(UNET, poison), p.set("output_dir", "new")),
    ),
    Bad(
        "NaN in the VAE",
        "not finite",
        "copy|undamaged",
        "vae",
        make=lambda p: (p.weights(VAE, poison), p.set("output_dir", "new")),
    ),
    Bad(
        "NaN in text encoder 1",
        "not finite",
        "copy|undamaged",
        "text_encoder",
        make=lambda p: (p.weights(TEXT, poison), p.set("output_dir", "new")),
    ),
    Bad(
        "NaN in text encoder 2",
        "not finite",
        "copy|undamaged",
        "text_encoder_2",
        make=lambda p: (p.weights(TEXT_2, poison), p.set("output_dir", "new")),
    ),
    Bad(
        "UNet lacks tensors",
        "conv_out",
        "copy|complete",
        "unet",
        make=lambda p: (p.weights(UNET, fewer), p.set("output_dir", "new")),
    ),
    Bad(
        "UNet of other shapes",
        "shape",
        "config",
        "unet",
        make=lambda p: (p.weights(UNET, wider), p.set("output_dir", "new")),
    ),
    Bad(
        "VAE lacks tensors",
        "conv_out",
        "copy|complete",
        "vae",
        make=lambda p: (p.weights(VAE, fewer), p.set("output_dir", "new")),
    ),
    Bad(
        "VAE of other shapes",
        "shape",
        "config",
        "vae",
        make=lambda p: (p.weights(VAE, wider), p.set("output_dir", "new")),
    ),
    Bad(
        "text encoder of other shapes",
        "shape",
        "config",
        "text_encoder",
        make=lambda p: (p.weights(TEXT, narrower_text), p.set("output_dir", "new")),
    ),
    Bad(
        "text encoder lacks tensors",
        "token_embedding",
        "copy|complete",
        "text_encoder",
        make=lambda p: p.weights(TEXT, lambda t: {n: v for n, v in t.items() if "token_embedding" not in n}),
        options={"output_dir": "new"},
    ),
    Bad(
        "config is no JSON",
        "not valid JSON",
        "copy",
        "base/unet/config.json",
        make=lambda p: p.put("base/unet/config.json", "{"),
    ),
    Bad(
        "text encoder's config is no JSON",
        "not valid JSON",
        "copy",
        "base/text_encoder/config.json",
        make=lambda p: p.put("base/text_encoder/config.json", "{"),
    ),
    Bad(
        "model_index is a list", "JSON", "copy", "model_index.json", make=lambda p: p.put("base/model_index.json", "[]")
    ),
    Bad(
        "config of unknown blocks",
        "unet",
        "copy|config",
        "unet",
        make=lambda p: (p.edit("base/unet/config.json", down_block_types=["Nonsense"] * 3), p.set("output_dir", "new")),
    ),
    Bad("Stable Diffusion 1.5", "StableDiffusionPipeline", "SDXL", make=stable_diffusion_1),
    Bad("SDXL refiner with the base's UNet", "not that of SDXL's refiner", "base", "unet", make=refiner),
    Bad(
        "UNet of SD 1.5",
        "not that of SDXL",
        "SDXL base",
        "unet",
        make=lambda p: p.edit("base/unet/config.json", addition_embed_type=None),
    ),
    Bad(
        "UNet of the refiner",
        "takes text of width 40, and is given 64",
        "SDXL base",
        "unet",
        make=lambda p: p.edit(
            "base/unet/config.json", cross_attention_dim=40, projection_class_embeddings_input_dim=120
        ),
    ),
    Bad(
        "UNet of 9 channels that is none",
        "is not trained here|conv_in|channels",
        "SDXL base|copy",
        "unet",
        make=lambda p: p.edit("base/unet/config.json", in_channels=9),
    ),
    Bad(
        "check of a mask that no base here takes",
        r"\[inpainting\] has no effect",
        "9 channels",
        "inpainting",
        options={"inpainting.whole": 0.5},
        command=("check", "config.toml"),
    ),
    Bad(
        "scheduler unknown",
        "beta_schedule 'sigmoid'",
        "scaled_linear",
        "scheduler_config.json",
        make=lambda p: p.edit("base/scheduler/scheduler_config.json", beta_schedule="sigmoid"),
    ),
    Bad(
        "scheduler without its package",
        "LMSDiscreteScheduler needs scipy",
        "pip install scipy",
        "scheduler_config.json",
        make=without_scipy,
        options={"validation.prompts": ["a red circle"], "output_dir": "other"},
    ),
    Bad(
        "check of a scheduler without its package",
        "LMSDiscreteScheduler needs scipy",
        "pip install scipy",
        "scheduler_config.json",
        make=without_scipy,
        options={"validation.prompts": ["a red circle"]},
        command=("check", "config.toml"),
    ),
    Bad(
        "sample by a scheduler without its package",
        "LMSDiscreteScheduler needs scipy",
        "--sampler",
        "scheduler_config.json",
        make=without_scipy,
        command=("sample", "base", "--prompt", "a", "--out", "drawn"),
    ),
    Bad(
        "VAE override missing",
        "'no/such/dir/vae' does not exist",
        "existing folder",
        "model.vae",
        options={"model.vae": "no/such/dir/vae"},
    ),
    Bad(
        "VAE override is no VAE",
        "UNet2DConditionModel",
        "AutoencoderKL",
        "other",
        make=lambda p: override(p, _class_name="UNet2DConditionModel"),
    ),
    Bad(
        "VAE override of 16 channels",
        "16",
        "SDXL",
        "other",
        make=lambda p: override(p, _class_name="AutoencoderKL", latent_channels=16),
    ),
    Bad("VAE override is a file", "vae", "folder", "model.vae", make=lambda p: p.set("model.vae", VAE)),
]
