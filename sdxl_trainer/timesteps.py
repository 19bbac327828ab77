"""Which timesteps are drawn how often, and how the draws of a step are spread: pure functions of keys (law 1)."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from sdxl_trainer import keyed
from sdxl_trainer.config import Timesteps
from sdxl_trainer.errors import UserError


def _logit_normal(x: np.ndarray, options: Timesteps) -> np.ndarray:
    """The logistic function of a normal number (Esser et al. 2024, section 3.1)."""
    with np.errstate(divide="ignore"):
        z = (np.log(x) - np.log1p(-x) - options.location) / options.scale
    return np.array([0.5 * math.erfc(-value / math.sqrt(2.0)) for value in z])


def _sigmoid(x: np.ndarray, options: Timesteps) -> np.ndarray:
    """Density 1 / (1 + exp(-slope (x - midpoint))): rising (or with a negative slope falling) from end to end."""
    area = np.logaddexp(0.0, options.slope * (x - options.midpoint)) / options.slope
    return (area - area[0]) / (area[-1] - area[0])


def _beta(x: np.ndarray, options: Timesteps) -> np.ndarray:
    """Density x^(alpha - 1) (1 - x)^(beta - 1), the beta distribution."""
    from mpmath import betainc

    return np.array([float(betainc(options.alpha, options.beta, 0, float(e), regularized=True)) for e in x])


# Probability that the share x in 0..1 of the schedule's timesteps is not exceeded.
DENSITIES: dict[str, Callable[[np.ndarray, Timesteps], np.ndarray]] = {
    "uniform": lambda x, options: x,
    "logit_normal": _logit_normal,
    "sigmoid": _sigmoid,
    "beta": _beta,
    # Of a uniform u: 1 - u^3, for the noisy end (Mou et al. 2023, section 3.3), and u^3, for the other.
    "cubic": lambda x, options: 1.0 - np.cbrt(1.0 - x),
    "cubic_earlier": lambda x, options: np.cbrt(x),
}


def refuse(options: Timesteps, count: int) -> None:
    """UserError for a range that goes beyond a schedule of that many timesteps."""
    if options.bias == "range" and options.end > count:
        what = f"timesteps.end = {options.end} is after the last of the base's {count} timesteps"
        raise UserError(what, "timesteps.end", f"give at most {count}")


def probabilities(options: Timesteps, count: int) -> np.ndarray:
    """How often each of the timesteps 0..T-1 is drawn, [T]: the density, with a favoured part drawn more often."""
    if options.density == "uniform":
        weights = np.ones(count)
    else:
        weights = np.diff(DENSITIES[options.density](np.linspace(0.0, 1.0, count + 1), options))
    if options.bias == "range":
        favoured = slice(options.begin, options.end)
    else:
        size = max(1, int(options.portion * count))
        favoured = {"none": slice(0, 0), "earlier": slice(0, size), "later": slice(count - size, None)}[options.bias]
    weights[favoured] *= options.multiplier
    return weights / weights.sum()


def _independent(seed: int, step: int, epoch: int, samples: Sequence[int], batch_size: int) -> list[float]:
    return [keyed.generator(seed, "timestep", epoch, sample).random() for sample in samples]


def _stratified(seed: int, step: int, epoch: int, samples: Sequence[int], batch_size: int) -> list[float]:
    """One number in each of n equal parts of 0..1, n being the samples of the step."""
    strata = keyed.generator(seed, "strata", 0, step).permutation(len(samples))
    within = _independent(seed, step, epoch, samples, batch_size)
    count, pairs = len(samples), zip(strata.tolist(), within, strict=True)
    # Rounding could reach the next part, or 1.
    return [min((k + u) / count, math.nextafter((k + 1) / count, 0.0)) for k, u in pairs]


def _sobol(seed: int, step: int, epoch: int, samples: Sequence[int], batch_size: int) -> list[float]:
    """The first dimension of Sobol's sequence over all images of the run, digits shifted by the seed: of any aligned
    2^m images one lies in each of 2^m equal parts."""
    shift = int(keyed.generator(seed, "strata", 1, 0).integers(1 << 52))
    first = step * batch_size
    reversed_bits = [int(f"{index:052b}"[::-1], 2) for index in range(first, first + len(samples))]
    return [(bits ^ shift) / (1 << 52) for bits in reversed_bits]


# One number in 0..1 for each sample of a step: (seed, step, epoch, samples, batch_size).
SPREADS: dict[str, Callable[[int, int, int, Sequence[int], int], list[float]]] = {
    "independent": _independent,
    "stratified": _stratified,
    "sobol": _sobol,
}


@dataclass(frozen=True)
class Clock:
    """Draws the timesteps of a step's samples and tells how much they weigh. `probabilities`, `cumulative`: [T]."""

    options: Timesteps
    probabilities: np.ndarray
    cumulative: np.ndarray
    batch_size: int

    def draw(self, seed: int, step: int, epoch: int, samples: Sequence[int]) -> dict[int, int]:
        """The timestep of each sample of a whole step (of all processes), by inverting the cumulative probabilities."""
        uniform = SPREADS[self.options.sampling](seed, step, epoch, samples, self.batch_size)
        found = np.searchsorted(self.cumulative, uniform, side="right")
        return dict(zip(samples, found.tolist(), strict=True))

    def weight(self, timestep: int) -> float:
        """Factor on the loss: with `importance` 1 / how much more often than uniformly the timestep is drawn."""
        return 1.0 / (len(self.probabilities) * self.probabilities[timestep]) if self.options.importance else 1.0


def clock(options: Timesteps, count: int, batch_size: int) -> Clock:
    """For a schedule of `count` timesteps and steps of at most `batch_size` images."""
    found = probabilities(options, count)
    total = np.cumsum(found)
    return Clock(options, found, total / total[-1], batch_size)
