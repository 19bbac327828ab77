"""What a picture shows, read back by classical image processing, and how often that is what was asked for."""

import dataclasses
import functools
import itertools
import math
from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageFilter

from toyworld.grammar import PLACES, RELATIONS, SIZES, Scene, Thing
from toyworld.palette import COLOURS, TONES
from toyworld.shapes import SHAPES, TEXTURES, cover

Picture = NDArray[np.uint8]
Mask = NDArray[np.bool_]

_GRID = 32  # blobs and shapes are compared on a grid of this many cells a side, stretched to their bounding boxes
_BLURS = (0.0, 0.09)  # in radii; a blurred picture has rounder corners and shorter tips, and is the same shape still
_LEAST_FIT = 0.70  # a blob that overlaps its best shape less (intersection over union) shows no shape at all
_LEAST_AREA = 0.004  # of the picture; the smallest object, a small crescent, covers 0.02
_LEAST_SHARE = 0.30  # of the largest blob's area, for a second blob to be an object and not a stray piece
_PALETTE = np.array(list(COLOURS.values()), dtype=np.float32)
_TONES = np.array(list(TONES.values()), dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Seen:
    """One object as read. `shape`: None where no shape fits; `fit`: overlap with it, 0..1; `at`: as `Thing.at`."""

    shape: str | None
    colour: str
    texture: str
    size: str
    place: str
    at: tuple[float, float]
    fit: float


@dataclasses.dataclass(frozen=True)
class Reading:
    """What a picture shows; the objects with the largest first, two at most."""

    things: tuple[Seen, ...]
    background: str


@dataclasses.dataclass(frozen=True)
class Rate:
    """`right` of `total`, its 95 % Wilson interval, and the rate of blind guessing."""

    right: int
    total: int
    low: float
    high: float
    chance: float

    @property
    def rate(self) -> float:
        return self.right / self.total if self.total else math.nan


def wilson(right: int, total: int, z: float = 1.96) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): honest near 0 and 1, where the normal one is not."""
    if not total:
        return 0.0, 1.0
    p, n = right / total, total
    middle = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return max(0.0, middle - half), min(1.0, middle + half)


def _background(pixels: NDArray[np.float32]) -> tuple[str, NDArray[np.float32]]:
    """(name, colour `[3]`) of what most of the picture's frame shows: objects do not reach the frame."""
    frame = max(2, round(0.03 * min(pixels.shape[:2])))
    inner = np.ones(pixels.shape[:2], dtype=bool)
    inner[frame:-frame, frame:-frame] = False
    border = pixels[inner]
    nearest = np.square(border[:, None] - _PALETTE).sum(-1).argmin(1)
    winner = int(np.bincount(nearest, minlength=len(_PALETTE)).argmax())
    return tuple(COLOURS)[winner], np.median(border[nearest == winner], axis=0)


def _label(mask: Mask) -> NDArray[np.int32]:
    """8-connected parts of `mask [h, w]`: 0 outside, 1, 2, ... inside, by union-find over the runs of each row."""
    labels = np.zeros(mask.shape, dtype=np.int32)
    parent = [0]

    def root(label: int) -> int:
        while parent[label] != label:
            label = parent[label]
        return label

    edges = np.diff(np.pad(mask.astype(np.int8), ((0, 0), (1, 1))), axis=1)
    rows, starts = (axis.tolist() for axis in np.nonzero(edges > 0))
    stops = np.nonzero(edges < 0)[1].tolist()
    above: list[tuple[int, int, int]] = []  # (start, stop, label) of the runs of the row before
    for y, runs in itertools.groupby(zip(rows, starts, stops, strict=True), key=lambda run: run[0]):
        if y > 0 and not mask[y - 1].any():
            above = []
        here = []
        for _, start, stop in runs:
            touching = [root(label) for first, last, label in above if first <= stop and start <= last]
            mine = min(touching, default=len(parent))
            if not touching:
                parent.append(mine)
            for other in touching:
                parent[other] = mine
            labels[y, start:stop] = mine
            here.append((start, stop, mine))
        above = here
    return np.array([root(label) for label in range(len(parent))], dtype=np.int32)[labels]


def _blobs(mask: Mask) -> list[Mask]:
    """The connected parts of `mask` that may be objects, the largest first, two at most."""
    labels = _label(mask)
    areas = np.bincount(labels.ravel())
    areas[0] = 0
    order = np.argsort(-areas)[:2]
    least = max(_LEAST_AREA * mask.size, _LEAST_SHARE * areas.max())
    return [labels == label for label in order if areas[label] >= least]


