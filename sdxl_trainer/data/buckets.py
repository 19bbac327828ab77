"""The sizes that pictures are trained at: squares, or shapes near each picture's own. Pure integers.

All sizes are (height, width) in pixels.
"""

from collections.abc import Sequence
from functools import lru_cache
from math import isqrt

from sdxl_trainer.config import Data
from sdxl_trainer.errors import UserError

Size = tuple[int, int]

# Podell et al. 2023, appendix I, (height, width) of the wide half; the tall half mirrors it.
_SDXL = (
    *((512, width) for width in (2048, 1984, 1920, 1856)),
    *((576, width) for width in (1792, 1728, 1664)),
    *((640, width) for width in (1600, 1536)),
    *((704, width) for width in (1472, 1408, 1344)),
    *((768, width) for width in (1344, 1280)),
    *((832, width) for width in (1216, 1152)),
    *((896, width) for width in (1152, 1088)),
    *((960, width) for width in (1088, 1024)),
    (1024, 1024),
)


def sizes(data: Data, resolution: int) -> tuple[Size, ...]:
    """All sizes that pictures of a data set may be trained at for one of its resolutions."""
    if data.buckets == "area":
        shortest, longest = data.bucket_min or resolution // 4, data.bucket_max or 2 * resolution
        return of_area(resolution, data.bucket_step, shortest, longest)
    if data.buckets == "sdxl":
        return of_sdxl(resolution)
    if data.buckets == "sizes":
        return tuple(sorted({(height, width) for width, height in data.bucket_sizes}))
    return ((resolution, resolution),)


@lru_cache(maxsize=64)
def of_area(resolution: int, step: int, shortest: int, longest: int) -> tuple[Size, ...]:
    """For each width from `shortest` to `longest` the largest height in steps that keeps the area within
    resolution^2, and the same turned round: the list that kohya's trainer and its followers use."""
    low, high = -(-shortest // step) * step, longest // step * step
    square = resolution // step * step
    found = {(square, square)} if low <= square <= high else set()
    for width in range(low, high + 1, step):
        height = min(high, resolution * resolution // width // step * step)
        if height >= low:
            found |= {(height, width), (width, height)}
    return tuple(sorted(found))


@lru_cache(maxsize=64)
def of_sdxl(resolution: int) -> tuple[Size, ...]:
    """The list that SDXL was trained with, scaled from 1024 to another resolution."""
    wide = [(height * resolution // 1024, width * resolution // 1024) for height, width in _SDXL]
    return tuple(sorted({*wide, *((width, height) for height, width in wide)}))


def choose(data: Data, resolution: int, original: Size, name: str) -> Size:
    """The size that a picture is trained at: the bucket that loses least of it. With `no_upscale` it is one that the
    picture need not be enlarged for. Raises UserError where there is none."""
    offered = sizes(data, resolution)
    if not data.no_upscale:
        return nearest(original, offered)
    if data.buckets == "area":
        best = nearest(original, offered)
        return best if _fits(original, best) else own_size(data, resolution, original, name)
    fitting = tuple(size for size in offered if _fits(original, size))
    if not fitting:
        what = f"{original[1]} x {original[0]} pixels is smaller than every bucket, and no_upscale is set"
        raise UserError(what, name, "use a larger picture, add smaller bucket_sizes, or remove no_upscale")
    return nearest(original, fitting)


@lru_cache(maxsize=1 << 16)
def nearest(original: Size, offered: Sequence[Size]) -> Size:
    """The size of the nearest shape, by |log ratio|, which loses least of the picture; the larger of equal shapes."""
    height, width = original

    def far(size: Size) -> tuple[float, int, Size]:
        one, two = width * size[0], height * size[1]
        # exp |log ratio|: a division of integers is rounded alike on every machine, a logarithm is not.
        return max(one, two) / min(one, two), -size[0] * size[1], size

    return min(offered, key=far)


def own_size(data: Data, resolution: int, original: Size, name: str) -> Size:
    """A bucket for a picture that is too small for those of its shape: its own size in whole steps, or what of it
    the area allows."""
    step, shortest, longest = data.bucket_step, data.bucket_min or resolution // 4, data.bucket_max or 2 * resolution
    height, width = original
    if height * width > resolution * resolution:
        height, width = isqrt(resolution**2 * height // width), isqrt(resolution**2 * width // height)
    long = max(height, width)
    if long > longest:
        height, width = height * longest // long, width * longest // long
    rows, columns = height // step * step, width // step * step
    candidates = {
        (rows, min(columns, rows * width // height // step * step)),
        (min(rows, columns * height // width // step * step), columns),
    }
    usable = tuple(sorted(size for size in candidates if min(size) >= max(shortest, step)))
    if not usable:
        what = f"{original[1]} x {original[0]} pixels has no bucket with sides of {max(shortest, step)} or more"
        raise UserError(
            what, name, "use a larger picture, set a smaller bucket_min or bucket_step, or remove no_upscale"
        )
    return nearest(original, usable)


def _fits(original: Size, size: Size) -> bool:
    return original[0] >= size[0] and original[1] >= size[1]
