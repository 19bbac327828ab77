"""Scenes and what is said about them, each a pure function of `(seed, index)`."""

import dataclasses
import zlib
from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from toyworld.palette import COLOURS, VISIBLE
from toyworld.shapes import BASE_SHAPES, TEXTURES

T = TypeVar("T")

# radius as a part of sqrt(height x width): 19.8 and 26.9 pixels of 128
SIZES: dict[str, float] = {"small": 0.155, "large": 0.210}

# place -> (x, y) of its middle, as parts of the picture's width and height
PLACES: dict[str, tuple[float, float]] = {
    "top left": (0.25, 0.25),
    "top": (0.50, 0.25),
    "top right": (0.75, 0.25),
    "left": (0.25, 0.50),
    "center": (0.50, 0.50),
    "right": (0.75, 0.50),
    "bottom left": (0.25, 0.75),
    "bottom": (0.50, 0.75),
    "bottom right": (0.75, 0.75),
}
JITTER = 0.025  # the most that an object strays from the middle of its place, as a part of the picture's side

# relation of the first object to the second -> (its inverse, the places of the two, in pairs)
RELATIONS: dict[str, tuple[str, tuple[tuple[str, str], ...]]] = {
    "left of": ("right of", (("top left", "top right"), ("left", "right"), ("bottom left", "bottom right"))),
    "right of": ("left of", (("top right", "top left"), ("right", "left"), ("bottom right", "bottom left"))),
    "above": ("below", (("top left", "bottom left"), ("top", "bottom"), ("top right", "bottom right"))),
    "below": ("above", (("bottom left", "top left"), ("bottom", "top"), ("bottom right", "top right"))),
}

# (height, width) in pixels: squares of several resolutions, and up to 3:2 either way
PICTURE_SIZES: tuple[tuple[int, int], ...] = (
    (96, 96), (128, 128), (128, 128), (160, 160), (192, 192), (256, 256),
    (112, 144), (144, 112), (128, 160), (160, 128), (160, 208), (208, 160),
    (96, 144), (144, 96), (128, 192), (192, 128), (160, 240), (240, 160),
)  # fmt: skip

_SCENE, _CAPTION = 0, 1  # purposes of a draw: what is drawn for one never moves the other


@dataclasses.dataclass(frozen=True)
class Thing:
    """One object. `at`: its middle, (x, y) as parts of the picture's width and height."""

    shape: str
    colour: str
    texture: str
    size: str
    place: str
    at: tuple[float, float]


@dataclasses.dataclass(frozen=True)
class Scene:
    """One or two objects on a plain background. `relation`: of the first to the second; `size`: (height, width)."""

    things: tuple[Thing, ...]
    background: str
    relation: str | None
    size: tuple[int, int]


def _uniform(seed: int, index: int, purpose: int, block: int = 0, count: int = 32) -> list[float]:
    """`count` numbers in [0, 1) that depend on the arguments alone.

    Raw Philox words, not `Generator` methods: NumPy promises that only the former stay the same for ever (NEP 19).
    """
    bits = np.random.Philox(key=np.array([seed, index], np.uint64), counter=np.array([0, 0, block, purpose], np.uint64))
    return [float(word) for word in (bits.random_raw(count) >> np.uint64(11)) * 2.0**-53]


def _pick(options: Sequence[T], u: float) -> T:
    return options[int(u * len(options))]


def held_out(thing: Thing) -> bool:
    """Whether a shape of this colour in this place is kept from training: one combination in eight, by a hash."""
    return zlib.crc32(f"{thing.shape}/{thing.colour}/{thing.place}".encode()) % 8 == 0


def _propose(u: list[float], shapes: Sequence[str], count: int | None) -> Scene:
    background = _pick(tuple(COLOURS), u[0])
    size = _pick(PICTURE_SIZES, u[1])
    pair = u[2] < 0.25 if count is None else count == 2
    relation = _pick(tuple(RELATIONS), u[3]) if pair else None
    places = _pick(RELATIONS[relation][1], u[4]) if relation else (_pick(tuple(PLACES), u[4]),)
    things = []
    for place, (s, c, t, r, dx, dy) in zip(places, (u[5:11], u[11:17]), strict=False):
        x, y = PLACES[place]
        things.append(
            Thing(
                shape=_pick(shapes, s),
                colour=_pick(VISIBLE[background], c),
                # half of all objects are plain; two objects are both small, so that they never touch
                texture="plain" if t < 0.5 else _pick(tuple(TEXTURES)[1:], 2 * t - 1),
                size="small" if pair else _pick(tuple(SIZES), r),
                place=place,
                at=(x + JITTER * (2 * dx - 1), y + JITTER * (2 * dy - 1)),
            )
        )
    return Scene(tuple(things), background, relation, size)


