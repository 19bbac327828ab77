"""Bad input to `sdxl convert`: three lines, exit 2, nothing written, nothing changed."""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from sdxl_trainer import files
from tests.formats.test_lora import IN, LINEAR, OUT, draw

LORA = f"{LINEAR}.lora_"
KOHYA = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"


@dataclass(frozen=True)
class Bad:
    """What is said, where, and how to mend it, as regular expressions; `make` makes what SRC names."""

    name: str
    says: str
    fix: str
    words: tuple[str, ...] = ("SRC", "DST.safetensors")
    make: Callable[[Path], object] = lambda place: good(place)
    at: str = ""


def good(place: Path) -> None:
    tensors(place, {f"{LORA}A.weight": (4, IN), f"{LORA}B.weight": (OUT, 4)})


def tensors(place: Path, shapes: Mapping[str, tuple[int, ...]], **told: str) -> None:
    save_file({name: torch.zeros(shape) for name, shape in shapes.items()}, place / "src.safetensors", told or None)


def names(*given: str, shape: tuple[int, ...] = (2, 2)) -> Callable[[Path], None]:
    return lambda place: tensors(place, dict.fromkeys(given, shape))


def cut(place: Path) -> None:
    good(place)
    (place / "src.safetensors").write_bytes((place / "src.safetensors").read_bytes()[:-7])


def pickled(place: Path) -> None:
    torch.save({"state_dict": {}}, place / "src.safetensors")


def mixed(place: Path) -> None:
    tensors(place, {f"{LORA}A.weight": (4, IN), f"{LORA}B.weight": (OUT, 4), "something.else": (1,)})


def twice(place: Path) -> None:
    shapes = {
        f"{end}{side}": shape
        for end in (f"{LINEAR}.lora_", "base_model.model." + f"{LINEAR}.lora_")
        for side, shape in (("A.weight", (4, IN)), ("B.weight", (OUT, 4)))
    }
    tensors(place, shapes)


def dora(place: Path) -> None:
    tensors(place, {f"{LORA}A.weight": (4, IN), f"{LORA}B.weight": (OUT, 4), f"{LINEAR}.lora_magnitude_vector": (OUT,)})


def per_input(place: Path) -> None:
    tensors(
        place,
        {f"{KOHYA}.lora_down.weight": (4, IN), f"{KOHYA}.lora_up.weight": (OUT, 4), f"{KOHYA}.dora_scale": (1, IN)},
    )


def not_finite(place: Path) -> None:
    made = {
        f"{KOHYA}.lora_down.weight": draw(4, IN),
        f"{KOHYA}.lora_up.weight": draw(OUT, 4),
        f"{KOHYA}.alpha": torch.tensor(float("nan")),
    }
    save_file(made, place / "src.safetensors")


def large(place: Path) -> None:
    save_file({f"{LORA}A.weight": draw(4, IN) * 1e9, f"{LORA}B.weight": draw(OUT, 4)}, place / "src.safetensors")


def exists(place: Path) -> None:
    good(place)
    (place / "dst.safetensors").write_bytes(b"precious")


def full_folder(place: Path) -> None:
    good(place)
    (place / "dst").mkdir()
    (place / "dst" / "precious.txt").write_text("1")


def class_name(place: Path) -> None:
    (place / "src").mkdir()
    (place / "src/model_index.json").write_text(json.dumps({"_class_name": "StableDiffusionPipeline"}))


def oft_folder(place: Path) -> None:
    (place / "src").mkdir()
    (place / "src/adapter_config.json").write_text(json.dumps({"peft_type": "OFT"}))
    save_file({"base_model.model.x.oft_R.weight": torch.zeros(1)}, place / "src/adapter_model.safetensors")


def half_embedding(place: Path) -> None:
    tensors(place, {"<cat>": (2, 768)})


def unequal_embedding(place: Path) -> None:
    tensors(place, {"clip_l": (2, 768), "clip_g": (3, 1280)})


