"""What adapters do to weights: the change of each, its application, and the best change of a given rank.

Sources: LoRA (arXiv 2106.09685), DoRA (2402.09353), LoHa (2108.06098), and LoKr, whose layouts are LyCORIS's.
Everything is computed in fp32.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sdxl_trainer.errors import UserError
from sdxl_trainer.formats.lora import Module, outputs

NOTHING = 1e-13  # a squared singular value, as a share of the largest, that is rounding


@dataclass(frozen=True)
class Reduced:
    """A change as a product of two matrices, and how much of it that leaves out."""

    module: Module
    left_out: float  # squared Frobenius norm of what is missing
    total: float  # of the change


def change(module: Module, shape: Sequence[int]) -> Tensor:
    """The change of a weight of this shape, without DoRA's magnitudes."""
    return (_PRODUCTS[module.kind](module) * module.scale).reshape(*shape)


def applied(weight: Tensor, module: Module, strength: float) -> Tensor:
    """The weight with `strength` times the adapter's change, in the weight's dtype.

    DoRA scales the changed weight to its magnitudes first; `strength` then goes from the old weight to the new one.
    """
    old = weight.float()
    new = old + change(module, weight.shape) * (1.0 if "magnitude" in module.tensors else strength)
    if "magnitude" in module.tensors:
        axes = [axis for axis in range(new.dim()) if axis != (1 if module.per_input else 0)]
        magnitude = module.tensors["magnitude"].float()
        if magnitude.dim() == 1:
            magnitude = magnitude.reshape(-1, *[1] * (new.dim() - 1))
        new = new * (magnitude / torch.linalg.vector_norm(new, dim=axes, keepdim=True))
        new = old + strength * (new - old)
    return new.to(weight.dtype)


def joined(modules: Sequence[tuple[Module, float]], name: str) -> Module:
    """One LoRA that changes as much as several with their strengths: ranks side by side, exact up to rounding."""
    downs, ups = [], []
    for module, strength in modules:
        if module.kind != "lora" or "lora_mid" in module.tensors or "magnitude" in module.tensors:
            raise UserError(
                f"{name} is no plain LoRA ({_called(module)}), whose ranks could be put side by side",
                name,
                "give --rank to approximate the sum (not for DoRA), or merge each into a base: --lora",
            )
        factor = strength * module.scale
        up = module.tensors["lora_up"]
        ups.append(up if factor == 1.0 else up.float() * factor)
        downs.append(module.tensors["lora_down"])
    dtypes = {tensor.dtype for tensor in downs + ups}
    widest = dtypes.pop() if len(dtypes) == 1 else torch.float32
    down, up = (torch.cat([t.to(widest) for t in side], dim=axis) for side, axis in ((downs, 0), (ups, 1)))
    return Module("lora", {"lora_down": down, "lora_up": up}, float(down.shape[0]))


def reduced(difference: Tensor, rank: int | None, energy: float | None) -> Reduced:
    """The best LoRA for a change [out, in] or [out, in, k, k]: of one rank, or the least that keeps so much `energy`.

    Energy is the share of the squared Frobenius norm. The singular vectors come from the smaller Gram matrix in fp64,
    whose error of 1e-8 of the largest singular value lies below what fp32 weights resolve.
    """
    matrix = difference.flatten(1).double()
    wide = matrix.shape[0] <= matrix.shape[1]
    values, vectors = torch.linalg.eigh(matrix @ matrix.T if wide else matrix.T @ matrix)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    total = float(values.sum())
    kept = _rank(values, rank, energy)
    chosen = vectors[:, :kept]
    other = (chosen.T @ matrix) if wide else (matrix @ chosen)
    # Both halves get the square root of the singular values, so that neither is large in half precision.
    root = values[:kept].clamp_min(1e-300).pow(0.25)
    up = chosen * root if wide else other / root
    down = other / root[:, None] if wide else (chosen * root).T
    up, down = (torch.nan_to_num(half).float() for half in (up, down))
    if difference.dim() == 4:
        up, down = up[..., None, None], down.reshape(kept, *difference.shape[1:])
    module = Module("lora", {"lora_down": down.contiguous(), "lora_up": up.contiguous()}, float(kept))
    return Reduced(module, float((matrix - (up.flatten(1).double() @ down.flatten(1).double())).square().sum()), total)