def scene(
    seed: int,
    index: int,
    *,
    holdout: bool | None = None,
    shapes: Sequence[str] = tuple(BASE_SHAPES),
    count: int | None = None,
) -> Scene:
    """Scene number `index` of world `seed`.

    `holdout`: False for scenes without any held-out combination (train on these), True for scenes with one (ask for
    these), None for all. `shapes`: what may be drawn; `count`: 1 or 2 objects, None for two in a quarter of the scenes.
    """
    block = 0
    while True:
        made = _propose(_uniform(seed, index, _SCENE, block), shapes, count)
        twins = len({(t.shape, t.colour) for t in made.things}) < len(made.things)
        if not twins and holdout in (None, any(map(held_out, made.things))):
            return made
        block += 1


_SINGLE = (
    "{a} {where} on a {ground} background",
    "{a} on a {ground} background {where}",
    "{where}, {a} on a {ground} background",
    "a {ground} background with {a} {where}",
    "a picture of {a} {where}, {ground} background",
    "{bare}, {place}, {ground} background",
)
_DOUBLE = (
    "{a} {relation} {b} on a {ground} background",
    "{a} {relation} {b}, {ground} background",
    "a {ground} background with {a} {relation} {b}",
    "a picture of {a} {relation} {b} on a {ground} background",
)
_TERSE = ("{a}", "{bare}", "a picture of {a}", "{a} on a {ground} background")
_SAY_RELATION = {
    "left of": ("left of", "to the left of"),
    "right of": ("right of", "to the right of"),
    "above": ("above", "over"),
    "below": ("below", "under"),
}


def _article(words: str) -> str:
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def _name(thing: Thing, say_size: bool, say_plain: bool) -> str:
    texture = thing.texture if thing.texture != "plain" or say_plain else ""
    return " ".join(filter(None, (thing.size if say_size else "", texture, thing.colour, thing.shape)))


def _where(place: str, u: float) -> str:
    if place == "center":
        return _pick(("in the center", "in the middle"), u)
    if " " in place:
        return _pick((f"at the {place}", f"in the {place} corner"), u)
    return _pick((f"{'on' if place in ('left', 'right') else 'at'} the {place}", f"on the {place} side"), u)


def caption(scene: Scene, seed: int, index: int, *, terse: float = 0.0) -> str:
    """One of many phrasings of `scene`, chosen by `(seed, index)`.

    It always says the shapes, the colours, any texture but plain, the background, and the place or the relation;
    of one object, with a chance of `terse`, only part of that. The size is said half of the time.
    """
    u = _uniform(seed, index, _CAPTION)
    names = [_name(t, say_size=u[i] < 0.5, say_plain=u[2 + i] < 0.1) for i, t in enumerate(scene.things)]
    relation = scene.relation or ""
    if relation and u[4] < 0.5:  # the same picture, told from the other side
        names.reverse()
        relation = RELATIONS[relation][0]
    ground = scene.background
    if u[5] < terse and not relation:
        pattern = _pick(_TERSE, u[6])
    else:
        pattern = _pick(_DOUBLE if relation else _SINGLE, u[6])
    words = pattern.format(
        a=_article(names[0]),
        b=_article(names[-1]),
        bare=names[0],
        ground=ground,
        place=scene.things[0].place,
        where=_where(scene.things[0].place, u[7]),
        relation=_pick(_SAY_RELATION[relation], u[8]) if relation else "",
    )
    return words.replace("a orange background", "an orange background")


def prompts(
    n: int, seed: int, *, shapes: Sequence[str] = tuple(BASE_SHAPES), count: int | None = 1
) -> list[tuple[Scene, str]]:
    """`n` scenes with full captions to ask a model for: every second one, from the first on, is a held-out combination.

    Take a `seed` that no training data was made with.
    """
    scenes = [scene(seed, index, holdout=index % 2 == 0, shapes=shapes, count=count) for index in range(n)]
    return [(made, caption(made, seed, index)) for index, made in enumerate(scenes)]