SMALLER = ("SRC", "DST.safetensors", "--rank")
ROWS = [
    Bad("no such file", "no such file or folder", "check the path", ("absent.safetensors", "DST")),
    Bad(
        "empty file",
        "cut short or damaged: it is empty",
        "again",
        make=lambda p: (p / "src.safetensors").write_bytes(b""),
    ),
    Bad("file cut short", "cut short or damaged", "again", make=cut),
    Bad(
        "web page",
        "not a safetensors file",
        "again",
        make=lambda p: (p / "src.safetensors").write_bytes(b"<html></html>"),
    ),
    Bad("pickle", "pickle can run code", "weights_only=True", make=pickled),
    Bad(
        "empty folder",
        "neither a model nor an adapter",
        "model_index.json",
        ("src", "DST"),
        lambda p: (p / "src").mkdir(),
    ),
    Bad("SD 1 folder", "StableDiffusionPipeline, not a whole SDXL", "complete folder", ("src", "DST"), class_name),
    Bad("OFT folder of peft", "kind OFT", "are converted", ("src", "DST"), oft_folder),
    Bad(
        "SD 1 model",
        "this is an SD 1 model",
        "SDXL",
        make=names("cond_stage_model.transformer.text_model.x", "model.diffusion_model.input_blocks.0.0.weight"),
    ),
    Bad(
        "SD 2 model",
        "this is an SD 2 model",
        "SDXL",
        make=names("cond_stage_model.model.transformer.resblocks.0.x", "model.diffusion_model.y"),
    ),
    Bad(
        "SD 3 model",
        "this is an SD 3 model",
        "SDXL",
        make=names("model.diffusion_model.joint_blocks.0.context_block.x"),
    ),
    Bad("Flux model", "Flux", "SDXL", make=names("double_blocks.0.img_attn.qkv.weight")),
    Bad(
        "Flux model with prefix",
        "Flux",
        "SDXL",
        make=names("model.diffusion_model.double_blocks.0.img_attn.qkv.weight"),
    ),
    Bad(
        "refiner",
        "SDXL refiner",
        "SDXL",
        make=names("conditioner.embedders.0.model.transformer.resblocks.0.x", "model.diffusion_model.y"),
    ),
    Bad(
        "inpainting",
        "more input channels",
        "SDXL",
        make=names("model.diffusion_model.input_blocks.0.0.weight", shape=(4, 9, 3, 3)),
    ),
    Bad(
        "UNet alone",
        "UNet of an SDXL alone",
        "whole SDXL",
        make=names("model.diffusion_model.input_blocks.1.0.x", "model.diffusion_model.label_emb.0.0.weight"),
    ),
    Bad("VAE alone", "a VAE alone", "SDXL", make=names("first_stage_model.encoder.down.0.block.0.x")),
    Bad(
        "one part of a folder",
        "one part of a diffusers folder",
        "SDXL",
        make=names("down_blocks.0.resnets.0.conv1.weight"),
    ),
    Bad("ControlNet", "a ControlNet", "SDXL", make=names("control_model.input_blocks.0.0.weight")),
    Bad("unknown", "unknown kind", "SDXL", make=names("a", "b")),
    Bad(
        "SD 1 LoRA",
        "adapter for SD 1",
        "SDXL",
        make=names(
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", shape=(4, 768)
        ),
    ),
    Bad(
        "SD 2 LoRA",
        "adapter for SD 2",
        "SDXL",
        make=names(
            "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k.lora_down.weight", shape=(4, 1024)
        ),
    ),
    Bad(
        "SD 1 LoRA without cross attention",
        "adapter for SD 1 or 2",
        "SDXL",
        make=names("lora_unet_down_blocks_0_attentions_0_proj_in.lora_down.weight"),
    ),
    Bad(
        "Flux LoRA, kohya",
        "adapter for Flux",
        "SDXL",
        make=names("lora_unet_double_blocks_0_img_attn_qkv.lora_down.weight"),
    ),
    Bad(
        "Flux LoRA, diffusers",
        "adapter for Flux",
        "SDXL",
        make=names("transformer.single_transformer_blocks.0.attn.to_k.lora_A.weight"),
    ),
    Bad(
        "SD 3 LoRA",
        "adapter for SD 3",
        "SDXL",
        make=names("transformer.transformer_blocks.0.attn.add_q_proj.lora_A.weight"),
    ),
    Bad(
        "other transformer's LoRA",
        "transformer in place of a UNet",
        "SDXL",
        make=names("diffusion_model.blocks.0.self_attn.q.lora_A.weight"),
    ),
    Bad(
        "LoRA of a module that SDXL has not",
        "names no module of SDXL",
        "another model",
        make=names("lora_unet_extra_thing.lora_down.weight", "lora_unet_extra_thing.lora_up.weight"),
    ),
    Bad("OFT", "an OFT adapter", "are converted", make=names("lora_unet_mid_block_attentions_0_proj_in.oft_blocks")),
    Bad("foreign tensors", "none of an adapter's: something.else", "name the file", make=mixed),
    Bad("half of a LoRA", "lacks lora_up|other half", "not complete", make=names(f"{LORA}A.weight")),
    Bad("half of a LoHa", "lacks hada_w2_a", "not complete", make=names(*(f"{KOHYA}.hada_w1_{s}" for s in "ab"))),
    Bad("half of a LoKr", "lacks lokr_w2_a", "not complete", make=names(f"{KOHYA}.lokr_w1")),
    Bad(
        "rank 0",
        "rank 0",
        "at least 1",
        make=lambda p: tensors(p, {f"{LORA}A.weight": (0, IN), f"{LORA}B.weight": (OUT, 0)}),
    ),
    Bad(
        "halves that do not fit",
        "do not fit: up \\[24, 3\\], down \\[4, 18\\]",
        "again",
        make=lambda p: tensors(p, {f"{LORA}A.weight": (4, IN), f"{LORA}B.weight": (OUT, 3)}),
    ),
    Bad("two names for one module", "two tensors of the file are one", "once", make=twice),
    Bad("alpha that is no number", "alpha nan", "undamaged", make=not_finite),
    Bad(
        "broken configuration",
        "not valid JSON",
        "again",
        make=lambda p: tensors(p, {f"{LORA}A.weight": (4, IN), f"{LORA}B.weight": (OUT, 4)}, lora_adapter_metadata="{"),
    ),
    Bad("DST exists", "DST exists", "--overwrite", ("SRC", "dst.safetensors"), exists),
    Bad("DST is SRC", "DST is also read", "another", ("SRC", "src.safetensors", "--overwrite")),
    Bad(
        "DST is a folder with other things",
        "other things in it: precious.txt",
        "another folder",
        ("SRC", "dst", "--overwrite"),
        full_folder,
    ),
    Bad("DST of another format", "'.gguf' is not a format", "safetensors", ("SRC", "dst.gguf")),
    Bad("no DST", "no DST", "--show", ("SRC",)),
    Bad("no such kind", "no kind 'kohia'", "did you mean 'kohya'", ("SRC", "DST", "--to", "kohia")),
    Bad("a kind that it cannot become", "cannot become 'single'", "kohya, diffusers", ("SRC", "DST", "--to", "single")),
    Bad("nothing to convert", "nothing to convert", "--to kohya", ("SRC", "pytorch_lora_weights_2.safetensors")),
    Bad("no such dtype", "no dtype 'fp17'", "fp16", ("SRC", "DST.safetensors", "--dtype", "fp17")),
    Bad("values beyond the dtype", "beyond float16", "bf16", ("SRC", "dst", "--dtype", "fp16"), large),
    Bad("rank of nothing", "rank of 0", "at least 1", (*SMALLER, "0")),
    Bad("energy above 1", "no share", "at most 1", ("SRC", "DST.safetensors", "--energy", "95")),
    Bad(
        "weight that is no number",
        "'heavy' is not a weight",
        "one number",
        ("SRC", "DST.safetensors", "--weight", "heavy"),
    ),
    Bad(
        "weight for a whole model only",
        "--extract-from has no effect",
        "remove",
        ("SRC", "DST.safetensors", "--extract-from", "SRC"),
    ),
    Bad("token for an adapter", "--token has no effect", "remove", ("SRC", "DST.safetensors", "--token", "<a>")),
    Bad("entry without a value", "not an entry", "name=value", ("SRC", "DST.safetensors", "--set", "author")),
    Bad("no such entry", "no entry 'autor'", "author", ("SRC", "DST.safetensors", "--set", "autor=me")),
    Bad(
        "entry that is not written",
        "--set has no effect with --metadata none",
        "minimal",
        ("SRC", "DST.safetensors", "--set", "author=me", "--metadata", "none"),
    ),
    Bad("no such metadata", "no --metadata few", "minimal", ("SRC", "DST.safetensors", "--metadata", "few")),
    Bad("preview that is no picture", "preview cannot be read", "PNG", ("SRC", "DST.safetensors", "--preview", "SRC")),
    Bad("no preview", "preview cannot be read", "PNG", ("SRC", "DST.safetensors", "--preview", "absent.png")),
    Bad("all weights 0", "all weights are 0", "other than 0", ("SRC", "DST.safetensors", "--weight", "0")),
    Bad(
        "DoRA together", "no plain LoRA", "merge each into a base", ("SRC", "DST.safetensors", "--weight", "0.5"), dora
    ),
    Bad("DoRA per input for diffusers", "magnitude per input", "kohya layout", ("SRC", "dst"), per_input),
    Bad("--show with an option", "--rank has no effect", "remove", ("SRC", "--show", "--rank", "4")),
    Bad("half an embedding", "half of an SDXL embedding", "one folder", ("SRC", "dst"), half_embedding),
    Bad("unequal embedding", "do not fit", "same number", ("SRC", "dst"), unequal_embedding),
    Bad("embedding for SD 1", "embedding for SD 1", "SDXL", make=names("emb_params", shape=(2, 768))),
    Bad("base of another kind", "adapter", "whole SDXL", ("SRC", "DST.safetensors", "--base", "SRC")),
]


@pytest.mark.parametrize("bad", ROWS, ids=lambda bad: bad.name)
def test_bad_conversion(
    bad: Bad,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    convert: Callable[..., int],
    capfd: pytest.CaptureFixture[str],
) -> None:
    bad.make(tmp_path)
    monkeypatch.chdir(tmp_path)
    before = files.tree_hashes(tmp_path)
    words = [word.replace("SRC", "src.safetensors").replace("DST", "dst") for word in bad.words]
    assert convert(*words) == 2
    said = capfd.readouterr()
    explains(said.err, bad.says, bad.fix)
    assert said.out == ""
    assert files.tree_hashes(tmp_path) == before


def explains(stderr: str, says: str, fix: str) -> None:
    lines = stderr.splitlines()
    assert [line[:6] for line in lines] == ["error:", "   at:", "  fix:"], stderr
    assert re.search(says, lines[0]), stderr
    assert lines[1][6:].strip()
    assert re.search(fix, lines[2]), stderr
