"""Steps on weights that are kept in bf16: computed in fp32, and rounded up or down by chance, right on average.

Nearest rounding would lose every change below 2^-9 of a number: small steps, weight decay, and the decay of a second
moment, which then never shrinks. Stochastic rounding keeps them in expectation. Its random bits are a function of the
seed, the tensor and how many steps that has taken, so that a resumed run rounds alike, and so does one that steps on
some tensors after the others.
"""

from collections.abc import Iterator, Sequence
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from sdxl_trainer import keyed, sharding

# Elements that are updated together: few launches, and fp32 copies of no more than this.
TOGETHER = 1 << 25
# Key in a tensor's state: how many steps it has taken.
STEPS = "rounded"


def rounded(inner: Any, seed: int, narrow: Sequence[str] = ()) -> Any:
    """The class of optimizers `inner`, whose steps on bf16 weights are those on fp32 copies, rounded. State is as for
    fp32 weights, but that what `narrow` names is kept in bf16 and rounded as well."""

    class Rounded(inner):
        rounds = True
        param_groups: list[dict[str, Any]]

        @cached_property
        def _called(self) -> dict[Tensor, tuple[int, str]]:
            """Number and name of each tensor."""
            pairs = [pair for g in self.param_groups for pair in zip(g["params"], g["names"], strict=True)]
            return {p: (number, name) for number, (p, name) in enumerate(pairs)}

        @torch.no_grad()
        def step(self, closure: None = None) -> None:
            for group in self.param_groups:
                for some in _together([p for p in group["params"] if p.grad is not None]):
                    self._step(group, some)

        def _step(self, group: dict[str, Any], some: list[Tensor]) -> None:
            """Let `inner` see copies of some tensors, and no others: it need not look for them among all."""
            groups, own = self.param_groups, {"params": group["params"], "names": group["names"]}
            called = [self._called[p] for p in some]
            exact, before = _lent(self.state, some, narrow)
            self.param_groups = [group]
            group.update(params=exact, names=[name for _, name in called])
            super().step()
            group.update(own)
            self.param_groups = groups
            keys = _keys(seed, [number for number, _ in called], before, 1 + len(narrow))
            _returned(self.state, some, exact, before, narrow, keys)

    Rounded.__name__ = inner.__name__
    return Rounded


def _lent(state: Any, some: list[Tensor], narrow: Sequence[str]) -> tuple[list[Tensor], list[dict[str, Any]]]:
    """Copies of tensors in fp32, which take over gradients and state; and the state as it was."""
    exact, before = _wide(some), [state.pop(p, {}) for p in some]
    for copy, gradient in zip(exact, _wide([p.grad for p in some if p.grad is not None]), strict=True):
        copy.grad = gradient
    begun = [(copy, kept) for copy, kept in zip(exact, before, strict=True) if kept]
    for copy, kept in begun:
        state[copy] = dict(kept)
    for key in narrow:
        for (copy, _), value in zip(begun, _wide([kept[key] for _, kept in begun]), strict=True):
            state[copy][key] = value
    return exact, before


def _returned(
    state: Any,
    some: list[Tensor],
    exact: list[Tensor],
    before: list[dict[str, Any]],
    narrow: Sequence[str],
    keys: list[list[int]],
) -> None:
    """Give weights and state back from the copies, rounded where they are kept in bf16."""
    for p, copy, kept in zip(some, exact, before, strict=True):
        copy.grad = None  # makes room for the random bits
        state[p] = state.pop(copy, {}) | {STEPS: kept.get(STEPS, 0) + 1}
    _store(some, exact, keys[0])
    for key, own in zip(narrow, keys[1:], strict=True):
        values = [state[p][key] for p in some]
        for p, kept, value in zip(some, before, values, strict=True):
            state[p][key] = kept[key] if kept else torch.empty_like(value, dtype=torch.bfloat16)
        _store([state[p][key] for p in some], values, own)


def _keys(seed: int, numbers: list[int], before: list[dict[str, Any]], count: int) -> list[list[int]]:
    """Keys of the random bits of each tensor, for `count` uses."""
    drawn = [
        keyed.generator(seed, "rounding", number, kept.get(STEPS, 0)).integers(1 << 63, size=count).tolist()
        for number, kept in zip(numbers, before, strict=True)
    ]
    return list(map(list, zip(*drawn, strict=True)))


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    made = [torch.empty_like(t, dtype=torch.float32) for t in tensors]
    if tensors:
        torch._foreach_copy_([sharding.local(t) for t in made], [sharding.local(t) for t in tensors])
    return made


def _store(tensors: list[Tensor], exact: list[Tensor], keys: list[int]) -> None:
    """Write fp32 numbers, which are changed, to bf16 tensors. All processes that share a tensor draw the same bits."""
    bits = torch.Generator(exact[0].device)
    noise = [sharding.like(_noise(t.shape, bits.manual_seed(key)), t) for t, key in zip(exact, keys, strict=True)]
    parts = [sharding.local(t) for t in exact]
    stochastically(parts, [sharding.local(t) for t in noise])
    torch._foreach_copy_([sharding.local(t) for t in tensors], parts)


def _noise(shape: torch.Size, bits: torch.Generator) -> Tensor:
    return torch.randint(1 << 16, shape, dtype=torch.int32, device=bits.device, generator=bits)


def stochastically(exact: list[Tensor], noise: list[Tensor]) -> None:
    """Round fp32 numbers to bf16 values, up with the probability of what is cut off.

    bf16 is the upper half of fp32: a random number of 16 bits added to the lower half carries with the right chance.
    What is no number stays so: GPUs write it as the largest integer, which any carry would make -0.
    """
    raw = [t.view(torch.int32) for t in exact]
    torch._foreach_clamp_max_(raw, 0x7FFF0000)
    torch._foreach_add_(raw, noise)
    for part in raw:
        part &= -(1 << 16)


def copies(shapes: Sequence[torch.Size], narrow: int, most: float) -> int:
    """Numbers in fp32 that are there for a moment: weights, gradients (later random bits) and `narrow` tensors of state
    of what is updated together, which are no more than `most`."""
    largest = max((shape.numel() for shape in shapes), default=0)
    every = sum(shape.numel() for shape in shapes)
    return (2 + narrow) * int(min(every, max(TOGETHER, largest), most))


def _together(parameters: list[Tensor]) -> Iterator[list[Tensor]]:
    """Runs of tensors of one device, of at most TOGETHER elements (or one tensor)."""
    some, size = list[Tensor](), 0
    for p in parameters:
        if some and (p.device != some[0].device or size + p.numel() > TOGETHER):
            yield some
            some, size = [], 0
        some.append(p)
        size += p.numel()
    if some:
        yield some
