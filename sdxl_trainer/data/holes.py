"""What an inpainting model is to fill: masks that are drawn, and the picture without what they hide.

As crops are, a few masks of each picture are drawn from its bytes and encoded once; which of them a sample has is drawn
in the step, and the posterior sample of the masked picture too (law 3). A row of the cache is fp16 [9, h, w]: the mask,
then mean and standard deviation of the masked picture's latents, unscaled.
"""

from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from sdxl_trainer import keyed, noise, vae
from sdxl_trainer.base import Base
from sdxl_trainer.config import Cache, Inpainting
from sdxl_trainer.data import cache, encode
from sdxl_trainer.data.encode import Keys, Progress, Work
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.data.masks import CELL
from sdxl_trainer.data.pictures import Picture, Pictures
from sdxl_trainer.data.problems import raise_all
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.errors import UserError
from sdxl_trainer.model import LatentScale

# Part of every row's key: raise it when masks would be drawn otherwise.
VERSION = 1


def drawn(target: tuple[int, int], content: int, variant: int, options: Inpainting) -> np.ndarray:
    """What is hidden of a picture, bool [H, W]: all of it, boxes, or strokes of a brush (Suvorov et al. 2022, section
    2.3, draw such). `content` is a number made of the picture's bytes."""
    generator = keyed.generator(0, "hole", variant, content)
    if generator.random() < options.whole:
        return np.ones(target, dtype=bool)
    height, width = target
    image = Image.new("L", (width, height))
    pen = ImageDraw.Draw(image)
    shape = _strokes if generator.random() < options.strokes else _boxes
    shape(pen, generator, height, width)
    return np.asarray(image) > 0


def _boxes(pen: Any, generator: np.random.Generator, height: int, width: int) -> None:
    """One to three, with sides of a tenth to two thirds of the picture's."""
    for _ in range(generator.integers(1, 4)):
        sides = (int(generator.uniform(0.1, 0.67) * height), int(generator.uniform(0.1, 0.67) * width))
        top, left = generator.integers(0, height - sides[0] + 1), generator.integers(0, width - sides[1] + 1)
        pen.rectangle((int(left), int(top), int(left) + sides[1], int(top) + sides[0]), fill=255)


def _strokes(pen: Any, generator: np.random.Generator, height: int, width: int) -> None:
    """One to four, of several turns, as thick as a twentieth to a fifth of the picture."""
    for _ in range(generator.integers(1, 5)):
        thick = max(CELL, int(generator.uniform(0.05, 0.2) * min(height, width)))
        x, y = generator.uniform(0, width), generator.uniform(0, height)
        angle = generator.uniform(0, 2 * np.pi)
        for _ in range(generator.integers(2, 7)):
            angle += generator.uniform(-np.pi / 2, np.pi / 2)
            length = generator.uniform(0.1, 0.4) * min(height, width)
            to = (min(max(x + length * np.cos(angle), 0), width), min(max(y + length * np.sin(angle), 0), height))
            pen.line((x, y, *to), fill=255, width=thick)
            for dot in ((x, y), to):
                pen.ellipse([dot[0] - thick / 2, dot[1] - thick / 2, dot[0] + thick / 2, dot[1] + thick / 2], fill=255)
            x, y = to


def key(keys: Keys, picture: Picture, geometry: Geometry, variant: int, options: Inpainting) -> str:
    drawing = [options.whole, options.strokes]
    return cache.key("hole", VERSION, keys.latent(picture, geometry), variant, drawing)


def rows(keys: Keys, pictures: Pictures, options: Inpainting) -> set[str]:
    """Names of all rows that these pictures need."""
    variants = range(options.masks_per_image)
    return {key(keys, p, g, variant, options) for p in pictures for g in p.geometries for variant in variants}


def missing(store: cache.Store, keys: Keys, pictures: Pictures, options: Inpainting) -> Work:
    """The pictures and geometries of which a row must be encoded, each once."""

    def names(picture: Picture, geometry: Geometry) -> list[str]:
        return [key(keys, picture, geometry, variant, options) for variant in range(options.masks_per_image)]

    return encode.wanted(store, pictures, names)[1]


@torch.no_grad()
def fill(
    base: Base,
    cached: Cache,
    store: cache.Store,
    keys: Keys,
    work: Work,
    options: Inpainting,
    device: torch.device,
    progress: Progress,
) -> None:
    """Encode masked pictures into the store. Every picture that cannot be decoded is named, after the rest is done."""
    encoder = vae.load(base, DTYPES[cached.vae_precision], device)
    writer, problems = cache.Writer(store), list[UserError]()
    try:
        for done, item in enumerate(encode.decoded(work, cached), start=1):
            if isinstance(item, UserError):
                problems.append(item)
                continue
            picture, geometry = item.picture, item.geometry
            number = int(picture.content[:16], 16)
            for variant in range(options.masks_per_image):
                hidden = drawn(geometry.target, number, variant, options)
                row = _row(encoder, encode.scaled(item.pixels[None], device, encoder.dtype), hidden)
                cache.finite([(picture.name, row)])
                writer.add(key(keys, picture, geometry, variant, options), row)
            progress(done, len(work), "masked pictures")
    finally:
        writer.flush()
    raise_all(problems)


def _row(encoder: Any, pixels: Tensor, hidden: np.ndarray) -> Tensor:
    """Of a picture [1, 3, H, W] in -1..1 without what is hidden. As the pipeline of diffusers has it: hidden pixels are
    0, and a latent cell is hidden if its first pixel is."""
    mask = torch.from_numpy(hidden).to(pixels.device)
    moments = encode.moments(encoder, pixels * ~mask)[0]
    cells = torch.from_numpy(hidden[::CELL, ::CELL].astype(np.float32))[None]
    return torch.cat([cells.half(), moments])


def beside(row: Tensor, scale: LatentScale, draw: tuple[int, int, int]) -> Tensor:
    """What the UNet sees beside the noisy latents, fp32 [5, h, w]: the mask, and a posterior sample of the masked
    picture in its scale; `draw` is the (seed, epoch, sample) of that."""
    count = (row.shape[0] - 1) // 2
    mask, mean, std = row[:1].float(), row[1 : 1 + count], row[1 + count :]
    normal = torch.from_numpy(noise.normal(draw[0], "masked", draw[1], draw[2], tuple(mean.shape)))
    return torch.cat([mask, scale.sample(mean, std, normal)[0]])
