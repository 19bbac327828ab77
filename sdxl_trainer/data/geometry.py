"""Where a training picture comes from in its original: decided once, makes both the pixels and the time_ids (law 2).

Pure integers: nothing here opens a picture. Order of operations: resize, mirror, crop.
"""

from dataclasses import dataclass

from sdxl_trainer import keyed
from sdxl_trainer.config import Data
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


def variants(data: Data, original: tuple[int, int], content: int, name: str) -> list[Geometry]:
    """All geometries under which a picture may be trained on, the first for validation.

    `content` is a number made of the picture's bytes: its crops depend on nothing else, so that neither another
    seed nor another picture in the folder makes the cache encode it again. Raises UserError for a picture that
    cannot sensibly become a training picture of the wanted size.
    """
    target = (data.resolution, data.resolution)
    resized = covering(original, target)
    _refuse_unfit(data, original, resized, name)
    free = (resized[0] - target[0], resized[1] - target[1])
    crops = _random_crops(data, free, content) if data.crop == "random" else [_centre(free)]
    flips = (False, True) if data.flip else (False,)
    return [Geometry(original, resized, crop, target, flip) for crop in crops for flip in flips]


def _centre(free: tuple[int, int]) -> tuple[int, int]:
    return round(free[0] / 2), round(free[1] / 2)


def _random_crops(data: Data, free: tuple[int, int], content: int) -> list[tuple[int, int]]:
    count = data.crops_per_image or DEFAULT_RANDOM_CROPS
    crops = []
    for variant in range(count):
        draw = keyed.generator(0, "crop", variant, content).integers(0, free, endpoint=True)
        crops.append((int(draw[0]), int(draw[1])))
    # A picture with little or no room to move has fewer different crops: none is encoded twice.
    return list(dict.fromkeys(crops))


def _refuse_unfit(data: Data, original: tuple[int, int], resized: tuple[int, int], name: str) -> None:
    height, width = original
    if max(height, width) > LONGEST_ASPECT * min(height, width):
        what = f"{width} x {height} pixels is more than {LONGEST_ASPECT} times as long as it is wide"
        raise UserError(what, name, "crop the picture or take it out of the data set")
    scale = max(resized[0] / height, resized[1] / width)
    if scale > data.max_upscale:
        what = f"{width} x {height} pixels would be enlarged {scale:.3g} times for resolution {data.resolution}"
        raise UserError(what, name, f"use a larger picture, a lower resolution, or set max_upscale above {scale:.3g}")
