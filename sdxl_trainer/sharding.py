"""Weights, gradients, averages and optimizer state in shards, one on each process: PyTorch's `fully_shard` (FSDP2).

What is sharded is a DTensor. Outside of the passes through the model code works on its own shard, or asks for the
`whole`, for which all processes have to meet.
"""

import sys
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sdxl_trainer.errors import UserError

# Modules that are gathered together, used and given back: the repeated blocks of UNet and text encoders.
UNITS = ("BasicTransformerBlock", "ResnetBlock2D", "CLIPEncoderLayer", "CLIPTextEmbeddings")


@dataclass(frozen=True)
class Sharding:
    """`units`: classes of the modules that are gathered together; or, with `least`, modules of as many parameters.
    `reshard`: give gathered weights back after the forward pass and gather them again for the backward pass."""

    units: tuple[str, ...] = UNITS
    least: int | None = None
    reshard: bool = True


def shard(model: nn.Module, sharding: Sharding, processes: int, device: torch.device) -> None:
    """Shard every child of the model, each by itself, so that each may be called alone."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (processes,))
    found = {type(module).__name__ for module in model.modules()}
    unknown = [name for name in sharding.units if name not in found and name not in UNITS]
    if unknown:
        what = f"no module of the model is of the class {unknown[0]}"
        raise UserError(what, "accelerate config: fsdp_transformer_layer_cls_to_wrap", f"use {', '.join(UNITS)}")
    for part in model.children():
        inside_out = list(part.modules())[::-1]
        for module in [m for m in inside_out if m is not part]:
            if _is_unit(module, sharding):
                fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard)
        # `fully_shard` gives a module another class, by whose name transformers looks up what its models record.
        rest = [part] if not _is_of_transformers(part) else [m for m in inside_out if _own(m)]
        for module in rest:
            fully_shard(module, mesh=mesh, reshard_after_forward=sharding.reshard)
    plain = [name for name, p in model.named_parameters() if not is_sharded(p)]
    if plain:
        raise RuntimeError(f"not sharded: {plain[:3]}")


def _is_of_transformers(module: nn.Module) -> bool:
    return any(kind.__module__.startswith("transformers.") for kind in type(module).__mro__)


def _own(module: nn.Module) -> bool:
    """Whether the module itself has parameters that are not sharded yet."""
    return any(not is_sharded(p) for p in module.parameters(recurse=False))


def _is_unit(module: nn.Module, sharding: Sharding) -> bool:
    if sharding.least is None:
        return type(module).__name__ in sharding.units
    own = sum(p.numel() for p in module.parameters() if not is_sharded(p))
    return own >= sharding.least and not isinstance(module, nn.ModuleList | nn.ModuleDict)


def is_sharded(tensor: Any) -> bool:
    # Where nothing has sharded anything the module is not there, and importing it takes long.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on its device. Where it is sharded, all processes have to ask for it."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def local(tensor: Tensor) -> Tensor:
    """This process's shard, sharing memory with the tensor."""
    return tensor.to_local() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def like(value: Tensor, other: Tensor) -> Tensor:
    """A whole value, which all processes have, sharded as another tensor of the same shape is."""
    if not is_sharded(other) or value.shape != other.shape:
        return value
    from torch.distributed.tensor import distribute_tensor

    there: Any = other
    return distribute_tensor(value.to(there.device), there.device_mesh, there.placements, src_data_rank=None)


def collected(tensors: Mapping[str, Tensor], keep: bool) -> dict[str, Tensor]:
    """Whole tensors in host memory where they were sharded; without `keep` this process only takes part."""
    found = {}
    for name, tensor in tensors.items():
        if is_sharded(tensor):
            gathered = whole(tensor)
            found[name] = gathered.cpu() if keep else gathered.new_empty(0)
        else:
            found[name] = tensor
    return found


def reshard(model: nn.Module) -> None:
    """Give up gathered weights: their shards were changed, or are about to be."""
    from torch.distributed.fsdp import FSDPModule

    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()
