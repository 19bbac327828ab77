"""The diffusers folder of an SDXL pipeline: which component lies where, and how its files are written.

Every file is written under a temporary name, synced and renamed; `model_index.json` comes last, so a folder
that has it is complete.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import stream
from sdxl_trainer.formats.metadata import fill_hashes

SHIPPED = Path(__file__).parent.parent / "assets" / "sdxl"
# A complete SDXL of 7.6 million parameters; recipes/micro makes it, docs/micro.md describes it.
MICRO = SHIPPED.with_name("micro")
INDEX = "model_index.json"
# Component -> its weight file, as `from_pretrained` of diffusers and transformers look for it.
WEIGHTS = {
    "unet": "diffusion_pytorch_model.safetensors",
    "vae": "diffusion_pytorch_model.safetensors",
    "text_encoder": "model.safetensors",
    "text_encoder_2": "model.safetensors",
}
CONFIGS = {
    **{name: "config.json" for name in WEIGHTS},
    "scheduler": "scheduler_config.json",
    "tokenizer": "tokenizer_config.json",
    "tokenizer_2": "tokenizer_config.json",
}
TOKENIZERS = ("tokenizer", "tokenizer_2")


def read_config(component: str, root: Path = SHIPPED) -> dict[str, Any]:
    """The configuration of one component of the pipeline folder `root` (default: SDXL base 1.0)."""
    path = root / component / CONFIGS[component]
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise UserError(
            f"the pipeline has no configuration for '{component}'",
            str(path),
            "name a complete diffusers folder, one with model_index.json and a folder for each component",
        ) from error


def read_weights(component: str, root: Path) -> dict[str, Tensor]:
    """The memory-mapped weights of one component of a pipeline folder, in one file or in shards."""
    from safetensors.torch import load_file

    whole = root / component / WEIGHTS[component]
    index = whole.with_name(whole.name + ".index.json")
    if whole.exists():
        found = [whole]
    elif index.exists():
        shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
        found = [whole.with_name(name) for name in sorted(set(shards))]
    else:
        raise UserError(
            f"the pipeline has no weights for '{component}'",
            str(whole),
            "name a complete diffusers folder with safetensors weights",
        )
    weights = {name: tensor for file in found for name, tensor in load_file(file).items()}
    weights.pop("text_model.embeddings.position_ids", None)  # a counter that older files hold
    return published_names(component, weights)


def write_component(
    root: Path,
    component: str,
    weights: Mapping[str, stream.Source],
    config: dict[str, Any],
    dtype: torch.dtype | None = None,
) -> None:
    """Write one component's weights and configuration into a pipeline folder."""
    if component.startswith("text_encoder"):
        kept = dtype or next(iter(weights.values())).dtype
        config = {**config, "torch_dtype": str(kept).removeprefix("torch.")}  # what loaders take
    write_tensors(root / component / WEIGHTS[component], weights, dtype=dtype)
    files.write_json(root / component / CONFIGS[component], config)


def published_names(component: str, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The weights under the names of published files.

    transformers 5 drops the prefix `text_model.` from the first text encoder's module, not from the second's;
    published files and transformers 4 have it in both, and every version reads those names.
    """
    if not component.startswith("text_encoder"):
        return dict(weights)
    bare = ("text_model.", "text_projection.")
    return {name if name.startswith(bare) else f"text_model.{name}": value for name, value in weights.items()}


def write_tensors(
    path: Path,
    tensors: Mapping[str, stream.Source],
    metadata: Mapping[str, str] | None = None,
    dtype: torch.dtype | None = None,
) -> None:
    """Write a safetensors file whole or not at all. Places for hashes in the metadata are filled.

    Tensors are written one at a time; with `dtype` they are cast to it on their way.
    """

    def write(temporary: Path) -> None:
        digest = stream.write(temporary, tensors, {"format": "pt", **(metadata or {})}, dtype)
        if metadata:
            fill_hashes(temporary, digest)

    files.write_atomically(path, write)
