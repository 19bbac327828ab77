"""Loss masks: from a picture of grey values, or from transparency, to a factor on the loss of each latent cell.

A mask goes through the geometry of its picture (law 2): resized to the same size, mirrored and cropped alike, then
averaged over the 8 x 8 pixels of each latent cell. White is trained, black is not.
"""

from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from sdxl_trainer.config import Data
from sdxl_trainer.data import cache, images
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.errors import UserError

if TYPE_CHECKING:
    from sdxl_trainer.data.pictures import Picture

CELL = 8  # pixels on a side of a latent cell
# Part of every mask's key: raise it when masks would be made otherwise.
VERSION = 1
# Pictures read ahead of the one that is written.
WINDOW = 32


def image(content: bytes, name: str, alpha: bool) -> Image.Image:
    """The mask of the whole picture, mode L: the brightness of a mask picture, or the opacity of a picture."""
    return images.opacity(content, name) if alpha else images.decode(content, name).convert("L")


def refuse_shape(mask: tuple[int, int], picture: tuple[int, int], name: str) -> None:
    """A mask of another size is scaled to its picture; one of another shape cannot belong to it. Sizes are
    (height, width); shapes are equal when one pixel of the smaller explains the difference."""
    if abs(mask[0] * picture[1] - mask[1] * picture[0]) > max(picture):
        what = f"the mask has {mask[1]} x {mask[0]} pixels, its picture {picture[1]} x {picture[0]}: another shape"
        raise UserError(
            what, name, "make the mask from the picture as it is, of its size or smaller in both sides alike"
        )


def centroid(mask: Image.Image, name: str) -> tuple[float, float]:
    """The centre of what is white, as shares (x, y) of width and height."""
    values = np.asarray(mask, dtype=np.float64)
    total = values.sum()
    if total == 0:
        raise UserError("the mask is black all over: it has no centre", name, "draw what is to be learned in white")
    x = (values.sum(0) * (np.arange(values.shape[1]) + 0.5)).sum() / total / values.shape[1]
    y = (values.sum(1) * (np.arange(values.shape[0]) + 0.5)).sum() / total / values.shape[0]
    return round(float(x), 4), round(float(y), 4)


def cells(mask: Image.Image, geometry: Geometry) -> Tensor:
    """The share of each latent cell that is white: fp16 [h, w]."""
    rows, columns = geometry.resized
    resized = mask if mask.size == (columns, rows) else mask.resize((columns, rows), Image.Resampling.BOX)
    pixels = images.cut(np.asarray(resized), geometry).astype(np.float32)
    height, width = (side // CELL for side in geometry.target)
    return torch.from_numpy(pixels.reshape(height, CELL, width, CELL).mean((1, 3)) / 255).half()


def factor(data: Data, row: Tensor) -> Tensor:
    """What each cell's squared error is multiplied with: fp32 [1, h, w]. Normalised, its mean is 1, so that a small
    mask weighs as much as a large one."""
    weight = row.float().clamp(min=data.unmasked_weight)[None]
    return weight / weight.mean() if data.mask_normalised else weight


def key(picture: "Picture", geometry: Geometry) -> str:
    return cache.key("mask", VERSION, images.DECODER, picture.mask, geometry.to_json())


def rows(pictures: Iterable["Picture"]) -> dict[str, tuple["Picture", Geometry]]:
    """All rows that these pictures need."""
    return {key(p, g): (p, g) for p in pictures if p.mask for g in p.geometries}


def missing(store: cache.Store, pictures: Iterable["Picture"]) -> list[tuple["Picture", Geometry]]:
    """What must be made, each key once."""
    return [work for row, work in rows(pictures).items() if row not in store]


def fill(
    store: cache.Store, work: Sequence[tuple["Picture", Geometry]], progress: Callable[[int, int, str], None]
) -> list[UserError]:
    """Make rows and put them into the store; gives an error for each picture whose mask cannot be used."""
    grouped: dict[int, tuple[Picture, list[Geometry]]] = {}
    for picture, geometry in work:
        grouped.setdefault(id(picture), (picture, []))[1].append(geometry)
    items, problems = list(grouped.values()), list[UserError]()
    writer = cache.Writer(store)
    with ThreadPoolExecutor() as pool:
        for start in range(0, len(items), WINDOW):
            for (picture, geometries), made in zip(
                items[start : start + WINDOW], pool.map(_made, items[start : start + WINDOW]), strict=True
            ):
                if isinstance(made, UserError):
                    problems.append(made)
                else:
                    for geometry, row in zip(geometries, made, strict=True):
                        writer.add(key(picture, geometry), row)
            progress(min(start + WINDOW, len(items)), len(items), "masks")
    writer.flush()
    return problems


def _made(item: tuple["Picture", list[Geometry]]) -> list[Tensor] | UserError:
    picture, geometries = item
    source = picture.record.mask
    assert source is not None
    try:
        mask = image(source.read(), source.name, picture.data.mask == "alpha")
    except UserError as error:
        return error
    made = [cells(mask, geometry) for geometry in geometries]
    if picture.data.unmasked_weight == 0 and min(float(row.float().sum()) for row in made) < 1:
        what = "of the mask less than one latent cell (8 x 8 pixels) is inside of the crop"
        fix = 'set focus = "mask", draw a larger mask, set unmasked_weight, or take the picture out'
        return UserError(what, picture.name, fix)
    return made
