"""Every mode, rotation and depth becomes the pixels that a viewer shows; geometry becomes the training picture."""

import struct
from typing import Any

import numpy as np
import pytest
from handmade import BLUE, GREEN, GREY, RED, corners, encoded, exif, png, shown, tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from sdxl_trainer.data import images, resize
from sdxl_trainer.data.geometry import Geometry

# Where the quarters painted first (row, column) lie after each orientation is undone, as the EXIF standard draws it:
# orientation 6 means that the first row is the right-hand side of what was seen, and so on.
SEEN = {
    1: ((RED, GREEN), (BLUE, GREY)),
    2: ((GREEN, RED), (GREY, BLUE)),
    3: ((GREY, BLUE), (GREEN, RED)),
    4: ((BLUE, GREY), (RED, GREEN)),
    5: ((RED, BLUE), (GREEN, GREY)),
    6: ((BLUE, RED), (GREY, GREEN)),
    7: ((GREY, GREEN), (BLUE, RED)),
    8: ((GREEN, GREY), (RED, BLUE)),
}
ROTATING: dict[str, dict[str, Any]] = {
    "JPEG": {"quality": 95, "subsampling": 0},
    "PNG": {},
    "WEBP": {"lossless": True},
    "TIFF": {},
    "AVIF": {"quality": 95, "subsampling": "4:4:4"},
}


