"""Exponential moving average of the learning tensors, in fp32."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

from sdxl_trainer import sharding
from sdxl_trainer.optim import rounding
from sdxl_trainer.parameters import Group


@dataclass
class Ema:
    """`averages` by parameter name; `updates` counts the optimizer steps that went in."""

    decay: float
    names: list[str]
    parameters: list[Tensor]
    averages: list[Tensor]
    updates: int = 0

    @torch.no_grad()
    def update(self) -> None:
        self.updates += 1
        weight, averages = 1.0 - self.decay_now(), iter(self.averages)
        for some in rounding.together(self.parameters):  # of narrow weights no more copies than these at once
            torch._foreach_lerp_(list(islice(averages, len(some))), [p.float() for p in some], weight)

    def decay_now(self) -> float:
        """Warm-up rule of the reference: 0 at first, then (1 + n) / (10 + n) up to `decay`."""
        n = self.updates - 1
        return 0.0 if n <= 0 else min(self.decay, (1 + n) / (10 + n))

    @contextmanager
    def swapped_in(self) -> Iterator[None]:
        """The model with averaged weights; the raw ones are back afterwards, bit by bit. Meanwhile fp32 weights lie
        where their averages did, and only narrower ones take memory of their own."""
        narrow = [(p, a) for p, a in zip(self.parameters, self.averages, strict=True) if p.dtype != a.dtype]
        raw = [p.detach().clone() for p, _ in narrow]
        self._exchange([a for _, a in narrow])
        try:
            yield
        finally:
            self._exchange(raw)

    @torch.no_grad()
    def _exchange(self, narrow: Sequence[Tensor]) -> None:
        """Weights and averages of one type change places, tensor by tensor; other weights become those of `narrow`."""
        others = iter(narrow)
        for parameter, average in zip(self.parameters, self.averages, strict=True):
            if parameter.dtype != average.dtype:
                parameter.copy_(next(others))
                continue
            value = parameter.detach().clone()
            parameter.copy_(average)
            average.copy_(value)

    def state(self) -> dict[str, Tensor]:
        return dict(zip(self.names, self.averages, strict=True))

    def load(self, averages: dict[str, Tensor], updates: int) -> None:
        if averages.keys() != set(self.names):
            raise KeyError(f"averages of other tensors: {sorted(averages.keys() ^ set(self.names))[:3]}")
        self.averages = [sharding.like(averages[n], a).to(a) for n, a in zip(self.names, self.averages, strict=True)]
        self.updates = updates


def make(groups: Sequence[Group], decay: float) -> Ema:
    names = [name for group in groups for name in group.names]
    parameters: list[Tensor] = [p for group in groups for p in group.parameters]
    return Ema(decay, names, parameters, [p.detach().float().clone() for p in parameters])
