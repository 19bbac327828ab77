"""The random draws of one training sample: each a pure function of (seed, epoch, sample). Made on the CPU in fp32,
so that every device and every number of processes trains on the same numbers."""

import numpy as np

from sdxl_trainer import keyed
from sdxl_trainer.config import Timesteps
from sdxl_trainer.errors import UserError


def normal(seed: int, purpose: str, epoch: int, sample: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, fp32."""
    return keyed.generator(seed, purpose, epoch, sample).standard_normal(shape, dtype=np.float32)


def draw(seed: int, epoch: int, sample: int, shape: tuple[int, ...], offset: float = 0.0) -> np.ndarray:
    """The noise of one sample, [C, h, w] fp32, plus `offset` times one number per channel ("offset noise")."""
    noise = normal(seed, "noise", epoch, sample, shape)
    if offset:
        noise += np.float32(offset) * normal(seed, "offset", epoch, sample, (shape[0], 1, 1))
    return noise


def cumulative(options: Timesteps, count: int) -> np.ndarray:
    """Cumulative probabilities [T] of the timesteps 0..T-1: uniform, with a favoured part drawn more often."""
    weights = np.ones(count, dtype=np.float64)
    if options.bias == "range":
        if options.end > count:
            what = f"timesteps.end = {options.end} is past the schedule's {count} timesteps"
            raise UserError(what, "timesteps.end", f"use at most {count} (the timestep after the last one)")
        favoured = slice(options.begin, options.end)
    else:
        size = max(1, int(options.portion * count))
        favoured = {"none": slice(0, 0), "earlier": slice(0, size), "later": slice(count - size, None)}[options.bias]
    weights[favoured] *= options.multiplier
    total = np.cumsum(weights)
    return total / total[-1]


def timestep(seed: int, epoch: int, sample: int, probabilities: np.ndarray) -> int:
    """The timestep of one sample, by inverting the cumulative probabilities [T]."""
    uniform = keyed.generator(seed, "timestep", epoch, sample).random()
    return int(np.searchsorted(probabilities, uniform, side="right"))
