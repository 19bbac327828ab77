"""Complete SDXL pipelines of any size with random weights, as ordinary diffusers folders.

The configurations are those of SDXL base 1.0 with the sizes replaced: a small pipeline has the same blocks,
the same conditioning and the same files as the real one, and differs from it in numbers alone.
"""

import json
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch

from sdxl_trainer import files
from sdxl_trainer.errors import UserError, closest
from sdxl_trainer.formats import folder, modules, vocabulary


@dataclass(frozen=True)
class UNetSize:
    """The UNet: three levels, of which the first has no attention."""

    widths: tuple[int, int, int]
    heads: tuple[int, int, int]
    transformer_layers: tuple[int, int, int]
    layers: int
    time_dim: int  # sinusoid length of each of the six micro-conditioning numbers
    groups: int


@dataclass(frozen=True)
class TextSize:
    """One CLIP text encoder. SDXL reads the layer before the last, so it needs at least two."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    projection: int


@dataclass(frozen=True)
class VaeSize:
    """The autoencoder: four levels, hence latents of one eighth of the picture's side."""

    widths: tuple[int, int, int, int]
    layers: int
    groups: int
    scaling: float = 0.13025


@dataclass(frozen=True)
class Size:
    """Every number that makes one SDXL pipeline larger or smaller than another."""

    unet: UNetSize
    text_1: TextSize
    text_2: TextSize
    vae: VaeSize
    resolution: int  # side in pixels that the pipeline draws by default

    @property
    def context(self) -> int:
        """Width of the text tokens: both encoders side by side."""
        return self.text_1.hidden + self.text_2.hidden

    @property
    def conditioning(self) -> int:
        """Width of the vector for the added embedding: the pooled text and six numbers."""
        return self.text_2.projection + 6 * self.unet.time_dim


SIZES: dict[str, Size] = {
    "tiny": Size(
        UNetSize((32, 64, 64), (2, 4, 4), (1, 1, 1), layers=1, time_dim=16, groups=16),
        # Two widths, as in SDXL: some readers of single files tell the encoders apart by nothing else.
        TextSize(24, layers=2, heads=2, intermediate=48, projection=24),
        TextSize(40, layers=3, heads=2, intermediate=80, projection=40),
        VaeSize((8, 16, 16, 32), layers=1, groups=8),
        resolution=64,
    ),
    "mid": Size(
        UNetSize((64, 128, 256), (1, 2, 4), (1, 2, 10), layers=2, time_dim=256, groups=32),
        TextSize(192, layers=4, heads=3, intermediate=768, projection=192),
        TextSize(320, layers=6, heads=5, intermediate=1280, projection=320),
        VaeSize((32, 64, 128, 128), layers=2, groups=32),
        resolution=256,
    ),
    "sdxl": Size(
        UNetSize((320, 640, 1280), (5, 10, 20), (1, 2, 10), layers=2, time_dim=256, groups=32),
        TextSize(768, layers=12, heads=12, intermediate=3072, projection=768),
        TextSize(1280, layers=32, heads=20, intermediate=5120, projection=1280),
        VaeSize((128, 256, 512, 512), layers=2, groups=32),
        resolution=1024,
    ),
}
MERGES_LIMIT = 4096  # merges learned from captions; the real vocabulary has 48,894


def configs(size: Size) -> dict[str, dict[str, Any]]:
    """The configuration of each component with weights: SDXL's own, with the sizes replaced."""
    changes: dict[str, dict[str, Any]] = {
        "unet": {
            "block_out_channels": list(size.unet.widths),
            "attention_head_dim": list(size.unet.heads),  # the number of heads, whatever it is called
            "transformer_layers_per_block": list(size.unet.transformer_layers),
            "layers_per_block": size.unet.layers,
            "norm_num_groups": size.unet.groups,
            "addition_time_embed_dim": size.unet.time_dim,
            "cross_attention_dim": size.context,
            "projection_class_embeddings_input_dim": size.conditioning,
            "sample_size": size.resolution // 8,
        },
        "vae": {
            "block_out_channels": list(size.vae.widths),
            "layers_per_block": size.vae.layers,
            "norm_num_groups": size.vae.groups,
            "scaling_factor": size.vae.scaling,
            "sample_size": size.resolution,
        },
        "text_encoder": text_changes(size.text_1),
        "text_encoder_2": text_changes(size.text_2),
    }
    return {name: {**folder.read_config(name), **change} for name, change in changes.items()}