def _box(mask: Mask) -> tuple[int, int, int, int]:
    """(left, top, right, bottom), the last two exclusive, in pixels."""
    rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
    return int(columns[0]), int(rows[0]), int(columns[-1]) + 1, int(rows[-1]) + 1


def _stretched(mask: Mask) -> NDArray[np.float32]:
    """The box around a blob, on the grid `[32 x 32]`."""
    crop = Image.fromarray(mask).convert("L").crop(_box(mask))
    grid = crop.resize((_GRID, _GRID), Image.Resampling.BOX)
    return np.asarray(grid, dtype=np.float32).ravel() / np.float32(255)


@functools.cache
def _templates() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Grids `[shapes, blurs, 32 x 32]` and the widths and heights of their boxes `[shapes, blurs, 2]`, in radii."""
    unit = 100  # pixels a radius
    axis = (np.arange(-1.2 * unit, 1.2 * unit, dtype=np.float32) + np.float32(0.5)) / np.float32(unit)
    y, x = np.meshgrid(axis, axis, indexing="ij")
    grids, sides = [], []
    for distance in SHAPES.values():
        sharp = Image.fromarray(distance(x, y) < 0).convert("L")
        for blur in _BLURS:
            mask = np.asarray(sharp.filter(ImageFilter.GaussianBlur(blur * unit))) >= 128
            left, top, right, bottom = _box(mask)
            grids.append(_stretched(mask))
            sides.append(((right - left) / unit, (bottom - top) / unit))
    shape = (len(SHAPES), len(_BLURS), -1)
    return np.stack(grids).reshape(shape), np.array(sides, dtype=np.float32).reshape(shape)


def _shape(mask: Mask) -> tuple[str, float, float]:
    """(best shape, its fit 0..1, its radius in pixels) of a blob."""
    left, top, right, bottom = _box(mask)
    grids, sides = _templates()
    grid = _stretched(mask)
    overlap = np.minimum(grids, grid).sum(-1) / np.maximum(grids, grid).sum(-1)
    radii = np.array([right - left, bottom - top], dtype=np.float32) / sides
    fit = overlap * radii.min(-1) / radii.max(-1)  # a squeezed shape is that much less the shape
    best, blur = np.unravel_index(fit.argmax(), fit.shape)
    return tuple(SHAPES)[best], float(fit[best, blur]), float(radii[best, blur].mean())


def _surface(pixels: NDArray[np.float32], box: tuple[int, int, int, int], shape: str, radius: float) -> tuple[str, str]:
    """(colour, texture) whose drawing comes closest to the pixels `[h, w, 3]` well inside an object."""
    left, top, right, bottom = box
    ys = ((np.arange(top, bottom, dtype=np.float32) + 0.5 - (top + bottom) / 2) / radius)[:, None]
    xs = ((np.arange(left, right, dtype=np.float32) + 0.5 - (left + right) / 2) / radius)[None, :]
    y, x = (np.ascontiguousarray(grid, dtype=np.float32) for grid in np.broadcast_arrays(ys, xs))
    distance = SHAPES[shape](x, y)
    inside = cover(distance + np.float32(1.5 / radius), radius) >= 1  # edges are blends with the background
    if inside.sum() < 12:
        inside = distance <= np.median(distance)
    found = pixels[top:bottom, left:right][inside]
    errors = {}
    for texture, pattern in TEXTURES.items():
        second = pattern(x, y, radius)[inside][:, None, None]
        drawn = _PALETTE * (1 - second) + _TONES * second
        errors[texture] = np.square(drawn - found[:, None]).sum(-1).mean(0)
    texture = min(errors, key=lambda name: float(errors[name].min()))
    return tuple(COLOURS)[int(errors[texture].argmin())], texture


def _place(x: float, y: float) -> str:
    return min(PLACES, key=lambda name: math.dist(PLACES[name], (x, y)))


def _seen(pixels: NDArray[np.float32], mask: Mask) -> Seen:
    height, width = mask.shape
    box = left, top, right, bottom = _box(mask)
    shape, fit, radius = _shape(mask)
    colour, texture = _surface(pixels, box, shape, radius)
    x, y = (left + right) / 2 / width, (top + bottom) / 2 / height
    part = radius / math.sqrt(height * width)
    size = min(SIZES, key=lambda name: abs(math.log(part / SIZES[name])))
    return Seen(shape if fit >= _LEAST_FIT else None, colour, texture, size, _place(x, y), (x, y), fit)


def read(picture: Picture) -> Reading:
    """What `picture` (sRGB `[h, w, 3]`, any size) shows; no object at all is a reading with no things."""
    # half a pixel of blur calms noise and stray pixels, and costs edges nothing that the threshold does not give back
    blurred = Image.fromarray(picture).filter(ImageFilter.GaussianBlur(0.7))
    pixels = np.asarray(blurred, dtype=np.float32)
    name, ground = _background(pixels)
    far = np.sqrt(np.square(pixels - ground).sum(-1))
    things = []
    for blob in _blobs(far > 45.0):
        # the outline runs where half of a pixel is object: halfway to the nearer of the object's tones
        edge = 0.5 * float(np.quantile(far[blob], 0.35))
        refined = _blobs(blob & (far > edge))
        if refined:
            things.append(_seen(pixels, refined[0]))
    return Reading(tuple(things), name)


def relation(first: tuple[float, float], second: tuple[float, float]) -> str:
    """The relation of the first to the second of two objects at (x, y): along the axis on which they differ more."""
    dx, dy = first[0] - second[0], first[1] - second[1]
    if abs(dx) > abs(dy):
        return "left of" if dx < 0 else "right of"
    return "above" if dy < 0 else "below"


def _matched(scene: Scene, reading: Reading) -> list[tuple[Thing, Seen | None]]:
    """Each object asked for with the one seen in its stead: the assignment that agrees best."""

    def agreement(order: Iterable[Seen | None]) -> tuple[int, float]:
        pairs = [(thing, seen) for thing, seen in zip(scene.things, order, strict=False) if seen]
        words = sum((thing.shape == seen.shape) + (thing.colour == seen.colour) for thing, seen in pairs)
        return words, -sum(math.dist(thing.at, seen.at) for thing, seen in pairs)

    if len(scene.things) == 1:
        return [(scene.things[0], reading.things[0] if reading.things else None)]
    padded = (*reading.things, None, None)[: max(2, len(reading.things))]
    best = max(itertools.permutations(padded), key=agreement)
    return list(zip(scene.things, best, strict=True))


def judge(picture: Picture, scene: Scene) -> list[tuple[str, bool]]:
    """(attribute, right or wrong) for all that `scene` asks of `picture`; an attribute once for each object.

    "all" is what every full caption says: shapes, colours, background, number, and the place or the relation.
    """
    reading = read(picture)
    pairs = _matched(scene, reading)
    verdict = [("background", reading.background == scene.background), ("number", len(reading.things) == len(pairs))]
    for thing, seen in pairs:
        shape, colour = (seen is not None and getattr(seen, a) == getattr(thing, a) for a in ("shape", "colour"))
        verdict += [("shape", shape), ("colour", colour), ("shape and colour", shape and colour)]
        if scene.relation is None:
            verdict.append(("place", seen is not None and seen.place == thing.place))
    if scene.relation is not None:
        ends = [seen.at for _, seen in pairs if seen]
        verdict.append(("relation", len(ends) == 2 and relation(*ends) == scene.relation))
    whole = all(right for _, right in verdict)
    for thing, seen in pairs:
        verdict += [(a, seen is not None and getattr(seen, a) == getattr(thing, a)) for a in ("size", "texture")]
    return [*verdict, ("all", whole)]


_SAID = len(SHAPES) * len(COLOURS)
CHANCE: dict[str, float] = {
    "shape": 1 / len(SHAPES),
    "colour": 1 / len(COLOURS),
    "shape and colour": 1 / _SAID,
    "place": 1 / len(PLACES),
    "relation": 1 / len(RELATIONS),
    "background": 1 / len(COLOURS),
    "number": 1 / 2,
    "size": 1 / len(SIZES),
    "texture": 1 / len(TEXTURES),
    "all": 1 / (_SAID * len(PLACES) * len(COLOURS) * 2),
}


def accuracy(pictures: Iterable[Picture], scenes: Sequence[Scene]) -> dict[str, Rate]:
    """How often `pictures` show what `scenes` ask for, attribute by attribute (those of `judge` that occur)."""
    verdicts: dict[str, list[bool]] = {}
    for picture, scene in zip(pictures, scenes, strict=True):
        for attribute, right in judge(picture, scene):
            verdicts.setdefault(attribute, []).append(right)
    return {
        name: Rate(sum(verdicts[name]), len(verdicts[name]), *wilson(sum(verdicts[name]), len(verdicts[name])), chance)
        for name, chance in CHANCE.items()
        if name in verdicts
    }


def table(rates: dict[str, Rate]) -> str:
    """`accuracy` as lines of text, in percent."""
    lines = [f"{'attribute':<17} right  of {'95 % interval':>15} {'chance':>7}"]
    for name, r in rates.items():
        rate, low, high, chance = (100 * value for value in (r.rate, r.low, r.high, r.chance))
        lines.append(f"{name:<17} {rate:5.1f} {r.total:>4} {low:6.1f} - {high:5.1f} {chance:7.1f}")
    return "\n".join(lines)
