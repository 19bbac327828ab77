"""The noise of training samples, each a pure function of (seed, epoch, sample). Made on the CPU in fp32, so that every
device and every number of processes trains on the same numbers."""

import math
from collections.abc import Callable, Sequence
from functools import partial

import numpy as np
import torch
from torch import Tensor

from sdxl_trainer import keyed
from sdxl_trainer.config import Objective

Key = tuple[int, int, int]  # seed, epoch, sample


def normal(seed: int, purpose: str, epoch: int, sample: int, shape: tuple[int, ...]) -> np.ndarray:
    """Standard normal numbers, fp32."""
    return keyed.generator(seed, purpose, epoch, sample).standard_normal(shape, dtype=np.float32)


def normals(purpose: str, keys: Sequence[Key], shape: tuple[int, ...]) -> Tensor:
    """Standard normal numbers of each sample, fp32 [B, ...]: those of `normal`, drawn where they stay."""
    drawn = np.empty((len(keys), *shape), dtype=np.float32)
    for (seed, epoch, sample), row in zip(keys, drawn, strict=True):
        keyed.generator(seed, purpose, epoch, sample).standard_normal(out=row, dtype=np.float32)
    return torch.from_numpy(drawn)


def draw(keys: Sequence[Key], latents: Callable[[int], Tensor], shape: tuple[int, ...], options: Objective) -> Tensor:
    """The noise that the model is to find, fp32 [B, C, h, w]; `latents` makes those of a row [C, h, w] if asked."""
    noise = normals("noise", keys, shape)
    for name, change in NOISES.items():
        if getattr(options, name):
            for row, key in enumerate(keys):
                noise[row] = change(noise[row], key, partial(latents, row), options)
    return noise


def _pyramid(noise: Tensor, key: Key, latents: Callable[[], Tensor], options: Objective) -> Tensor:
    """Coarser and coarser noise on top, each level weaker by the discount, all scaled back to unit variance (Whitaker
    2023, "multi-resolution noise"; sizes as in sd-scripts). The first level is of full size and strength: a second one
    like `noise`, in the sum with which nothing but its deviation is another."""
    seed, epoch, sample = key
    generator = keyed.generator(seed, "pyramid", epoch, sample)
    channels, height, width = noise.shape
    total = math.sqrt(2.0) * noise
    for level in range(1, options.pyramid_levels):
        scale = generator.uniform(2.0, 4.0) ** level
        coarse = (max(1, int(height / scale)), max(1, int(width / scale)))
        numbers = torch.from_numpy(generator.standard_normal((1, channels, *coarse), dtype=np.float32))
        larger = torch.nn.functional.interpolate(numbers, (height, width), mode="bilinear", align_corners=False)[0]
        total += options.pyramid_discount**level * larger
        if 1 in coarse:
            break
    return total / total.std(correction=0)


def _offset(noise: Tensor, key: Key, latents: Callable[[], Tensor], options: Objective) -> Tensor:
    """One number per channel on top (Guttenberg 2023). Its strength may be drawn anew each time, from 0 to the given,
    and may grow with the picture's own mean."""
    seed, epoch, sample = key
    strength = options.noise_offset * _share(key, "offset_strength", options.noise_offset_random)
    strengths = torch.full(noise.shape[:1], strength)
    if options.noise_offset_adaptive:
        strengths += options.noise_offset_adaptive * latents().mean(dim=(1, 2)).abs()
    shift = torch.from_numpy(normal(seed, "offset", epoch, sample, (noise.shape[0],)))
    return noise + (strengths * shift)[:, None, None]


# Option that turns it on -> what it does to the noise, in this order.
NOISES: dict[str, Callable[[Tensor, Key, Callable[[], Tensor], Objective], Tensor]] = {
    "pyramid_levels": _pyramid,
    "noise_offset": _offset,
}


def perturbation(keys: Sequence[Key], shape: tuple[int, ...], options: Objective) -> Tensor | None:
    """What is added to the noise that the model sees, and not to what it is to find (Ning et al. 2023); fp32
    [B, C, h, w]."""
    if not options.input_perturbation:
        return None
    drawn = normals("perturbation", keys, shape)
    for row, key in zip(drawn, keys, strict=True):
        row *= options.input_perturbation * _share(key, "perturbation_strength", options.input_perturbation_random)
    return drawn


def _share(key: Key, purpose: str, random: bool) -> float:
    seed, epoch, sample = key
    return float(np.float32(keyed.generator(seed, purpose, epoch, sample).random())) if random else 1.0
