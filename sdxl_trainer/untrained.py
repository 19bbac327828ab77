"""A UNet that begins with random weights (`model.init = "random"`), of the base's sizes or of other ones."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer.config import UNet
from sdxl_trainer.errors import UserError, plural
from sdxl_trainer.formats import modules

_BY_LEVEL = ("block_out_channels", "transformer_layers_per_block", "attention_head_dim")


def resized(config: dict[str, Any], sizes: UNet | None) -> dict[str, Any]:
    """A UNet's config with the sizes that are given. UserError where they do not fit together."""
    changes = sizes.model_dump(mode="json", exclude_none=True) if sizes else {}
    made = config | changes
    levels = len(made["down_block_types"])
    for name in _BY_LEVEL:
        if name in changes and len(changes[name]) != levels:
            what = (
                f"model.unet.{name} has {plural(len(changes[name]), 'number')}, and the base's UNet has {levels} levels"
            )
            raise UserError(what, "model.unet", f"give {levels} numbers, from the first level to the deepest")
    for name, count in (("norm_num_groups", [made["norm_num_groups"]] * levels), ("attention_head_dim", _heads(made))):
        for channels, part in zip(made["block_out_channels"], count, strict=True):
            if changes and channels % part:
                what = f"a level of {channels} channels cannot be divided by {name} = {part}"
                raise UserError(what, "model.unet", f"give channels that are multiples of {part}, or another {name}")
    if made["addition_time_embed_dim"] % 2:
        what = (
            f"model.unet.addition_time_embed_dim = {made['addition_time_embed_dim']} is odd: sines and cosines halve it"
        )
        raise UserError(what, "model.unet", "give an even number")
    return made


def _heads(config: dict[str, Any]) -> list[int]:
    """Attention heads of each level; SDXL's config calls them attention_head_dim."""
    heads = config["attention_head_dim"]
    return heads if isinstance(heads, list) else [heads] * len(config["down_block_types"])


def make(config: dict[str, Any], seed: int) -> nn.Module:
    """The UNet in fp32 on the CPU; its weights follow from (config, seed) alone.

    Biases, convolutions and attention to the picture itself begin as diffusers makes them. With PyTorch's own linear
    layers the caption is a small part of what a block computes, and all that it decides waits for that: here each
    layer between the caption and a block keeps the size of what it is given (LeCun et al. 1998, 4.6; He et al. 2015
    where SiLU follows). The last convolution begins at zero (Dhariwal and Nichol 2021, as in their code).
    """
    return begun("unet", config, seed, _deviation)


def begun(part: str, config: dict[str, Any], seed: int, deviation: Callable[[str, Tensor], float | None]) -> nn.Module:
    """A model of this config in fp32 on the CPU. Its weights follow from (config, seed): normal with the `deviation` of
    (name, weight), or as the library makes them where that is None."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = modules.construct(part, config)
        for name, weight in module.named_parameters():
            own = deviation(name, weight)
            if own is not None:
                nn.init.normal_(weight, std=own)
    return module


def _deviation(name: str, weight: Tensor) -> float | None:
    """Standard deviation of a weight to begin with; None: as diffusers makes it."""
    if name.startswith("conv_out."):
        return 0.0
    if weight.ndim != 2:
        return None
    if any(part in name for part in ("time_emb", "add_embedding")):
        return float((2 / weight.shape[1]) ** 0.5)
    return float(weight.shape[1] ** -0.5) if ".attn2." in name else None
