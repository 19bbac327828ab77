"""Frozen weights in fewer bits: kept packed, unpacked by each layer as it is used, and unpacked again in the backward
pass rather than kept for it (QLoRA, Dettmers et al. 2023, for any kind of adapter)."""

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any, cast

import torch
from torch import Tensor, nn

from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError
from sdxl_trainer.model import SDXL

# Layers that see pixels, time and size at first or last: few parameters, and errors there reach everything.
KEPT = ("conv_in", "conv_out", "time_embedding", "add_embedding", "text_projection")


def _fp8(weight: Tensor) -> "Packed":
    """e4m3 with a scale for each output: without one, weights below 2^-6 lose their digits."""
    return _scaled(weight, 448.0, lambda scaled: scaled.to(torch.float8_e4m3fn))


def _int8(weight: Tensor) -> "Packed":
    """Integers with a scale for each output."""
    return _scaled(weight, 127.0, lambda scaled: scaled.round().to(torch.int8))


def _scaled(weight: Tensor, largest: float, narrow: Callable[[Tensor], Tensor]) -> "Packed":
    flat = weight.float().flatten(1)
    scale = flat.abs().amax(1, keepdim=True).clamp(min=1e-12) / largest
    return Packed({"values": narrow(flat / scale), "scale": scale}, _unscaled)


def _unscaled(tensors: dict[str, Tensor]) -> Tensor:
    return tensors["values"].float() * tensors["scale"]


def _nf4(weight: Tensor) -> "Packed":
    """Four bits, quantiles of a normal distribution, a scale for 64 values (bitsandbytes)."""
    try:
        from bitsandbytes import functional
    except ImportError:
        fix = "pip install bitsandbytes, or choose fp8 or int8"
        raise UserError("nf4 needs bitsandbytes, which is not installed", "train.frozen", fix) from None
    values, state = functional.quantize_4bit(weight.float().flatten(1).contiguous(), blocksize=64, quant_type="nf4")

    def unpacked(tensors: dict[str, Tensor]) -> Tensor:
        state.absmax, state.code = tensors["absmax"], tensors["code"]
        return functional.dequantize_4bit(tensors["values"], state)

    return Packed({"values": values, "absmax": state.absmax, "code": state.code}, unpacked)


def _cast(dtype: torch.dtype) -> Callable[[Tensor], "Packed"]:
    return lambda weight: Packed({"values": weight.flatten(1).to(dtype)}, lambda tensors: tensors["values"])


@dataclass
class Packed:
    """Tensors, and the function that makes the matrix [outputs, rest] of them."""

    tensors: dict[str, Tensor]
    unpack: Callable[[dict[str, Tensor]], Tensor]


PACKINGS: dict[str, Callable[[Tensor], Packed]] = {
    "fp32": _cast(torch.float32),
    "bf16": _cast(torch.bfloat16),
    "fp16": _cast(torch.float16),
    "fp8": _fp8,
    "int8": _int8,
    "nf4": _nf4,
}
# Bytes per weight, for estimates.
BYTES = {"fp32": 4.0, "bf16": 2.0, "fp16": 2.0, "fp8": 1.0, "int8": 1.0, "nf4": 0.57}


class Memory:
    """Which storages are weights unpacked just now, so that autograd keeps their layer in their stead."""

    def __init__(self) -> None:
        self.live: dict[int, Any] = {}

    def note(self, weight: Tensor, layer: Any) -> None:
        place = weight.untyped_storage().data_ptr()
        self.live[place] = weakref.ref(layer)
        weakref.finalize(weight, self.live.pop, place, None)

    def keep(self, tensor: Tensor) -> Any:
        found = self.live.get(tensor.untyped_storage().data_ptr())
        if found:
            return found(), tensor.size(), tensor.stride(), tensor.storage_offset()
        # Without its history: an operation that keeps its own output would hold itself until a backward pass clears it.
        return tensor.detach()

    def give(self, kept: Any) -> Tensor:
        if isinstance(kept, Tensor):
            return kept
        layer, *view = kept
        return layer.weight.as_strided(*view)

    def hooks(self) -> Any:
        return torch.autograd.graph.saved_tensors_hooks(self.keep, self.give)


def _weight(layer: Any) -> nn.Parameter:
    weight = layer.packed.unpack(layer.packed.tensors).to(layer.compute).reshape(layer.shape)
    made = nn.Parameter(weight, requires_grad=False)
    layer.memory.note(made, layer)
    return made


@cache
def _packed_class(kind: Any) -> Any:
    """A layer's class whose `weight` is unpacked each time it is read; the packed tensors follow the layer from device
    to device, but are neither parameters nor buffers, which processes would send to each other."""

    def _apply(self: Any, function: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        kind._apply(self, function, recurse)
        self.packed.tensors = {name: function(t) for name, t in self.packed.tensors.items()}
        return self

    def __new__(cls: Any, *sizes: Any, **options: Any) -> nn.Module:
        return kind(*sizes, **options)  # peft makes its own convolutions by calling the class of the base's

    own = {"weight": property(_weight), "_apply": _apply, "__new__": __new__}
    return type(f"Packed{kind.__name__}", (kind,), own)


def pack(sdxl: SDXL, kind: str, compute: torch.dtype) -> None:
    """Keep the weights of linear layers and convolutions as `kind`; they compute in `compute`. All else, which is
    small, stays as it is."""
    memory = Memory()
    for name, layer in list(sdxl.named_modules()):
        if not isinstance(layer, nn.Linear | nn.Conv2d) or layer.weight.is_meta:
            continue
        outer = kind not in DTYPES and any(part in KEPT for part in name.split("."))
        chosen, weight = "bf16" if outer else kind, layer.weight.detach()
        if DTYPES.get(chosen) == compute:
            layer.weight = nn.Parameter(weight.to(compute), requires_grad=False)
            continue
        del layer._parameters["weight"]
        layer.__class__ = _packed_class(cast(Any, type(layer)))
        packed: Any = layer
        packed.packed, packed.shape = PACKINGS[chosen](weight), weight.shape
        packed.compute, packed.memory = compute, memory
    sdxl.saving = memory.hooks
