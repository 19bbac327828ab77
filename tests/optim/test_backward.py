"""Steps in the backward pass: the same bits as with all gradients at hand, and no more of them than said."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from sdxl_trainer import optim
from sdxl_trainer.config import STEP_APART, Optimizer
from sdxl_trainer.optim import backward
from sdxl_trainer.parameters import Group


def network() -> nn.Module:
    torch.manual_seed(0)
    layers = [layer for _ in range(20) for layer in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 3))


def optimizer_of(model: nn.Module, name: str) -> Any:
    names, tensors = zip(*model.named_parameters(), strict=True)
    options = Optimizer(name=name, arguments={"min_8bit_size": 16} if name == "adamw8bit" else {})
    return optim.make([Group(".*", 1e-2, 0.1, names, tensors)], options)


def passes(model: nn.Module, seed: int) -> Callable[[], torch.Tensor]:
    given = torch.randn(4, 32, generator=torch.Generator().manual_seed(seed)).to(next(model.parameters()).dtype)

    def run() -> torch.Tensor:
        loss = (model(given).square().sum()) * 100.0**seed
        loss.backward()
        return loss.detach()

    return run


BOTH = [(name, dtype) for name in STEP_APART for dtype in (torch.float32, torch.bfloat16)]


@pytest.mark.parametrize(("name", "dtype"), [both for both in BOTH if both != ("adamw_bf16", torch.float32)])
@pytest.mark.parametrize("limit", [0.5, None])
def test_steps_are_the_same_bits(name: str, dtype: torch.dtype, limit: float | None) -> None:
    ours = network().to(dtype)
    theirs = copy.deepcopy(ours)
    mine, other = optimizer_of(ours, name), optimizer_of(theirs, name)
    for seed in range(3):
        learning = list(ours.parameters())
        loss, norm = backward.norm(learning, passes(ours, seed))
        assert all(p.grad is None for p in learning)
        backward.step(mine, learning, norm, limit, passes(ours, seed))
        assert all(p.grad is None for p in learning)
        wanted = passes(theirs, seed)()
        assert torch.equal(loss, wanted)
        assert torch.equal(norm, optim.clip(other, list(theirs.parameters()), limit))
        other.step()
        other.zero_grad()
    for a, b in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.equal(a, b)
        assert mine.state[a].keys() == other.state[b].keys()
        for key, value in mine.state[a].items():
            torch.testing.assert_close(value, other.state[b][key], rtol=0, atol=0)


def test_few_gradients_are_there_at_once() -> None:
    model = network()
    learning, most = list(model.parameters()), 0
    every = sum(p.numel() for p in learning)

    class Watched:
        def step(self) -> None:
            nonlocal most
            most = max(most, sum(p.numel() for p in learning if p.grad is not None))

    backward.step(Watched(), learning, torch.ones(()), None, passes(model, 0))
    assert 0 < most <= every / backward.PARTS + max(p.numel() for p in learning)


class Scaled:
    """Passes in fp16 under a loss scaler."""

    def __init__(self, model: nn.Module, scale: float) -> None:
        self.model, self.scaler = model, torch.amp.GradScaler("cpu", init_scale=scale, growth_interval=2)

    def __call__(self) -> Any:
        given = torch.randn(4, 32, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", torch.float16):
            loss = self.model(given).float().square().sum()
        self.scaler.scale(loss).backward()
        return loss.detach()


def test_under_a_loss_scaler_steps_are_the_same_and_overflow_skips_one() -> None:
    ours = network()
    theirs = copy.deepcopy(ours)
    mine, other = optimizer_of(ours, "adafactor"), optimizer_of(theirs, "adafactor")
    one, two = Scaled(ours, 2.0**24), Scaled(theirs, 2.0**24)
    scales, skipped = [], 0
    for _ in range(16):
        learning = list(ours.parameters())
        share = 1.0 / one.scaler.get_scale()
        _, norm = backward.norm(learning, one, share)
        if torch.isfinite(norm):
            backward.step(mine, learning, norm, 0.5, one, share)
        else:
            skipped += 1
        backward.adjust(one.scaler, norm)
        two()
        two.scaler.unscale_(other)
        optim.clip(other, list(theirs.parameters()), 0.5)
        two.scaler.step(other)
        two.scaler.update()
        other.zero_grad()
        scales.append(one.scaler.get_scale())
        assert scales[-1] == two.scaler.get_scale()
        assert all(torch.equal(a, b) for a, b in zip(ours.parameters(), theirs.parameters(), strict=True))
    assert 0 < skipped < 16
    assert max(scales) > min(scales)