def compressed(module: Module, rank: int | None, energy: float | None) -> Reduced:
    """The best LoRA of a lower rank for a LoRA, by way of its two thin factors: as `reduced`, and much faster."""
    up, down = module.tensors["lora_up"], module.tensors["lora_down"]
    left, core_left = torch.linalg.qr(up.flatten(1).double() * module.scale)
    right, core_right = torch.linalg.qr(down.flatten(1).double().T)
    small = reduced(core_left @ core_right.T, rank, energy)
    kept = small.module.rank
    halves = small.module.tensors
    new_up = (left @ halves["lora_up"].double()).reshape(up.shape[0], kept, *up.shape[2:])
    new_down = (halves["lora_down"].double() @ right.T).reshape(kept, *down.shape[1:])
    more = {"magnitude": module.tensors["magnitude"]} if "magnitude" in module.tensors else {}
    tensors = {"lora_down": new_down.float(), "lora_up": new_up.float(), **more}
    return Reduced(Module("lora", tensors, float(kept)), small.left_out, small.total)


def shape_of(module: Module, name: str) -> tuple[int, ...]:
    """The shape of the weight that the module changes. Some convolutions' adapters are flat and say nothing of the
    kernel; in SDXL all are 3 x 3 but the shortcuts."""
    shape = tuple(_PRODUCTS[module.kind](module).shape)
    if len(shape) == 2 and re.search(r"\.(conv\d?|conv_in|conv_out)$", name):
        return (shape[0], shape[1] // 9, 3, 3)
    return (*shape, 1, 1) if len(shape) == 2 and name.endswith(".conv_shortcut") else shape


def numel(module: Module) -> int:
    """How many numbers of a weight the module changes, told by the shapes alone."""
    t = module.tensors
    if module.kind == "lora":
        return t["lora_up"].shape[0] * math.prod(t["lora_down"].shape[1:]) * math.prod(_kernel(t, "lora_mid"))
    if module.kind == "loha":
        return outputs("loha", t) * t["hada_w1_b"].shape[1] * math.prod(_kernel(t, "hada_t1"))
    if module.kind == "lokr":
        first = t["lokr_w1"].shape[1] if "lokr_w1" in t else t["lokr_w1_b"].shape[1]
        second = math.prod(t["lokr_w2"].shape[1:]) if "lokr_w2" in t else t["lokr_w2_b"].shape[1]
        return outputs("lokr", t) * first * second * math.prod(_kernel(t, "lokr_t2"))
    return _full(module).numel()


def _kernel(tensors: dict[str, Tensor], core: str) -> tuple[int, ...]:
    return tuple(tensors[core].shape[2:]) if core in tensors else ()


def _rank(values: Tensor, rank: int | None, energy: float | None) -> int:
    """How many of the squared singular values to keep, largest first; never those that are rounding alone."""
    real = int((values > values[0] * NOTHING).sum())
    shares = values.cumsum(0) / values.sum().clamp_min(1e-300)
    enough = real if energy is None else int((shares < energy).sum()) + 1
    return max(1, min(enough, rank or real, real))


def _lora(module: Module) -> Tensor:
    up, down = module.tensors["lora_up"].float().flatten(1), module.tensors["lora_down"].float()
    if "lora_mid" in module.tensors:
        return torch.einsum("om,mnkl,ni->oikl", up, module.tensors["lora_mid"].float(), down.flatten(1))
    return (up @ down.flatten(1)).reshape(up.shape[0], *down.shape[1:])


def _loha(module: Module) -> Tensor:
    return _half(module, "hada_w1", "hada_t1") * _half(module, "hada_w2", "hada_t2")


def _half(module: Module, name: str, core: str) -> Tensor:
    """A low-rank factor: a matrix product, or with a core [r, r, k, k] of a convolution a Tucker product."""
    a, b = (module.tensors[f"{name}_{side}"].float() for side in "ab")
    if core in module.tensors:
        return torch.einsum("mnkl,mo,ni->oikl", module.tensors[core].float(), a, b)
    return a @ b


def _lokr(module: Module) -> Tensor:
    first = module.tensors["lokr_w1"].float() if "lokr_w1" in module.tensors else _half(module, "lokr_w1", "")
    second = module.tensors["lokr_w2"].float() if "lokr_w2" in module.tensors else _half(module, "lokr_w2", "lokr_t2")
    return torch.kron(first.reshape(*first.shape, *[1] * (second.dim() - 2)), second.contiguous())


def _full(module: Module) -> Tensor:
    return module.tensors["diff" if "diff" in module.tensors else "w_norm"].float()


def _called(module: Module) -> str:
    names = {"lora": "LoRA", "loha": "LoHa", "lokr": "LoKr", "full": "full difference", "norm": "norm's difference"}
    middle = " with a middle" if "lora_mid" in module.tensors else ""
    return ("DoRA" if "magnitude" in module.tensors else names[module.kind]) + middle


_PRODUCTS = {"lora": _lora, "loha": _loha, "lokr": _lokr, "full": _full, "norm": _full}
