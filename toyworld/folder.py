"""Pictures to files: data folders and contact sheets."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from toyworld.grammar import caption, scene
from toyworld.render import draw
from toyworld.shapes import BASE_SHAPES


def write_folder(
    path: str | os.PathLike[str],
    n: int,
    seed: int,
    *,
    holdout: bool | None = False,
    shapes: Sequence[str] = tuple(BASE_SHAPES),
    count: int | None = None,
    size: tuple[int, int] | None = None,
    terse: float = 0.1,
) -> Path:
    """Write scenes `0..n-1` of world `seed` as an image folder: PNG files and `metadata.jsonl` (file_name, text).

    The words are those of `scene` and `caption`; `size` (height, width) makes all pictures of one size. The
    metadata is written last and in one piece, so that a folder that has it is complete.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    rows = []
    for index in range(n):
        made = scene(seed, index, holdout=holdout, shapes=shapes, count=count)
        name = f"{index:06d}.png"
        Image.fromarray(draw(made, size)).save(folder / name, compress_level=3)
        rows.append(json.dumps({"file_name": name, "text": caption(made, seed, index, terse=terse)}))
    part = folder / "metadata.jsonl.part"
    part.write_text("".join(f"{row}\n" for row in rows), encoding="utf-8")
    part.replace(folder / "metadata.jsonl")
    return folder


def _wrapped(words: str, width: int) -> list[str]:
    lines = [""]
    for word in words.split():
        longer = f"{lines[-1]} {word}".strip()
        if len(longer) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def sheet(
    pictures: Sequence[NDArray[np.uint8]], captions: Sequence[str] | None = None, *, columns: int = 8, cell: int = 128
) -> Image.Image:
    """A contact sheet, row by row; each picture `[h, w, 3]` is fitted into a square of `cell` pixels, never cropped."""
    text = 50 if captions else 0
    gap = 8
    rows = -(-len(pictures) // columns)
    page = Image.new("RGB", (columns * (cell + gap) + gap, rows * (cell + text + gap) + gap), (238, 238, 238))
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(10)
    for index, pixels in enumerate(pictures):
        left, top = gap + index % columns * (cell + gap), gap + index // columns * (cell + text + gap)
        picture = Image.fromarray(pixels)
        scale = cell / max(picture.size)
        if scale != 1:
            fitted = (round(picture.width * scale), round(picture.height * scale))
            picture = picture.resize(fitted, Image.Resampling.LANCZOS)
        page.paste(picture, (left + (cell - picture.width) // 2, top + (cell - picture.height) // 2))
        if captions:
            for line, words in enumerate(_wrapped(captions[index], cell // 5)[:4]):
                pen.text((left, top + cell + 1 + 12 * line), words, fill=(40, 40, 40), font=font)
    return page
