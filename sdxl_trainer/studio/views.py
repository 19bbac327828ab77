"""Pictures for the page: thumbnails, and where the training crops of a picture lie."""

import contextlib
import hashlib
import io
import json
import re
import threading
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from pathlib import Path
from typing import Any

from PIL import Image

from sdxl_trainer import from_folder
from sdxl_trainer.config import Data
from sdxl_trainer.data import geometry, images
from sdxl_trainer.data.sources import folder as folders
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.studio.album import Album

SIDES = (256, 1024)  # longer sides of thumbnails
COUNTED = 3000  # pictures that are opened for the verdict
HEAD = 1 << 18  # bytes of a JPEG that hold its size and orientation
DECODING = threading.Semaphore(2)  # a picture may take half a gigabyte while it is decoded


def thumbnail(path: Path, side: int) -> bytes:
    """A picture as training sees it before its crop (upright, opaque, sRGB), small, as WebP."""
    status = path.stat()
    return _thumbnail(str(path), status.st_mtime_ns, status.st_size, side)


@lru_cache(maxsize=600)
def _thumbnail(path: str, changed: int, size: int, side: int) -> bytes:
    with DECODING:
        image = images.decode(Path(path).read_bytes(), Path(path).name)
        image.thumbnail((side, side), Image.Resampling.LANCZOS, reducing_gap=2.0)
    file = io.BytesIO()
    image.save(file, "WEBP", quality=82, method=2)
    return file.getvalue()


def looked_at(path: Path, whole: bool) -> tuple[int, int, int]:
    """Height, width, and if it is read as a `whole` the number made of the bytes that random crops depend on."""
    status = path.stat()
    return _looked_at(str(path), status.st_mtime_ns, status.st_size, whole)


@lru_cache(maxsize=20_000)
def _looked_at(path: str, changed: int, size: int, whole: bool) -> tuple[int, int, int]:
    if not whole and path.lower().endswith((".jpg", ".jpeg")) and size > HEAD:
        with contextlib.suppress(UserError), Path(path).open("rb") as file:
            return (*images.probe(file.read(HEAD), Path(path).name), 0)
    content = Path(path).read_bytes()
    return (*images.probe(content, Path(path).name), int(hashlib.sha256(content).hexdigest()[:16], 16))


def crops(album: Album, name: str, data: Data) -> dict[str, Any]:
    """The crops that a picture is trained in, as shares of its width and height, and the size that each becomes."""
    height, width, number = looked_at(album.file(name), data.crop == "random")
    focus = album.entry(name).focus if data.focus == "column" else None
    made: list[dict[str, Any]] = []
    for resolution in (data.resolution, *data.more_resolutions):
        for each in geometry.variants(data, (height, width), number, name, resolution, focus):
            if not each.flip:
                (rows, columns), (top, left), (tall, wide) = each.resized, each.crop, each.target
                box = [left / columns, top / rows, wide / columns, tall / rows]
                made.append({"box": box, "size": [wide, tall]})
    kept = max(crop["box"][2] * crop["box"][3] for crop in made)
    return {"size": [width, height], "crops": made, "lost": 1 - kept, "focus": album.entry(name).focus}


def options(values: Mapping[str, Any] | None) -> Data:
    """The first data set of a whole config; without one, what most have. It says sizes and crops alone."""
    if values is None:
        return Data(path=".", buckets="area", focus="column")
    return Data.model_validate_json(json.dumps(values["data"][0]))


def verdict(album: Album, data: Data) -> dict[str, Any]:
    """Whether one may train on a folder: what training would refuse, and how many pictures go to which size."""
    names = list(album.entries)
    sizes: Counter[tuple[int, int]] = Counter()
    problems: list[UserError] = []
    lost: dict[str, float] = {}
    small: list[str] = []
    read = from_folder.guessed(album.root)
    whole = Data.model_validate({"path": str(album.root)} | {option: value for option, (value, _) in read.items()})
    captioned = sum(bool(entry.caption) for entry in album.entries.values())
    try:
        captioned = len(folders.records(whole, album.tree, "train", str(album.root)))
    except UserError as error:
        fix = "write them below, or give the words that call it up under Settings, which become their caption"
        problems.append(UserError(error.what, error.where, fix) if "no caption" in error.what else error)
    with ThreadPoolExecutor(4) as pool:
        for name, found in zip(names, pool.map(lambda n: _crop(album, n, data), names[:COUNTED]), strict=False):
            if isinstance(found, UserError):
                problems.append(found)
                continue
            sizes[tuple(found["crops"][0]["size"])] += 1
            lost[name] = found["lost"]
            wide, tall = found["crops"][0]["size"]
            if found["size"][0] * found["size"][1] < 0.7 * wide * tall:
                small.append(name)
    captions = [entry.caption for entry in album.entries.values()]
    return {
        "pictures": len(names),
        "captions": captioned,
        "read": [f"{option} = {json.dumps(value)}: {why}" for option, (value, why) in read.items()],
        "problems": together(problems),
        "sizes": [{"width": w, "height": h, "pictures": count} for (w, h), count in sizes.most_common()],
        "cut": [{"name": n, "lost": lost[n]} for n in sorted(lost, key=lambda n: -lost[n])[:12] if lost[n] > 0.15],
        "small": small[:50],
        "same": _same(captions),
        "for": f"{data.resolution} x {data.resolution} or as many pixels",
        "looked_at": min(len(names), COUNTED),
    }


def _same(captions: Iterable[str]) -> list[dict[str, Any]]:
    """Captions that several pictures have word for word."""
    counts = Counter(text for text in captions if text)
    return [{"caption": text[:120], "pictures": count} for text, count in counts.most_common(5) if count > 1]


def together(problems: Sequence[UserError]) -> list[dict[str, str]]:
    """Problems of one kind, which differ in their numbers alone, as one that names where it was found."""
    kinds: dict[str, list[UserError]] = {}
    for error in problems:
        kinds.setdefault(re.sub(r"[\d.]+", "#", error.what), []).append(error)
    return [
        {
            "what": errors[0].what if len(errors) == 1 else f"{len(errors)} pictures, for example: {errors[0].what}",
            "where": shortened((error.where for error in errors), 8),
            "fix": errors[0].fix,
        }
        for errors in kinds.values()
    ]


def _crop(album: Album, name: str, data: Data) -> dict[str, Any] | UserError:
    try:
        return crops(album, name, data)
    except UserError as error:
        return error
