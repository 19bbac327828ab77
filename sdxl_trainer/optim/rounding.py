"""AdamW for weights that are kept in bf16: everything it writes is rounded up or down by chance, right on average."""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import keyed

# Elements that are updated together: few launches, and fp32 copies of no more than this.
TOGETHER = 1 << 25


class AdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov & Hutter 2019) computed in fp32 on bf16 weights and bf16 moments.

    Nearest rounding would lose every change below 2^-9 of a number: small steps, weight decay, and the decay of the
    second moment, which then never shrinks. Stochastic rounding keeps them in expectation. Its random bits are drawn
    by (seed, step), so that a resumed run rounds alike.
    """

    def __init__(
        self,
        params: list[dict[str, Any]],
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(params, defaults)
        self._seed = seed
        for group in self.param_groups:
            group["steps"] = 0
            if any(p.dtype != torch.bfloat16 for p in group["params"]):
                raise ValueError("all learning tensors have to be bf16")

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        steps = self.param_groups[0]["steps"]
        key = int(keyed.generator(self._seed, "rounding", 0, steps).integers(1 << 63))
        generators: dict[torch.device, torch.Generator] = {}
        for group in self.param_groups:
            group["steps"] += 1
            for some in _together([p for p in group["params"] if p.grad is not None]):
                device = some[0].device
                bits = generators.setdefault(device, torch.Generator(device).manual_seed(key))
                self._update(some, group, bits)

    def _update(self, parameters: list[Tensor], group: dict[str, Any], bits: torch.Generator) -> None:
        for p in parameters:
            if not self.state[p]:
                self.state[p] = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
        means = [self.state[p]["exp_avg"] for p in parameters]
        squares = [self.state[p]["exp_avg_sq"] for p in parameters]
        gradient = _flat([p.grad for p in parameters if p.grad is not None])
        weight, mean, square = _flat(parameters), _flat(means), _flat(squares)
        (first, second), steps = group["betas"], group["steps"]
        mean.lerp_(gradient, 1.0 - first)
        square.lerp_(gradient.square_(), 1.0 - second)
        scale = square.div(1.0 - second**steps).sqrt_().add_(group["eps"])
        weight.mul_(1.0 - group["lr"] * group["weight_decay"])
        weight.addcdiv_(mean, scale, value=-group["lr"] / (1.0 - first**steps))
        for exact, tensors in ((weight, parameters), (mean, means), (square, squares)):
            _store(tensors, stochastically(exact, bits))


def stochastically(exact: Tensor, bits: torch.Generator) -> Tensor:
    """fp32 numbers rounded to bf16 values, up with the probability of what is cut off. Changes its argument.

    bf16 is the upper half of fp32: a random number of 16 bits added to the lower half carries with the right chance.
    """
    raw = exact.view(torch.int32)
    raw += torch.randint(1 << 16, raw.shape, dtype=torch.int32, device=raw.device, generator=bits)
    raw &= -(1 << 16)
    return exact


def _flat(tensors: list[Tensor]) -> Tensor:
    return torch.cat([t.flatten() for t in tensors]).float()


def _store(tensors: list[Tensor], flat: Tensor) -> None:
    parts = flat.split([t.numel() for t in tensors])
    torch._foreach_copy_(tensors, [part.view(t.shape) for part, t in zip(parts, tensors, strict=True)])


def workspace(shapes: Sequence[torch.Size]) -> int:
    """Numbers of two bytes that a step holds for a moment: six copies in fp32 of what is updated together."""
    return 12 * min(sum(shape.numel() for shape in shapes), TOGETHER)


def _together(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one device, of at most TOGETHER elements (or one tensor)."""
    some: list[Tensor] = []
    for p in parameters:
        if some and (p.device != some[0].device or sum(t.numel() for t in some) + p.numel() > TOGETHER):
            yield some
            some = []
        some.append(p)
    if some:
        yield some
