"""Steps on weights that are kept in bf16: computed in fp32, and rounded up or down by chance, right on average.

Nearest rounding would lose every change below 2^-9 of a number: small steps, weight decay, and the decay of a second
moment, which then never shrinks. Stochastic rounding keeps them in expectation. Its random bits are a function of the
seed, the tensor and how many steps that has taken, so that a resumed run rounds alike, and so does one that steps on
some tensors after the others.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import torch
from torch import Tensor
from torch._utils import _unflatten_dense_tensors

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
                for some in together([p for p in group["params"] if p.grad is not None]):
                    self._step(group, some)

        def _step(self, group: dict[str, Any], some: list[Tensor]) -> None:
            called = [self._called[p] for p in some]
            exact, widened, before = _lent(self.state, some, narrow)
            with lent(self, group, exact.copies, [name for _, name in called]):
                super().step()
            counts = [kept.get(STEPS, 0) for kept in before]
            drawn = {count: _keys(seed, count, len(self._called), 1 + len(narrow)) for count in set(counts)}
            keys = [drawn[count][number] for count, (number, _) in zip(counts, called, strict=True)]
            _returned(self.state, some, exact, widened, before, narrow, keys)

    Rounded.__name__ = inner.__name__
    return Rounded


@contextmanager
def lent(optimizer: Any, group: dict[str, Any], copies: list[Tensor], names: list[str]) -> Iterator[None]:
    """Let an optimizer see copies in the place of a group's tensors, and no others: it need not look for them among
    all."""
    groups, own = optimizer.param_groups, {"params": group["params"], "names": group["names"]}
    optimizer.param_groups = [group]
    group.update(params=copies, names=names)
    yield
    group.update(own)
    optimizer.param_groups = groups


def _lent(
    state: Any, some: list[Tensor], narrow: Sequence[str]
) -> tuple["Wide", dict[str, "Wide"], list[dict[str, Any]]]:
    """Copies of tensors in fp32, which take over gradients and state; those of narrow state, by name, where all tensors
    have some; and the state as it was."""
    exact, before = Wide.of(some), [state.pop(p, {}) for p in some]
    gradients = Wide.of([p.grad for p in some if p.grad is not None])
    for copy, gradient in zip(exact.copies, gradients.copies, strict=True):
        copy.grad = gradient
    begun = [(copy, kept) for copy, kept in zip(exact.copies, before, strict=True) if kept]
    for copy, kept in begun:
        state[copy] = dict(kept)
    widened = {key: Wide.of([kept[key] for _, kept in begun]) for key in narrow if begun}
    for key, values in widened.items():
        for (copy, _), value in zip(begun, values.copies, strict=True):
            state[copy][key] = value
    return exact, widened if len(begun) == len(some) else {}, before


def _returned(
    state: Any,
    some: list[Tensor],
    exact: "Wide",
    widened: dict[str, "Wide"],
    before: list[dict[str, Any]],
    narrow: Sequence[str],
    keys: list[list[int]],
) -> None:
    """Give weights and state back from the copies, rounded where they are kept in bf16."""
    for p, copy, kept in zip(some, exact.copies, before, strict=True):
        copy.grad = None  # makes room for the random bits
        state[p] = state.pop(copy, {}) | {STEPS: kept.get(STEPS, 0) + 1}
    exact.store(some, [own[0] for own in keys])
    for number, key in enumerate(narrow, start=1):
        values = widened.get(key) or Wide([state[p][key] for p in some], None)
        for p, kept, value in zip(some, before, values.copies, strict=True):
            state[p][key] = kept[key] if kept else torch.empty_like(value, dtype=torch.bfloat16)
        values.store([state[p][key] for p in some], [own[number] for own in keys])


@lru_cache(maxsize=8)
def _keys(seed: int, steps: int, tensors: int, uses: int) -> list[list[int]]:
    """Keys of the random bits of each tensor after so many steps, one for each use."""
    drawn: list[list[int]] = keyed.generator(seed, "rounding", steps).integers(1 << 63, size=(tensors, uses)).tolist()
    return drawn


@dataclass(frozen=True)
class Wide:
    """Copies in fp32. They are parts of one tensor, so that what concerns all is done at once; shards lie apart."""

    copies: list[Tensor]
    whole: Tensor | None

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> "Wide":
        if any(sharding.is_sharded(t) or not t.is_contiguous() for t in tensors):
            made = cls([torch.empty_like(t, dtype=torch.float32) for t in tensors], None)
        else:
            whole = torch.empty(sum(t.numel() for t in tensors), dtype=torch.float32, device=tensors[0].device)
            made = cls(list(_unflatten_dense_tensors(whole, tensors)), whole)
        torch._foreach_copy_(local(made.copies), local(tensors))
        return made

    def store(self, tensors: Sequence[Tensor], keys: Sequence[int]) -> None:
        """Write the numbers, which are changed, to bf16 tensors, rounded by the bits of each tensor's key: all
        processes that share one draw the same."""
        bits = torch.Generator(self.copies[0].device)
        if self.whole is None:
            drawn = [torch.empty(t.shape, dtype=torch.int32, device=t.device) for t in self.copies]
            noise, exact = drawn, local(self.copies)
        else:
            whole = torch.empty_like(self.whole, dtype=torch.int32)
            drawn = list(whole.split([t.numel() for t in self.copies]))
            noise, exact = [whole], [self.whole]
        for part, key in zip(drawn, keys, strict=True):
            part.random_(0, 1 << 16, generator=bits.manual_seed(key))
        if self.whole is None:
            noise = local([sharding.like(part, t) for part, t in zip(drawn, self.copies, strict=True)])
        stochastically(exact, noise)
        torch._foreach_copy_(local(tensors), local(self.copies))


def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [sharding.local(t) for t in tensors]


def stochastically(exact: Sequence[Tensor], noise: list[Tensor]) -> None:
    """Round fp32 numbers to bf16 values, up with the probability of what is cut off.

    bf16 is the upper half of fp32: a random number of 16 bits added to the lower half carries with the right chance.
    What is no number stays so: GPUs write it as the largest integer, which any carry would make -0.
    """
    raw = [t.view(torch.int32) for t in exact]
    torch._foreach_clamp_max_(raw, 0x7FFF0000)
    torch._foreach_add_(raw, noise)
    for part in raw:
        part &= -(1 << 16)


def copies(shapes: Sequence[torch.Size], kinds: int, most: float) -> int:
    """Numbers in fp32 that are there for a moment: so many `kinds` of copies (weights, gradients, narrow state) of what
    is updated together, which is no more than `most`."""
    largest = max((shape.numel() for shape in shapes), default=0)
    every = sum(shape.numel() for shape in shapes)
    return kinds * int(min(every, max(TOGETHER, largest), most))


def together(parameters: Sequence[Tensor], most: float | None = None) -> Iterator[list[Tensor]]:
    """Runs of tensors of one type and device, of at most so many elements (TOGETHER by default), or one tensor."""
    some, size, most = list[Tensor](), 0, TOGETHER if most is None else most
    for p in parameters:
        alike = not some or (p.dtype, p.device) == (some[0].dtype, some[0].device)
        if some and (not alike or size + p.numel() > most):
            yield some
            some, size = [], 0
        some.append(p)
        size += p.numel()
    if some:
        yield some
