"""Pictures made for the tests of decoding: painted ones, and files that Pillow cannot write."""

import io
import struct
import zlib
from typing import Any

import numpy as np
from PIL import Image

from sdxl_trainer.data import images

RED, GREEN, BLUE, GREY = (230, 20, 20), (20, 200, 20), (20, 20, 220), (90, 90, 90)


def encoded(image: Image.Image, kind: str = "PNG", **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def corners(width: int = 48, height: int = 32) -> Image.Image:
    """Red, green, blue and grey quarters: top left, top right, bottom left, bottom right."""
    image = Image.new("RGB", (width, height))
    half = (width // 2, height // 2)
    for index, colour in enumerate((RED, GREEN, BLUE, GREY)):
        image.paste(colour, (index % 2 * half[0], index // 2 * half[1], *(width, height)))
    return image


def shown(content: bytes) -> np.ndarray:
    image = images.decode(content, "picture")
    assert image.mode == "RGB"
    assert images.probe(content, "picture") == (image.height, image.width)
    return np.asarray(image).astype(int)


def exif(orientation: int) -> Image.Exif:
    tags = Image.Exif()
    tags[images.ORIENTATION] = orientation
    return tags


def png(width: int, height: int, depth: int, kind: int, rows: bytes, *chunks: tuple[bytes, bytes]) -> bytes:
    """A PNG of any depth and colour type, made without Pillow; `rows` are the bytes of one row, repeated."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, kind, 0, 0, 0))
    before = b"".join(chunk(name, data) for name, data in chunks if name != b"eXIf")
    after = b"".join(chunk(name, data) for name, data in chunks if name == b"eXIf")
    body = chunk(b"IDAT", zlib.compress((b"\0" + rows) * height))
    return b"\x89PNG\r\n\x1a\n" + head + before + body + after + chunk(b"IEND", b"")


def tiff(row: np.ndarray, bits: int, photometric: int = 1, sample_format: int = 1, width: int | None = None) -> bytes:
    """A little-endian grey TIFF of one row, made without Pillow."""
    data = row.tobytes()
    tags = [
        (256, width or row.size),
        (257, 1),
        (258, bits),
        (259, 1),
        (262, photometric),
        (273, 8 + 2 + 9 * 12 + 4),
        (277, 1),
        (279, len(data)),
        (339, sample_format),
    ]
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in tags)
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + struct.pack("<I", 0) + data


def noise(kind: str, **options: Any) -> bytes:
    array = np.random.default_rng(1).integers(0, 256, (60, 60, 3), dtype=np.uint8)
    return encoded(Image.fromarray(array).convert("P" if kind == "GIF" else "RGB"), kind, **options)
