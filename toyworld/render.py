"""Scenes to pixels."""

import math

import numpy as np
from numpy.typing import NDArray

from toyworld.grammar import SIZES, Scene, Thing
from toyworld.palette import COLOURS, TONES
from toyworld.shapes import SHAPES, TEXTURES, cover

_MARGIN = 1.5  # pixels kept free around every object, so that antialiasing never meets the border


def outline(thing: Thing, size: tuple[int, int]) -> tuple[float, float, float]:
    """(x, y, radius) of an object in pixels of a picture of `size` (height, width), moved inside if need be."""
    height, width = size
    radius = SIZES[thing.size] * math.sqrt(height * width)
    keep = 1.08 * radius + _MARGIN  # the widest shape, a star or a triangle, reaches 1.08 radii
    x = min(max(thing.at[0] * width, keep), width - keep)
    y = min(max(thing.at[1] * height, keep), height - keep)
    return x, y, radius


def _paint(canvas: NDArray[np.float32], thing: Thing) -> None:
    """Blend one object into `canvas [h, w, 3]`, touching only the window around it."""
    height, width = canvas.shape[:2]
    cx, cy, radius = outline(thing, (height, width))
    reach = 1.2 * radius + 2
    top, bottom = max(0, int(cy - reach)), min(height, int(cy + reach) + 1)
    left, right = max(0, int(cx - reach)), min(width, int(cx + reach) + 1)
    ys = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - cy) / radius)[:, None]
    xs = ((np.arange(left, right, dtype=np.float32) + 0.5 - cx) / radius)[None, :]
    y, x = (np.ascontiguousarray(grid) for grid in np.broadcast_arrays(ys, xs))
    second = TEXTURES[thing.texture](x, y, radius)[..., None]
    first, last = (np.array(table[thing.colour], np.float32) for table in (COLOURS, TONES))
    body = first * (1 - second) + last * second
    alpha = cover(SHAPES[thing.shape](x, y), radius)[..., None]
    window = canvas[top:bottom, left:right]
    window += alpha * (body - window)


def draw(scene: Scene, size: tuple[int, int] | None = None) -> NDArray[np.uint8]:
    """The picture of `scene`, sRGB `[h, w, 3]`, antialiased; `size` (height, width) instead of the scene's own."""
    height, width = size or scene.size
    canvas = np.empty((height, width, 3), dtype=np.float32)
    canvas[:] = COLOURS[scene.background]
    for thing in scene.things:
        _paint(canvas, thing)
    return np.rint(canvas).astype(np.uint8)
