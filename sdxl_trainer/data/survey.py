"""A look at the pictures themselves, before hours are spent on them: damaged ones, near copies, empty ones, thumbnails.

Reading pictures is what costs, so no more than `LIMIT` are looked at, evenly spread over the set; the rest is known by
its headers and hashes.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from sdxl_trainer.data import images
from sdxl_trainer.data.pictures import Picture, Pictures
from sdxl_trainer.errors import UserError
from sdxl_trainer.threads import mapped

LIMIT = 2000
# Longer side of the pictures in a report, in pixels.
SIDE = 256
# Bits of 128 in which the hashes of near copies may differ. On 64 photographs copies in a third of the size, at JPEG
# quality 20, darker, or cut by 2 % on each side differed in 14 at most (median 0 to 8), different subjects in 27 at
# least.
NEAR = 12
# Grey values (of 255) that a picture must differ by, as a standard deviation, to show anything at all.
FLAT = 2.0


@dataclass(frozen=True)
class Look:
    """What one picture looks like: a hash of 128 bits as two words, and how much its grey values differ, as standard
    deviations: those of its tiles, and of its pixels. `moving`: it is the first frame of an animation."""

    bits: tuple[int, int]
    tiles: float
    pixels: float
    moving: bool = False


@dataclass(frozen=True)
class Survey:
    """`looks` by number of the picture; `broken` are those that cannot be decoded, with the reason."""

    looks: dict[int, Look]
    broken: dict[int, UserError]

    @property
    def looked_at(self) -> int:
        return len(self.looks) + len(self.broken)


def look(image: Image.Image) -> Look:
    """A difference hash in both directions: whether each of 8 x 8 tiles is brighter than the one before it."""
    grey = image.convert("L")
    tiles = np.asarray(grey.resize((9, 9), Image.Resampling.BOX), dtype=np.int16)
    across, down = tiles[:8, 1:] > tiles[:8, :8], tiles[1:, :8] > tiles[:8, :8]
    words = [int.from_bytes(np.packbits(bits).tobytes(), "big") for bits in (across, down)]
    return Look((words[0], words[1]), float(tiles.std()), float(np.asarray(grey).std()))


def chosen(pictures: Pictures, limit: int = LIMIT) -> list[int]:
    """Numbers of the pictures to look at: each picture once, at most `limit`, evenly spread, no bytes twice."""
    numbers = pictures.different().tolist()
    if len(numbers) <= limit:
        return numbers
    return [numbers[i * len(numbers) // limit] for i in range(limit)]


def survey(pictures: Pictures, progress: Callable[[int, int, str], None]) -> Survey:
    """Look at pictures, each decoded once at a small size."""
    numbers = chosen(pictures)
    looks: dict[int, Look] = {}
    broken: dict[int, UserError] = {}

    def one(number: int) -> Look | UserError:
        picture = pictures[number]
        try:
            content = picture.record.read()
            seen = look(images.small(content, picture.name, 64))
            return replace(seen, moving=images.animated(content, picture.name))
        except UserError as error:
            return error

    for done, (number, seen) in enumerate(mapped(one, numbers), start=1):
        if isinstance(seen, UserError):
            broken[number] = seen
        else:
            looks[number] = seen
        progress(done, len(numbers), "pictures looked at")
    return Survey(looks, broken)


def near_copies(looks: dict[int, Look]) -> list[list[int]]:
    """Groups of pictures that look alike, by number; empty ones look like nothing."""
    numbers = [number for number, seen in looks.items() if seen.tiles >= FLAT]
    bits = np.array([looks[number].bits for number in numbers], dtype=np.uint64).reshape(-1, 2)
    group = list(range(len(numbers)))

    def root(i: int) -> int:
        while group[i] != i:
            i = group[i]
        return i

    for i in range(len(numbers)):
        far = np.bitwise_count(bits[i + 1 :] ^ bits[i]).sum(axis=1)
        for j in np.nonzero(far <= NEAR)[0]:
            group[root(i + 1 + int(j))] = root(i)
    found: dict[int, list[int]] = {}
    for i, number in enumerate(numbers):
        found.setdefault(root(i), []).append(number)
    return [members for members in found.values() if len(members) > 1]


def flat(looks: dict[int, Look]) -> list[int]:
    """Pictures of nearly one colour."""
    return [number for number, seen in looks.items() if seen.pixels < FLAT]


def thumbnails(pictures: Sequence[Picture], numbers: Iterable[int]) -> dict[int, Image.Image]:
    """Small pictures of those that can be read."""

    def one(number: int) -> Image.Image | None:
        try:
            return images.small(pictures[number].record.read(), pictures[number].name, SIDE)
        except UserError:
            return None

    return {number: made for number, made in mapped(one, dict.fromkeys(numbers)) if made is not None}
