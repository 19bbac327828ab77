"""Timesteps: exact densities, and draws of a step that fill 0..1 evenly whoever makes them."""

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from sdxl_trainer import timesteps
from sdxl_trainer.config import Timesteps
from sdxl_trainer.errors import UserError

# density -> (options, draws of a share of the schedule made otherwise)
DRAWN: dict[str, tuple[dict[str, Any], Callable[[np.random.Generator, int], np.ndarray]]] = {
    "uniform": ({}, lambda g, n: g.random(n)),
    "logit_normal": ({"location": -0.4, "scale": 1.3}, lambda g, n: 1 / (1 + np.exp(-g.normal(-0.4, 1.3, n)))),
    "beta": ({"alpha": 0.6, "beta": 1.7}, lambda g, n: g.beta(0.6, 1.7, n)),
    "cubic": ({}, lambda g, n: 1 - g.random(n) ** 3),
    "cubic_earlier": ({}, lambda g, n: g.random(n) ** 3),
}


def one_by_one(options: Timesteps, count: int) -> np.ndarray:
    clock = timesteps.clock(options, 1000, 4)
    return np.array([clock.draw(1, 0, 0, [sample])[sample] for sample in range(count)])


def chi_square(counts: np.ndarray, expected: np.ndarray) -> float:
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("density", DRAWN)
def test_densities_are_those_of_independent_draws(density: str) -> None:
    options, draw = DRAWN[density]
    found = timesteps.probabilities(Timesteps(density=density, **options), 1000)
    assert found.sum() == pytest.approx(1.0, abs=1e-12)
    count = 400_000
    drawn = (draw(np.random.default_rng(0), count) * 1000).astype(int).clip(0, 999)
    bins = found.reshape(25, 40).sum(axis=1) * count
    assert chi_square(np.bincount(drawn // 40, minlength=25), bins) < 75  # of 24 degrees: p = 4e-7


def test_sigmoid_has_its_density() -> None:
    x = (np.arange(1000) + 0.5) / 1000
    density = 1 / (1 + np.exp(-5.0 * (x - 0.3)))
    found = timesteps.probabilities(Timesteps(density="sigmoid", slope=5.0, midpoint=0.3), 1000)
    np.testing.assert_allclose(found, density / density.sum(), rtol=1e-5)
    falling = timesteps.probabilities(Timesteps(density="sigmoid", slope=-5.0, midpoint=0.7), 1000)
    np.testing.assert_allclose(falling, found[::-1], rtol=1e-9)


@pytest.mark.parametrize("options", [{}, {"density": "cubic"}, {"density": "logit_normal", "sampling": "stratified"}])
def test_keyed_draws_have_the_probabilities(options: dict[str, Any]) -> None:
    clock = timesteps.clock(Timesteps(**options), 1000, 4)
    drawn = [t for step in range(5000) for t in clock.draw(3, step, 0, range(4 * step, 4 * step + 4)).values()]
    counts = np.bincount(np.array(drawn) // 50, minlength=20)
    expected = clock.probabilities.reshape(20, 50).sum(axis=1) * 20_000
    kept = expected > 5
    assert chi_square(counts[kept], expected[kept]) < 65  # of 19 degrees: p = 7e-7


@pytest.mark.parametrize(
    ("options", "favoured"),
    [
        (Timesteps(bias="later", multiplier=2.0), slice(750, 1000)),
        (Timesteps(bias="earlier", multiplier=2.0), slice(0, 250)),
        (Timesteps(bias="range", multiplier=2.0, begin=100, end=350), slice(100, 350)),
        (Timesteps(bias="later", multiplier=3.0, portion=0.0001), slice(999, 1000)),
        (Timesteps(bias="range", multiplier=0.5, begin=0, end=1000), slice(0, 1000)),
        (Timesteps(density="cubic", bias="earlier", multiplier=4.0), slice(0, 250)),
    ],
)
def test_biased_timesteps_have_the_asked_probabilities(options: Timesteps, favoured: slice) -> None:
    weights = timesteps.probabilities(Timesteps(density=options.density), 1000)
    weights[favoured] *= options.multiplier
    clock = timesteps.clock(options, 1000, 4)
    np.testing.assert_allclose(clock.probabilities, weights / weights.sum(), rtol=1e-9)
    np.testing.assert_allclose(np.diff(clock.cumulative, prepend=0.0), clock.probabilities, atol=1e-12)
    assert clock.cumulative[-1] == 1.0


def test_a_range_past_the_schedule_is_refused() -> None:
    timesteps.refuse(Timesteps(bias="range", end=1000), 1000)
    with pytest.raises(UserError, match="after the last of the base's 1000 timesteps"):
        timesteps.refuse(Timesteps(bias="range", end=1001), 1000)


@pytest.mark.parametrize("density", ["logit_normal", "sigmoid", "beta", "cubic"])
def test_importance_weights_make_the_mean_that_of_uniform_timesteps(density: str) -> None:
    clock = timesteps.clock(Timesteps(density=density, importance=True), 1000, 4)
    losses = np.exp(np.linspace(0, -3, 1000))
    mean = sum(p * clock.weight(t) * losses[t] for t, p in enumerate(clock.probabilities) if p > 0)
    assert mean == pytest.approx(losses.mean(), rel=1e-9)
    assert timesteps.clock(Timesteps(density=density), 1000, 4).weight(10) == 1.0


@pytest.mark.parametrize("count", [2, 5, 8, 64])
def test_stratified_draws_hit_each_part_of_a_step_once(count: int) -> None:
    clock = timesteps.clock(Timesteps(sampling="stratified"), 1 << 20, count)
    seen = []
    for step in range(40):
        drawn = np.array(list(clock.draw(0, step, step, range(7, 7 + count)).values()))
        assert sorted((drawn / (1 << 20) * count).astype(int)) == list(range(count))
        seen.append(drawn)
    # Whoever is first in the batch is not always in the same part, and not always at the same place in it.
    assert len({int(d[0] / (1 << 20) * count) for d in seen}) > 1
    assert len({int(d[0]) for d in seen}) == 40


def test_sobol_is_pytorch_s_sequence_with_shifted_digits() -> None:
    uniforms = [u for step in range(16) for u in timesteps.SPREADS["sobol"](5, step, 0, range(4), 4)]
    digits = [int(u * (1 << 52)) for u in uniforms]
    unshifted = sorted((d ^ digits[0]) / (1 << 52) for d in digits)
    assert unshifted == sorted(torch.quasirandom.SobolEngine(1).draw(64, dtype=torch.float64).flatten().tolist())
    for size in (4, 8, 16, 32):  # any aligned block of 2^m images, over steps, has one in each of 2^m parts
        for begin in range(0, 64, size):
            assert sorted(int(u * size) for u in uniforms[begin : begin + size]) == list(range(size))
    assert uniforms[:4] == timesteps.SPREADS["sobol"](5, 0, 9, range(50, 54), 4)
    assert uniforms[:4] != timesteps.SPREADS["sobol"](6, 0, 0, range(4), 4)


def test_a_step_is_drawn_whole_and_again_the_same() -> None:
    for sampling in timesteps.SPREADS:
        clock = timesteps.clock(Timesteps(sampling=sampling), 1000, 6)
        assert clock.draw(2, 11, 1, range(6)) == clock.draw(2, 11, 1, range(6))
        assert clock.draw(2, 11, 1, range(6)) != clock.draw(3, 11, 1, range(6))


def test_plain_timesteps_are_uniform_over_all() -> None:
    counts = np.bincount(one_by_one(Timesteps(), 20_000) // 100, minlength=10)
    assert np.abs(counts - 2000).max() < 5 * np.sqrt(2000)
