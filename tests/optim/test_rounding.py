"""Stochastic rounding: right on average, exact where it can be, and what nearest rounding loses is kept."""

import pytest
import torch
from torch import nn

from sdxl_trainer.optim.rounding import AdamW, stochastically

MANY = 100_000


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(0)


@pytest.mark.parametrize("value", [1.0 + 2**-9, -1.0 - 2**-10, 3e-5, -7.123e-20, 1234.5])
def test_a_number_becomes_one_of_its_two_neighbours_with_its_own_mean(value: float) -> None:
    exact = torch.full((MANY,), value)
    rounded = stochastically(exact.clone(), generator())
    assert torch.equal(rounded, rounded.bfloat16().float())
    low, high = rounded.min().item(), rounded.max().item()
    assert low < exact[0] < high
    assert set(rounded.unique().tolist()) == {low, high}
    share = (value - low) / (high - low)
    deviation = (share * (1 - share) / MANY) ** 0.5
    assert (rounded == high).double().mean().item() == pytest.approx(share, abs=5 * deviation)


def test_numbers_that_bf16_holds_stay() -> None:
    exact = torch.randn(MANY).bfloat16().float()
    assert torch.equal(stochastically(exact.clone(), generator()), exact)


def steps(optimizer: torch.optim.Optimizer, weight: nn.Parameter, gradients: list[float]) -> None:
    for gradient in gradients:
        weight.grad = torch.full_like(weight, gradient)
        optimizer.step()


def test_weight_decay_and_the_second_moment_are_not_lost() -> None:
    """At lr 1e-4 and weight decay 0.1 a step takes 1e-5 of a weight off: bf16's nearest number is the old one."""
    ours, nearest = (nn.Parameter(torch.ones(MANY, dtype=torch.bfloat16)) for _ in range(2))
    settings = {"lr": 1e-4, "weight_decay": 0.1, "betas": (0.0, 0.999)}
    kept = AdamW([{"params": [ours]}], **settings)
    lost = torch.optim.AdamW([nearest], **settings, fused=True)
    gradients = [1.0] + [0.0] * 200
    steps(kept, ours, gradients)
    steps(lost, nearest, gradients)
    expected = (1.0 - 1e-5) ** 201 - 1e-4
    assert ours.double().mean().item() == pytest.approx(expected, abs=2e-4)
    assert nearest.double().mean().item() == 1.0
    assert kept.state[ours]["exp_avg_sq"].double().mean().item() == pytest.approx(1e-3 * 0.999**200, rel=1e-3)


def test_on_average_it_is_adamw_in_fp32() -> None:
    ours = nn.Parameter(torch.full((MANY,), 0.5, dtype=torch.bfloat16))
    theirs = nn.Parameter(torch.full((1,), 0.5))
    gradients = [0.3, -0.1, 0.2, 0.25, -0.05] * 8
    settings = {"lr": 1e-3, "weight_decay": 0.01}
    steps(AdamW([{"params": [ours]}], **settings), ours, gradients)
    steps(torch.optim.AdamW([theirs], **settings), theirs, gradients)
    error = ours.double().std().item() / MANY**0.5
    assert error < 3e-5
    assert ours.double().mean().item() == pytest.approx(theirs.item(), abs=5 * error)


def test_the_bits_are_a_function_of_seed_and_step() -> None:
    def run(seed: int, count: int) -> torch.Tensor:
        weight = nn.Parameter(torch.linspace(-1, 1, 1000).bfloat16())
        steps(AdamW([{"params": [weight]}], lr=1e-3, seed=seed), weight, [0.1] * count)
        return weight.detach()

    assert torch.equal(run(1, 3), run(1, 3))
    assert not torch.equal(run(1, 3), run(2, 3))
