"""Bad inputs: adapters and new words."""

import torch
from safetensors.torch import save_file

from tests.bad_inputs.place import Bad, Place


def _file(place: Place, *tensors: tuple[str, tuple[int, ...]]) -> None:
    save_file({name: torch.zeros(shape) for name, shape in tensors}, place / "a.safetensors")


TO_K = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k.lora_{}.weight"
SD1 = ((TO_K.format("A"), (4, 768)), (TO_K.format("B"), (64, 4)))
FLUX = (("transformer.single_transformer_blocks.0.attn.to_q.lora_A.weight", (4, 8)),)
STRANGE = (("unet.no_blocks.3.to_q.lora_A.weight", (4, 8)), ("unet.no_blocks.3.to_q.lora_B.weight", (8, 4)))
SAMPLE = ("sample", "base", "--prompt", "a", "--lora")
NEW = {"output_dir": "other"}
BEGUN = {**NEW, "adapter.start": "a.safetensors"}
WORD = [{"name": "<x>", "vectors": 1}]

ROWS = [
    Bad("rank 0", "adapter.rank = 0", "greater than 0", options={"adapter.rank": 0}),
    Bad("unknown kind of adapter", 'adapter.kind = "lara"', "'lora'", options={"adapter.kind": "lara"}),
    Bad("adapter on the VAE", 'adapter.parts.0 = "vae"', "unet", options={"adapter.parts": ["vae"]}),
    Bad("targets name nothing", "names no layer of unet", "attention, linear", options={**NEW, "adapter.targets": "x"}),
    Bad("targets no expression", "not a regular expression", "attn2", options={**NEW, "adapter.targets": "(attn"}),
    Bad("rank pattern names nothing", "decides nothing", "look like", options=NEW,
        command=("train", "config.toml", "adapter.ranks={zzz = 2}")),
    Bad("oft on convolutions", "a convolution of 3 x 3, with which peft's does not begin as the base", "linear",
        options={**NEW, "adapter.kind": "oft", "adapter.block_size": 4, "adapter.targets": "all"}),
    Bad("conv rank without convolutions", "conv_rank has no effect", "all", options={**NEW, "adapter.conv_rank": 2}),
    Bad("dropout of loha", "adapter.dropout = 0.1 has no effect", "remove",
        options={"adapter.kind": "loha", "adapter.dropout": 0.1}),
    Bad("rank of oft", "adapter.rank = 4 has no effect", "remove", options={"adapter.kind": "oft", "adapter.rank": 4}),
    Bad("block that does not divide", "blocks of 24 do not divide", "4, 8, 16",
        options={**NEW, "adapter.kind": "oft", "adapter.block_size": 24}),
    Bad("adapter in bf16", "always fp32", "train.frozen", options={"adapter.rank": 4, "train.weights": "bf16"}),
    Bad("adapter on random weights", "nobody else has", "model.init",
        options={"adapter.rank": 4, "model.init": "random"}),
    Bad("frozen without adapter", "train.frozen = \"fp8\" has no effect", "remove", options={"train.frozen": "fp8"}),
    Bad("rule for the base beside an adapter", "decides nothing", "lora_A",
        options={**NEW, "adapter.rank": 4, "learn": [{"match": r"unet\..*norm.*"}]}),
    Bad("rules that all end", "nothing learns after 0.5", "to the end",
        options={**NEW, "adapter.rank": 4, "learn": [{"match": ".*", "until": 0.5}]}),
    Bad("begin with nothing", "there is no file", "folder of a run", options=BEGUN),
    Bad("begin with SD 1.5", "for another model", "SDXL base", make=lambda p: _file(p, *SD1), options=BEGUN),
    Bad("begin with Flux", "for Flux", "SDXL base", make=lambda p: _file(p, *FLUX), options=BEGUN),
    Bad("begin with strange layers", "2 of 2 tensors are for layers that this model has not", "SDXL base",
        make=lambda p: _file(p, *STRANGE), options=BEGUN),
    Bad("begin with fewer layers", "lacks", "targets, ranks",
        make=lambda p: _file(p, (SD1[0][0], (4, 64)), SD1[1]), options={**BEGUN, "adapter.rank": 4}),
    Bad("begin with a pickle", "pickle", "save_pretrained",
        make=lambda p: p.put("a.safetensors", b"\x80\x02}q\x00."), options=BEGUN),
    Bad("sample with no file", "there is no file", "folder of a run", command=(*SAMPLE, "a.safetensors")),
    Bad("sample with a wrong weight", "not a weight", "FILE:0.8", command=(*SAMPLE, "a.safetensors:much")),
    Bad("sample with a run without adapter", "there is no pytorch_lora", "run", command=(*SAMPLE, "run")),
    Bad("sample with Flux", "for Flux", "SDXL base", make=lambda p: _file(p, *FLUX),
        command=(*SAMPLE, "a.safetensors")),
    Bad("sample with SD 1.5", "for another model", "SDXL base", make=lambda p: _file(p, *SD1),
        command=(*SAMPLE, "a.safetensors")),
    Bad("sample with no embedding", "holds unet", "SD 1 and 2", make=lambda p: _file(p, *SD1),
        command=(*SAMPLE[:-1], "--embedding", "a.safetensors")),
    Bad("word without caption", "no caption holds the new word '<x>'", "captions", options={**NEW, "token": WORD}),
    Bad("word with a space", "token.0.name", "match", options={"token": [{"name": "a b"}]}),
    Bad("words as one section", "token = ", r"\[\[token\]\]", options={"token": {"name": "<x>"}}),
    Bad("word of the vocabulary", "'a' is already a token", "none yet", options={**NEW, "token": [{"name": "a"}]}),
    Bad("words that begin alike", "cannot be told apart", "none begins",
        options={"token": [{"name": "<x"}, {"name": "<X2"}]}),
    Bad("words to begin with do not fit", "is 4 tokens", "vectors = 4",
        options={**NEW, "data.0.caption": "a <x>", "data.0.caption_only": True,
                 "token": [{"name": "<x>", "init": "red blue green circle"}]}),
]  # fmt: skip
