"""Adafactor against PyTorch's own."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from sdxl_trainer.optim import adafactor
from sdxl_trainer.optim.adafactor import Adafactor

# Of shapes that a model has, and of numbers that are as large as weights, tiny, or nothing.
SHAPES = [((7, 5), 1.0), ((3, 4, 3, 3), 0.1), ((6,), 1e-4), ((6,), 0.0), ((1,), 1.0), ((5, 9), 1.0), ((), 1.0)]


def parameters() -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=draw) * size) for shape, size in SHAPES]


@pytest.mark.parametrize(
    ("arguments", "together"),
    [
        ({}, 1 << 24),
        ({}, 60),
        ({"foreach": True}, 60),
        ({"foreach": False, "weight_decay": 0.1, "beta2_decay": -0.6}, 1 << 24),
        ({"maximize": True, "d": 1.5, "eps": (1e-8, 1e-2)}, 1 << 24),
    ],
)
def test_its_steps_are_those_of_pytorch(
    arguments: dict[str, Any], together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(adafactor, "TOGETHER", together)
    ours, theirs = parameters(), parameters()
    pair = [
        kind(tensors, lr=1e-2, **arguments) for kind, tensors in ((Adafactor, ours), (torch.optim.Adafactor, theirs))
    ]
    draw = torch.Generator().manual_seed(1)
    for number in range(6):
        for p, q in zip(ours, theirs, strict=True):
            p.grad = torch.randn(p.shape, generator=draw) * 10.0 ** (number - 3)
            q.grad = p.grad.clone()
        ours[0].grad = theirs[0].grad = None if number == 2 else ours[0].grad
        for optimizer in pair:
            optimizer.step()
    for p, q in zip(ours, theirs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-9)
        for key, value in pair[1].state[q].items():
            found: Tensor = pair[0].state[p][key]
            torch.testing.assert_close(found, value, rtol=1e-6, atol=1e-30)
