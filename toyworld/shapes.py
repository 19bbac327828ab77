"""Shapes as signed distance functions, and textures as patterns.

A shape is a function of `x, y` (arrays of one shape; unit: the object's radius; origin: the middle of the shape's
bounding box; `y` points down) to the distance from its outline, negative inside. Distances are exact near the
outline, which makes one pixel of analytic antialiasing out of a clip. Formulas after Inigo Quilez,
https://iquilezles.org/articles/distfunctions2d/.
"""

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float32]
Distance = Callable[[Array, Array], Array]


def _disc(radius: float) -> Distance:
    return lambda x, y: np.hypot(x, y) - np.float32(radius)


def _ring(outer: float, inner: float) -> Distance:
    middle, half = np.float32((outer + inner) / 2), np.float32((outer - inner) / 2)
    return lambda x, y: np.abs(np.hypot(x, y) - middle) - half


def _box(half_width: float, half_height: float) -> Distance:
    def distance(x: Array, y: Array) -> Array:
        dx, dy = np.abs(x) - np.float32(half_width), np.abs(y) - np.float32(half_height)
        outside = np.hypot(np.maximum(dx, 0), np.maximum(dy, 0))
        return outside + np.minimum(np.maximum(dx, dy), 0)

    return distance


def _cross(length: float, width: float) -> Distance:
    across, along = _box(length, width), _box(width, length)
    return lambda x, y: np.minimum(across(x, y), along(x, y))


def _polygon(points: list[tuple[float, float]]) -> Distance:
    """A closed polygon, moved so that its bounding box is centred on the origin."""
    corners = np.asarray(points, dtype=np.float32)
    corners = corners - (corners.min(axis=0) + corners.max(axis=0)) / 2

    def distance(x: Array, y: Array) -> Array:
        nearest = np.full(x.shape, np.inf, dtype=np.float32)
        inside = np.zeros(x.shape, dtype=bool)
        for (ax, ay), (bx, by) in zip(corners, np.roll(corners, 1, axis=0), strict=True):
            ex, ey = bx - ax, by - ay
            wx, wy = x - ax, y - ay
            along = np.clip((wx * ex + wy * ey) / (ex * ex + ey * ey), 0, 1)
            nearest = np.minimum(nearest, (wx - ex * along) ** 2 + (wy - ey * along) ** 2)
            # even-odd rule: each edge that a ray to the left crosses turns the side over
            inside ^= ((ay > y) != (by > y)) & (ex * wy * np.sign(ey) > wx * ey * np.sign(ey))
        return np.where(inside, -np.sqrt(nearest), np.sqrt(nearest))

    return distance


def _star(outer: float, inner: float) -> Distance:
    turn = np.arange(10) * np.pi / 5
    reach = np.where(np.arange(10) % 2 == 0, outer, inner)
    return _polygon(list(zip(reach * np.sin(turn), -reach * np.cos(turn), strict=True)))


def _heart(scale: float) -> Distance:
    def distance(x: Array, y: Array) -> Array:
        px, py = np.abs(x) / np.float32(scale), np.float32(0.5518) - y / np.float32(scale)
        lobe = np.hypot(px - np.float32(0.25), py - np.float32(0.75)) - np.float32(np.sqrt(2) / 4)
        foot = np.maximum(px + py, 0) / 2
        side = np.sqrt(np.minimum(px**2 + (py - 1) ** 2, (px - foot) ** 2 + (py - foot) ** 2))
        return np.where(px + py > 1, lobe, side * np.sign(px - py)) * np.float32(scale)

    return distance


def _crescent(outer: float, bite: float, shift: float) -> Distance:
    horn = (outer**2 - bite**2 + shift**2) / (2 * shift)  # where the two circles meet
    middle = np.float32((horn - outer) / 2)

    def distance(x: Array, y: Array) -> Array:
        px = x + middle
        return np.maximum(np.hypot(px, y) - np.float32(outer), np.float32(bite) - np.hypot(px - shift, y))

    return distance


# Sizes are chosen by eye: all look equally large, and no part is thinner than 5 px at a radius of 18.
BASE_SHAPES: dict[str, Distance] = {
    "circle": _disc(0.92),
    "ring": _ring(0.96, 0.48),
    "square": _box(0.80, 0.80),
    "triangle": _polygon([(0.0, -1.12), (0.97, 0.56), (-0.97, 0.56)]),
    "star": _star(1.08, 0.48),
    "cross": _cross(0.92, 0.31),
    "heart": _heart(1.58),
    "crescent": _crescent(0.98, 0.80, 0.44),
}

# Names that the base grammar never says and shapes that it never draws: something new to teach.
NEW_SHAPES: dict[str, Distance] = {
    "hourglass": _polygon([(-0.76, -0.92), (0.76, -0.92), (0.16, 0), (0.76, 0.92), (-0.76, 0.92), (-0.16, 0)])
}

SHAPES: dict[str, Distance] = BASE_SHAPES | NEW_SHAPES


def cover(distance: Array, pixels: float) -> Array:
    """Part of each pixel, 0..1, inside an outline at `distance` (in radii, of `pixels` pixels each)."""
    return np.clip(np.float32(0.5) - distance * np.float32(pixels), 0, 1)


def _wave(t: Array, period: float) -> Array:
    """Distance to the nearest edge of bars of half a period each, the first one around 0, negative inside it."""
    return np.float32(period / 4) - np.abs(np.mod(t, np.float32(period)) - np.float32(period / 2))


def _plain(x: Array, y: Array, pixels: float) -> Array:
    return np.zeros_like(x)


def _striped(x: Array, y: Array, pixels: float) -> Array:
    return cover(_wave((x + y) * np.float32(np.sqrt(0.5)), 0.62) + np.float32(0.03), pixels)


def _dotted(x: Array, y: Array, pixels: float) -> Array:
    step = np.float32(0.66)
    row = np.round(y / step)
    shifted = x - np.mod(row, 2) * step / 2  # every second row stands in the gaps of the one above it
    return cover(np.hypot(shifted - np.round(shifted / step) * step, y - row * step) - np.float32(0.19), pixels)


def _checked(x: Array, y: Array, pixels: float) -> Array:
    across, down = (2 * cover(_wave(t + np.float32(0.28), 1.12), pixels) - 1 for t in (x, y))
    return (np.float32(1) - across * down) / np.float32(2)


# texture -> how much of the second tone each pixel has, 0..1
TEXTURES: dict[str, Callable[[Array, Array, float], Array]] = {
    "plain": _plain,
    "striped": _striped,
    "dotted": _dotted,
    "checked": _checked,
}
