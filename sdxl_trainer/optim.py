"""Optimizers and learning rates. A rate is a base rate times a pure function of the step (law 6)."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from sdxl_trainer.config import LearningRate, Optimizer
from sdxl_trainer.errors import UserError
from sdxl_trainer.parameters import Group


def _adamw(groups: list[dict[str, Any]], options: Optimizer) -> torch.optim.Optimizer:
    """Fused: one kernel over all tensors, 3 to 5 times faster than the default, on the CPU too."""
    return torch.optim.AdamW(groups, betas=options.betas, eps=options.eps, fused=True)


def _adamw8bit(groups: list[dict[str, Any]], options: Optimizer) -> torch.optim.Optimizer:
    """Block-wise 8-bit moments (Dettmers et al. 2022)."""
    try:
        from bitsandbytes.optim import AdamW8bit
    except ImportError:
        fix = "pip install bitsandbytes, or choose adamw"
        raise UserError("adamw8bit needs bitsandbytes, which is not installed", "optimizer.name", fix) from None
    return AdamW8bit(groups, betas=options.betas, eps=options.eps)


def _adafactor(groups: list[dict[str, Any]], options: Optimizer) -> torch.optim.Optimizer:
    """Factored second moments, no first (Shazeer & Stern 2018): almost no memory of its own."""
    return torch.optim.Adafactor(groups)


OPTIMIZERS: dict[str, Callable[[list[dict[str, Any]], Optimizer], torch.optim.Optimizer]] = {
    "adamw": _adamw,
    "adamw8bit": _adamw8bit,
    "adafactor": _adafactor,
}


def make(groups: Sequence[Group], options: Optimizer) -> torch.optim.Optimizer:
    """An optimizer whose param_groups keep their rule's `base_lr`."""
    described = [
        {
            "params": list(g.parameters),
            "lr": g.learning_rate,
            "base_lr": g.learning_rate,
            "weight_decay": g.weight_decay,
        }
        for g in groups
    ]
    return OPTIMIZERS[options.name](described, options)


def set_learning_rates(optimizer: torch.optim.Optimizer, factor: float) -> float:
    """Set every group's rate to its base rate times `factor`; gives the first group's."""
    for group in optimizer.param_groups:
        group["lr"] = group["base_lr"] * factor
    return optimizer.param_groups[0]["lr"]


def factor(options: LearningRate, step: int, steps: int) -> float:
    """Factor on the base rate at optimizer step `step` (from 0) of `steps`; the shapes of diffusers.optimization."""
    if options.name == "constant":
        return 1.0
    if step < options.warmup_steps:
        return step / max(1, options.warmup_steps)
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