def build(
    target: Path | str,
    size: str | Size,
    *,
    captions: Iterable[str] | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
    kind: Literal["base", "inpainting", "refiner"] = "base",
) -> Path:
    """Write a complete pipeline with random weights to the folder `target`, and return it.

    With `captions` both tokenizers know only what those captions hold; without them they are CLIP's own. The
    weights follow from `(size, captions' vocabulary, seed, dtype)` alone. One component exists at a time.
    """
    target = Path(target)
    (target / folder.INDEX).unlink(missing_ok=True)
    components = configs(_size(size))
    components["unet"] |= _kind_changes(kind, _size(size))
    missing = {"text_encoder", "tokenizer"} if kind == "refiner" else set()
    for name in missing & components.keys():
        del components[name]
    if captions is None:
        merges = vocabulary.clip_merges()
    else:
        merges = vocabulary.learn_merges(captions, MERGES_LIMIT)
        last = len(vocabulary.token_ids(merges)) - 1
        for name in components.keys() & {"text_encoder", "text_encoder_2"}:
            components[name] |= {"vocab_size": last + 1, "bos_token_id": last - 1, "eos_token_id": last}
    for name in components.keys() & {"text_encoder", "text_encoder_2"}:
        components[name]["torch_dtype"] = str(dtype).removeprefix("torch.")  # what loaders take
    for name in folder.TOKENIZERS:
        if name in missing:
            continue
        vocabulary.write(target / name, merges, folder.SHIPPED / name)
    for index, (name, config) in enumerate(components.items()):
        with torch.random.fork_rng(devices=[]), _default_dtype(dtype):
            torch.manual_seed(seed * len(components) + index)
            weights = modules.construct(name, config).state_dict()
        folder.write_tensors(target / name / folder.WEIGHTS[name], folder.published_names(name, weights))
        files.write_json(target / name / folder.CONFIGS[name], config)
        del weights
    files.write_json(target / "scheduler" / folder.CONFIGS["scheduler"], folder.read_config("scheduler"))
    index = json.loads((folder.SHIPPED / folder.INDEX).read_text(encoding="utf-8"))
    files.write_json(target / folder.INDEX, index | _INDEX_CHANGES[kind])
    return target


# What the pipeline of a refiner or inpainting model says of itself.
_INDEX_CHANGES: dict[str, dict[str, Any]] = {
    "base": {},
    "inpainting": {"_class_name": "StableDiffusionXLInpaintPipeline"},
    "refiner": {
        "_class_name": "StableDiffusionXLImg2ImgPipeline",
        "text_encoder": [None, None],
        "tokenizer": [None, None],
        "force_zeros_for_empty_prompt": False,
        "requires_aesthetics_score": True,
    },
}


def _kind_changes(kind: str, size: Size) -> dict[str, Any]:
    """What of the UNet's configuration another kind of model changes."""
    if kind == "inpainting":
        return {"in_channels": 9}
    if kind == "refiner":
        conditioning = size.text_2.projection + 5 * size.unet.time_dim
        return {"cross_attention_dim": size.text_2.hidden, "projection_class_embeddings_input_dim": conditioning}
    return {}


def _size(size: str | Size) -> Size:
    """The size itself, or the one of that name."""
    if isinstance(size, Size):
        return size
    if size not in SIZES:
        raise UserError(f"there is no pipeline size '{size}'", "size", closest(size, SIZES))
    return SIZES[size]


def text_changes(size: TextSize) -> dict[str, Any]:
    """The configuration entries of a text encoder that its size decides."""
    return {
        "hidden_size": size.hidden,
        "num_hidden_layers": size.layers,
        "num_attention_heads": size.heads,
        "intermediate_size": size.intermediate,
        "projection_dim": size.projection,
    }


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Modules made inside have this dtype from the start, so no larger copy of them ever exists."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
