"""Learning rates: a base rate times a pure function of the step (law 6)."""

import math
from collections.abc import Callable

import torch

from sdxl_trainer.config import LearningRate


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> None:
    """Set every group's rate to its base rate times `factor`."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor


def factor(options: LearningRate, step: int, steps: int) -> float:
    """Factor on the base rate at optimizer step `step` (from 0) of `steps`; the shapes of diffusers.optimization.

    A constant rate with a cooldown (Hagele et al. 2024, arXiv:2405.18392) does not depend on `steps` before it, so
    that a longer run begins with the very steps of a shorter one.
    """
    if options.name == "constant":
        return 1.0
    if step < options.warmup_steps:
        return step / max(1, options.warmup_steps)
    if steps - step < options.cooldown_steps:
        return (steps - step) / options.cooldown_steps
    progress = (step - options.warmup_steps) / max(1, steps - options.warmup_steps)
    return SHAPES[options.name](min(progress, 1.0), options)


def _cosine_with_restarts(progress: float, options: LearningRate) -> float:
    if progress >= 1.0:
        return 0.0
    return 0.5 * (1.0 + math.cos(math.pi * ((options.cycles * progress) % 1.0)))


# Shape after the warm-up, from progress 0..1.
SHAPES: dict[str, Callable[[float, LearningRate], float]] = {
    "constant_with_warmup": lambda progress, options: 1.0,
    "linear": lambda progress, options: 1.0 - progress,
    "cosine": lambda progress, options: 0.5 * (1.0 + math.cos(math.pi * progress)),
    "cosine_with_restarts": _cosine_with_restarts,
    "polynomial": lambda progress, options: (1.0 - progress) ** options.power,
}
