"""What is not a whole picture is named, with its cause and a fix, whatever the bytes are."""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from handmade import corners, encoded, noise, png, shown, tiff
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import ImageCms

from sdxl_trainer.data import images
from sdxl_trainer.errors import UserError

PHOTOS = Path(os.environ.get("SDXL_TRAINER_PHOTOS", Path(__file__).parents[3] / "shared" / "photos"))


def half(kind: str, **options: Any) -> Callable[[], bytes]:
    def make() -> bytes:
        content = noise(kind, **options)
        return content[: len(content) // 2]

    return make


def huge() -> bytes:
    return png(30_000, 30_000, 8, 2, b"")


WRONG: dict[str, tuple[Callable[[], bytes], str, str]] = {
    "empty": (lambda: b"", "zero bytes", "replace"),
    "text": (lambda: b"hello, this is text", "damaged", "replace"),
    "zeros": (lambda: bytes(5000), "damaged", "replace"),
    "web page": (lambda: b"\n<!DOCTYPE html><html>404</html>", "a web page", "download"),
    "web page, small letters": (lambda: b"\xef\xbb\xbf<HTML>", "a web page", "download"),
    "git lfs": (lambda: b"version https://git-lfs.github.com/spec/v1\noid sha256:0", "Git LFS pointer", "git lfs pull"),
    "svg": (lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "SVG", "convert"),
    "pdf": (lambda: b"%PDF-1.7", "PDF", "convert"),
    "zip": (lambda: b"PK\x03\x04rest", "zip archive", "unpack"),
    "heic, damaged": (lambda: b"\0\0\0\x24ftypheic\0\0\0\0", "damaged HEIC", "convert"),
    "heif of another kind": (lambda: b"\0\0\0\x18ftypmif1\0\0\0\0mif1j2ki", "neither HEIC nor AVIF", "convert"),
    "video": (lambda: b"\0\0\0\x20ftypisom\0\0\0\0", "video", "frames"),
    "photoshop": (lambda: b"8BPS\0\1" + bytes(30), "Photoshop", "convert"),
    "jpeg xl": (lambda: b"\xff\x0a" + bytes(30), "JPEG XL", "convert"),
    "postscript is not run": (lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "PostScript", "convert"),
    "bomb": (huge, "million pixels", "smaller"),
    "floats below 0": (lambda: tiff(np.array([-1, 0, 1], np.float32), 32, 1, 3), "pixel values from -1", "16 bits"),
    "not a number": (lambda: tiff(np.array([0, np.nan], np.float32), 32, 1, 3), "pixel values from nan", "16 bits"),
    "integers without scale": (lambda: tiff(np.array([0, 1 << 30], np.int32), 32, 1, 2), "pixel values", "16 bits"),
    "half a JPEG": (half("JPEG"), "damaged", "whole"),
    "half a progressive JPEG": (half("JPEG", progressive=True), "damaged", "whole"),
    "half a PNG": (half("PNG"), "damaged", "whole"),
    "half a WEBP": (half("WEBP"), "damaged", "whole"),
    "half a GIF": (half("GIF"), "damaged", "whole"),
    "half a BMP": (half("BMP"), "damaged", "whole"),
    "half a TIFF": (half("TIFF", compression="tiff_lzw"), "damaged", "whole"),
    "half an AVIF": (half("AVIF"), "damaged", "convert"),
    "only a JPEG's first bytes": (lambda: noise("JPEG")[:20], "damaged", "whole"),
}


@pytest.mark.parametrize("case", WRONG)
def test_bad_pictures_are_named(case: str) -> None:
    make, what, fix = WRONG[case]
    if case == "half an AVIF" and "AVIF" not in images.FORMATS:
        pytest.skip("this Pillow cannot write AVIF")
    with pytest.raises(UserError) as caught:
        images.decode(make(), "folder/picture.jpg")
    assert what in caught.value.what
    assert fix in caught.value.fix
    assert caught.value.where == "folder/picture.jpg"


@pytest.mark.parametrize("case", ["empty", "text", "bomb"])
def test_headers_are_enough_for_some(case: str) -> None:
    with pytest.raises(UserError, match=WRONG[case][1]):
        images.probe(WRONG[case][0](), "picture.jpg")


def test_probe_names_a_damaged_picture_whose_rotation_lies_behind_the_damage() -> None:
    content = noise("PNG")
    cut = content[: len(content) // 2] + b"eXIf"
    with pytest.raises(UserError, match="damaged"):
        images.probe(cut, "picture.png")


def test_large_but_allowed_pictures_do_not_warn() -> None:
    """Pillow itself warns from half of the limit on, and warnings are errors in these tests."""
    assert images.probe(png(12_000, 12_000, 8, 2, b""), "picture.png") == (12_000, 12_000)


def test_probe_does_not_decode() -> None:
    content = encoded(corners(4000, 4000))
    assert images.probe(content[:200], "picture.png") == (4000, 4000)


CONTENTS = {kind: noise(kind) for kind in images.FORMATS} | {
    "profile": noise("PNG", icc_profile=ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
}


@given(
    st.sampled_from(sorted(CONTENTS)),
    st.lists(st.tuples(st.integers(0, 400), st.integers(0, 255)), max_size=6),
    st.integers(0, 9000),
)
@settings(max_examples=300, deadline=None)
def test_damage_is_an_error_of_the_user_or_a_picture(kind: str, changes: list[tuple[int, int]], cut: int) -> None:
    content = bytearray(CONTENTS[kind])
    for place, value in changes:
        content[place % len(content)] = value
    damaged = bytes(content[:cut]) if cut < len(content) else bytes(content)
    try:
        image = images.decode(damaged, "picture")
    except UserError:
        return  # Any other error fails the test.
    assert images.probe(damaged, "picture") == (image.height, image.width)


def test_real_photographs() -> None:
    paths = sorted(PHOTOS.glob("*/*.jpg"))[::8]
    if not paths:
        pytest.skip(f"no photographs in {PHOTOS}; set SDXL_TRAINER_PHOTOS")
    for path in paths:
        pixels = shown(path.read_bytes())
        assert pixels.std() > 10, path
        cut = path.read_bytes()[:-2000]
        assert images.probe(cut, str(path)) == pixels.shape[:2]
        with pytest.raises(UserError, match="damaged"):
            images.decode(cut, str(path))
