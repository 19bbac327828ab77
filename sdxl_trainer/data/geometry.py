"""Where a training picture comes from in its original: decided once, makes both the pixels and the time_ids (law 2).

Pure integers: nothing here opens a picture. Order of operations: resize, mirror, crop.
"""

from dataclasses import dataclass

from sdxl_trainer import keyed
from sdxl_trainer.config import Data
from sdxl_trainer.data import buckets
from sdxl_trainer.errors import UserError

DEFAULT_RANDOM_CROPS = 4
# No wider or taller than this: beyond, the resized picture would be mostly outside of every crop.
LONGEST_ASPECT = 16


@dataclass(frozen=True)
class Geometry:
    """Sizes are (height, width) in pixels; `original` is the stored picture after EXIF rotation, `crop` is the
    (top, left) corner taken out of the resized and mirrored picture, `target` the size of the result."""

    original: tuple[int, int]
    resized: tuple[int, int]
    crop: tuple[int, int]
    target: tuple[int, int]
    flip: bool

    def time_ids(self) -> tuple[int, int, int, int, int, int]:
        """SDXL's micro-conditioning (Podell et al. 2023, section 2.2): original size, crop corner, target size."""
        return (*self.original, *self.crop, *self.target)

    def to_json(self) -> list[int]:
        return [*self.original, *self.resized, *self.crop, *self.target, int(self.flip)]


def covering(original: tuple[int, int], target: tuple[int, int]) -> tuple[int, int]:
    """The smallest size with the original's aspect ratio that covers the target. For a square target the short
    side becomes the target's, and the long side is rounded down as torchvision's Resize does."""
    (height, width), (rows, columns) = original, target
    if width * rows >= height * columns:
        return rows, max(columns, width * rows // height)
    return max(rows, height * columns // width), columns


def variants(
    data: Data,
    original: tuple[int, int],
    content: int,
    name: str,
    resolution: int | None = None,
    focus: tuple[float, float] | None = None,
) -> list[Geometry]:
    """All geometries under which a picture may be trained on at one resolution (default: the data set's first), the
    first for validation. They share one target size.

    `content` is a number made of the picture's bytes: its crops depend on nothing else, so that neither another
    seed nor another picture in the folder makes the cache encode it again. `focus` is a point (x, y) in shares of
    the picture's width and height: centre crops are moved to it as far as the picture reaches, random ones contain
    it. Raises UserError for a picture that cannot sensibly become a training picture of the wanted size.
    """
    resolution = resolution or data.resolution
    target = buckets.choose(data, resolution, original, name)
    resized = covering(original, target)
    _refuse_unfit(data, original, resized, target, name)
    free = (resized[0] - target[0], resized[1] - target[1])
    bounds = _bounds(resized, target, focus)
    if data.crop == "random":
        crops = _random_crops(data, bounds, content)
    else:
        crops = [_centre(free) if focus is None else _focused(resized, target, focus)]
    flips = (False, True) if data.flip else (False,)
    made = []
    for top, left in crops:
        for flip in flips:
            # With a focus the mirrored crop shows the same part of the picture.
            corner = (top, free[1] - left) if flip and focus is not None else (top, left)
            made.append(Geometry(original, resized, corner, target, flip))
    return made


def _centre(free: tuple[int, int]) -> tuple[int, int]:
    return round(free[0] / 2), round(free[1] / 2)


def _focused(resized: tuple[int, int], target: tuple[int, int], focus: tuple[float, float]) -> tuple[int, int]:
    """The corner of the crop with the focus in its middle, or as near to it as the picture allows."""
    top, left = (
        min(max(round(share * whole - side / 2), 0), whole - side)
        for share, whole, side in zip(focus[::-1], resized, target, strict=True)
    )
    return top, left


def _bounds(
    resized: tuple[int, int], target: tuple[int, int], focus: tuple[float, float] | None
) -> tuple[tuple[int, int], tuple[int, int]]:
    """First and last (top, left) of the crops that lie inside and hold the pixel of the focus."""
    free = (resized[0] - target[0], resized[1] - target[1])
    if focus is None:
        return (0, 0), free
    y, x = (min(int(share * whole), whole - 1) for share, whole in zip(focus[::-1], resized, strict=True))
    first = (max(y - target[0] + 1, 0), max(x - target[1] + 1, 0))
    return first, (min(y, free[0]), min(x, free[1]))


def _random_crops(data: Data, bounds: tuple[tuple[int, int], tuple[int, int]], content: int) -> list[tuple[int, int]]:
    count = data.crops_per_image or DEFAULT_RANDOM_CROPS
    crops = []
    for variant in range(count):
        draw = keyed.generator(0, "crop", variant, content).integers(*bounds, endpoint=True)
        crops.append((int(draw[0]), int(draw[1])))
    # A picture with little or no room to move has fewer different crops: none is encoded twice.
    return list(dict.fromkeys(crops))


def _refuse_unfit(
    data: Data, original: tuple[int, int], resized: tuple[int, int], target: tuple[int, int], name: str
) -> None:
    height, width = original
    if max(height, width) > LONGEST_ASPECT * min(height, width):
        what = f"{width} x {height} pixels is more than {LONGEST_ASPECT} times as long as it is wide"
        raise UserError(what, name, "crop the picture or take it out of the data set")
    scale = max(resized[0] / height, resized[1] / width)
    if scale > data.max_upscale:
        size = f"{target[1]} x {target[0]}"
        what = f"{width} x {height} pixels would be enlarged {scale:.3g} times to {size}"
        raise UserError(what, name, f"use a larger picture, a lower resolution, or set max_upscale above {scale:.3g}")