@pytest.mark.parametrize("orientation", SEEN)
@pytest.mark.parametrize("kind", [kind for kind in ROTATING if kind in images.FORMATS])
def test_each_orientation_is_undone_once(kind: str, orientation: int) -> None:
    pixels = shown(encoded(corners(), kind, exif=exif(orientation), **ROTATING[kind]))
    assert pixels.shape == ((32, 48, 3) if orientation < 5 else (48, 32, 3))
    height, width, _ = pixels.shape
    for row in range(2):
        for column in range(2):
            middle = pixels[height * (1 + 2 * row) // 4, width * (1 + 2 * column) // 4]
            assert np.abs(middle - SEEN[orientation][row][column]).max() < 12, (row, column)


def test_orientation_after_the_pixels_of_a_png_is_found() -> None:
    tags = exif(6).tobytes().removeprefix(b"Exif\0\0")
    assert images.probe(png(5, 3, 8, 0, bytes(5), (b"eXIf", tags)), "picture") == (5, 3)
    assert shown(png(5, 3, 8, 0, bytes(5), (b"eXIf", tags))).shape == (5, 3, 3)


def test_orientation_in_xmp_counts() -> None:
    xmp = b'<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf tiff:Orientation="8"/></x:xmpmeta>'
    assert shown(encoded(corners(), "JPEG", xmp=xmp)).shape == (48, 32, 3)


@pytest.mark.parametrize("tags", [b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0" + bytes(30)])
def test_damaged_metadata_does_not_matter(tags: bytes) -> None:
    assert shown(encoded(corners(), "JPEG", exif=tags)).shape == (32, 48, 3)


@pytest.mark.parametrize("orientation", [0, 9, 65535])
def test_orientations_that_do_not_exist_mean_upright(orientation: int) -> None:
    assert shown(encoded(corners(), "JPEG", exif=exif(orientation))).shape == (32, 48, 3)


# Modes

# Mode -> how much its colours may differ: palettes are dithered.
PLAIN = {"1": 256, "L": 2, "P": 60, "RGB": 0, "CMYK": 1, "YCbCr": 3, "LAB": 4}


@pytest.mark.parametrize(
    ("kind", "mode"), [("TIFF", mode) for mode in PLAIN] + [("PNG", mode) for mode in ("1", "L", "P", "RGB")]
)
def test_modes_show_their_colours(kind: str, mode: str) -> None:
    pixels = shown(encoded(corners().convert(mode), kind))
    if mode in {"1", "L"}:
        assert (pixels == pixels[..., :1]).all()
    if mode != "1":
        expected = np.asarray(corners().convert("L").convert("RGB") if mode == "L" else corners()).astype(int)
        assert np.abs(pixels - expected).max() <= PLAIN[mode]


def test_black_and_white() -> None:
    assert shown(png(8, 1, 1, 0, b"\xf0"))[0, :, 0].tolist() == [255] * 4 + [0] * 4


@pytest.mark.parametrize("mode", ["LA", "RGBA", "PA"])
def test_transparency_is_white_and_half_of_it_is_half(mode: str) -> None:
    image = Image.new("RGBA", (3, 1), (*GREY, 255))
    image.putpixel((1, 0), (*GREY, 0))
    image.putpixel((2, 0), (*GREY, 128))
    pixels = shown(encoded(image.convert(mode), "TIFF"))[0, :, 0]
    grey = GREY[0]
    assert np.abs(pixels - [grey, 255, (grey + 255) // 2]).max() <= 1


def test_premultiplied_alpha() -> None:
    image = Image.new("RGBA", (1, 1), (200, 100, 0, 128)).convert("RGBa")
    rgb, alpha = images._opaque(image)
    assert np.abs(np.asarray(rgb)[0, 0].astype(int) - [200, 100, 0]).max() <= 1
    assert alpha is not None
    assert alpha.getpixel((0, 0)) == 128


def test_palette_with_transparent_entries() -> None:
    palette = [*RED, *GREEN, *BLUE]
    image = Image.new("P", (3, 1))
    image.putpalette(palette)
    image.putdata([0, 1, 2])
    pixels = shown(encoded(image, transparency=bytes([255, 0, 128])))
    assert pixels[0, 0].tolist() == list(RED)
    assert pixels[0, 1].tolist() == [255, 255, 255]
    assert np.abs(pixels[0, 2] - (np.array(BLUE) + 255) / 2).max() <= 1
    assert shown(encoded(image, transparency=1))[0].tolist() == [list(RED), [255] * 3, list(BLUE)]


@pytest.mark.parametrize(
    ("depth", "kind", "row", "key", "expected"),
    [
        (8, 0, bytes([0, 7, 255]), struct.pack(">H", 7), [0, 255, 255]),
        (1, 0, b"\x80", struct.pack(">H", 0), [255, 255, 255]),
        (16, 0, struct.pack(">3H", 0, 300, 65535), struct.pack(">H", 300), [0, 255, 255]),
        (8, 2, bytes([0, 0, 0, 7, 7, 7, 9, 9, 9]), struct.pack(">3H", 7, 7, 7), [0, 255, 9]),
        (
            16,
            2,
            struct.pack(">9H", *[0] * 3, *[32768] * 3, *[2570] * 3),
            struct.pack(">3H", *[32768] * 3),
            [0, 255, 10],
        ),
    ],
)
def test_one_colour_that_means_transparent(depth: int, kind: int, row: bytes, key: bytes, expected: list[int]) -> None:
    assert shown(png(3, 1, depth, kind, row, (b"tRNS", key)))[0, :, 0].tolist() == expected


def test_first_frame_of_animations() -> None:
    frames = [Image.new("RGB", (9, 9), colour) for colour in (RED, GREEN, BLUE)]
    for kind, options in {"GIF": {}, "WEBP": {"lossless": True}, "PNG": {}, "TIFF": {}}.items():
        content = encoded(frames[0], kind, save_all=True, append_images=frames[1:], **options)
        assert np.abs(shown(content)[4, 4] - RED).max() <= 2, kind


DEEP = np.array([0, 256, 257, 32767, 32768, 65279, 65535], dtype=np.uint16)
SCALED = np.rint(DEEP / 257).astype(int)


def test_16_bits_are_scaled_not_clipped() -> None:
    grey = shown(png(7, 1, 16, 0, DEEP.astype(">u2").tobytes()))[0, :, 0]
    assert grey.tolist() == SCALED.tolist()
    colour = shown(png(7, 1, 16, 2, np.repeat(DEEP, 3).astype(">u2").tobytes()))[0, :, 0]
    assert np.abs(colour - SCALED).max() <= 1
    assert colour[-1] == 255
    assert shown(encoded(Image.fromarray(DEEP[None]), "TIFF"))[0, :, 0].tolist() == SCALED.tolist()


def test_16_bits_with_alpha() -> None:
    alpha = np.array([65535] * 6 + [0])
    row = np.stack([DEEP, alpha], axis=-1).astype(">u2").tobytes()
    assert np.abs(shown(png(7, 1, 16, 4, row))[0, :6, 0] - SCALED[:6]).max() <= 1
    assert shown(png(7, 1, 16, 4, row))[0, 6].tolist() == [255, 255, 255]


def test_white_may_be_zero() -> None:
    assert shown(tiff(DEEP, 16, photometric=0))[0, :, 0].tolist() == (255 - SCALED).tolist()
    assert shown(tiff(np.arange(9, dtype=np.uint8), 8, photometric=0))[0, :, 0].tolist() == list(range(255, 246, -1))


def test_12_bits() -> None:
    packed = np.frombuffer(bytes([0xFF, 0xF0, 0x00, 0x80, 0x00, 0x00]), np.uint8)
    assert shown(tiff(packed, 12, width=4))[0, :, 0].tolist() == [255, 0, 128, 0]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (np.array([0, 0.5, 1], np.float32), [0, 128, 255]),
        (np.array([0, 100.4, 255], np.float32), [0, 100, 255]),
        (np.array([0, 25700, 65535], np.float32), [0, 100, 255]),
        (np.array([0, 100, 255], np.int32), [0, 100, 255]),
        (np.array([0, 25700, 65535], np.int32), [0, 100, 255]),
    ],
)
def test_32_bits_by_the_smallest_scale_that_holds_them(values: np.ndarray, expected: list[int]) -> None:
    assert shown(tiff(values, 32, sample_format=3 if values.dtype == np.float32 else 2))[0, :, 0].tolist() == expected


@pytest.mark.parametrize("flip", [False, True])
def test_pixels_resize_then_mirror_then_crop(flip: bool) -> None:
    image = corners(60, 40)
    geometry = Geometry((40, 60), (20, 30), (2, 3), (16, 24), flip)
    resized = np.asarray(image.resize((30, 20), Image.Resampling.BOX))
    expected = (resized[:, ::-1] if flip else resized)[2:18, 3:27]
    pixels = images.pixels(image, geometry, "box")
    assert pixels.dtype == np.uint8
    assert pixels.flags.writeable
    assert (pixels == expected).all()


@pytest.mark.parametrize("name", resize.FILTERS)
def test_every_filter_keeps_a_plain_colour(name: str) -> None:
    geometry = Geometry((9, 9), (32, 32), (0, 0), (32, 32), False)
    assert (images.pixels(Image.new("RGB", (9, 9), RED), geometry, name) == RED).all()


@pytest.mark.parametrize("name", resize.FILTERS)
@given(st.tuples(*[st.integers(1, 300)] * 4), st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_filters_are_those_of_pillow(name: str, sides: tuple[int, int, int, int], seed: int) -> None:
    """Whoever resizes: two of 256 levels apart at most, since both round twice. (Where the first of both passes would
    go below black or above white, its order matters more, and Pillow's depends on the sizes.)"""
    height, width, *size = sides
    values = np.random.default_rng(seed).integers(80, 176, (height, width, 3), dtype=np.uint8)
    found = resize.resized(Image.fromarray(values), (size[0], size[1]), name)
    wanted = np.asarray(Image.fromarray(values).resize((size[1], size[0]), resize.FILTERS[name]))
    assert found.dtype == np.uint8
    assert found.flags.c_contiguous
    assert np.abs(found.astype(int) - wanted).max() <= 2


@pytest.mark.parametrize("name", ["lanczos", "bicubic", "bilinear"])
def test_a_torch_without_a_filter_leaves_it_to_pillow(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the cache knows the difference."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (70, 90, 3), dtype=np.uint8))
    by_torch = resize.made_by(name)
    monkeypatch.delattr(f"torch._C._nn._upsample_{name}2d_aa")
    assert resize.made_by(name) == name != by_torch
    wanted = np.asarray(image.resize((31, 53), resize.FILTERS[name]))
    assert (resize.resized(image, (53, 31), name) == wanted).all()


@given(st.integers(1, 40), st.integers(1, 40), st.booleans(), st.data())
@settings(max_examples=60, deadline=None)
def test_crops_without_resizing_are_slices(height: int, width: int, flip: bool, data: st.DataObject) -> None:
    top, left = data.draw(st.integers(0, height - 1)), data.draw(st.integers(0, width - 1))
    size = data.draw(st.integers(1, height - top)), data.draw(st.integers(1, width - left))
    array = np.random.default_rng(height * 100 + width).integers(0, 256, (height, width, 3), dtype=np.uint8)
    geometry = Geometry((height, width), (height, width), (top, left), size, flip)
    expected = (array[:, ::-1] if flip else array)[top : top + size[0], left : left + size[1]]
    assert (images.pixels(Image.fromarray(array), geometry, "lanczos") == expected).all()


@pytest.mark.parametrize(
    "geometry",
    [
        Geometry((40, 60), (20, 30), (5, 0), (16, 16), False),
        Geometry((40, 60), (20, 30), (0, 15), (16, 16), False),
        Geometry((40, 60), (20, 30), (-1, 0), (16, 16), False),
        Geometry((60, 40), (20, 30), (0, 0), (16, 16), False),
    ],
)
def test_geometry_of_another_picture_is_a_mistake(geometry: Geometry) -> None:
    with pytest.raises(ValueError, match="picture"):
        images.pixels(corners(60, 40), geometry, "lanczos")
