"""Photographs of phones (HEIC): upright, in sRGB, 8 bits; without the package that reads them they are named."""

import contextlib
import io
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pillow_heif
import pytest
from folders import captions, records, write
from handmade import BLUE, GREEN, GREY, RED, corners, encoded, exif, shown
from PIL import Image
from test_image_profiles import P3, profile_with_primaries

from sdxl_trainer.data import images
from sdxl_trainer.data.sources import tree
from sdxl_trainer.errors import UserError

# Coded without chroma subsampling; what HEVC loses of flat colours is a few levels.
FINE = {"quality": 95, "chroma": 444}
CLOSE = 4


def heic(image: Image.Image, **options: Any) -> bytes:
    pillow_heif.register_heif_opener()
    return encoded(image, "HEIF", **FINE | options)


def at_corners(pixels: np.ndarray) -> np.ndarray:
    height, width = pixels.shape[:2]
    return pixels[[height // 4, height // 4, -height // 4, -height // 4], [width // 4, -width // 4] * 2]


@pytest.mark.parametrize("orientation", range(1, 9))
def test_rotation_is_applied_once(orientation: int) -> None:
    """Phones write it twice: as a transformation of the picture, which counts, and in EXIF, which does not."""
    turned = corners(64, 48)
    if orientation in images.UPRIGHT:  # what the sensor saw: turned once more as the tag says, it is upright
        back = {6: Image.Transpose.ROTATE_90, 8: Image.Transpose.ROTATE_270}
        turned = turned.transpose(back.get(orientation, images.UPRIGHT[orientation]))
    found = shown(heic(turned, exif=exif(orientation).tobytes()))
    assert found.shape == (48, 64, 3)
    assert np.abs(at_corners(found) - np.array([RED, GREEN, BLUE, GREY])).max() <= CLOSE


def test_photographs_in_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    """As phones write them: a picture of 512 x 512 tiles, the last ones cut off, turned as a whole."""
    monkeypatch.setattr(pillow_heif.options, "GRID_TILE_SIZE", 512)
    content = heic(corners(520, 600).transpose(Image.Transpose.ROTATE_90), exif=exif(6).tobytes())
    assert b"grid" in content
    found = shown(content)
    assert found.shape == (600, 520, 3)
    assert np.abs(at_corners(found) - np.array([RED, GREEN, BLUE, GREY])).max() <= CLOSE


def test_wide_gamut_becomes_srgb_as_in_other_formats() -> None:
    profile = profile_with_primaries(P3)
    picture = corners(64, 48)
    expected = shown(encoded(picture, icc_profile=profile))
    assert np.abs(expected - np.asarray(picture).astype(int)).max() > 10
    assert np.abs(at_corners(shown(heic(picture, icc_profile=profile))) - at_corners(expected)).max() <= CLOSE


def test_ten_bits_become_eight() -> None:
    """All the range: white is 255, and the steps between are even."""
    ramp = np.repeat(np.linspace(0, 65535, 256).astype(np.uint16)[None, :, None], 3, axis=2).repeat(64, axis=0)
    file = io.BytesIO()
    pillow_heif.from_bytes("RGB;16", (256, 64), ramp.tobytes()).save(file, quality=-1, chroma=444)
    found = shown(file.getvalue())
    assert np.abs(found[32, :, 1] - np.arange(256)).max() <= 1
    assert found[32, -1].tolist() == [255, 255, 255]


def test_what_is_transparent_is_laid_on_white() -> None:
    picture = corners(64, 48)
    picture.putalpha(Image.new("L", (64, 48), 0))
    assert shown(heic(picture)).min() >= 255 - CLOSE


def test_thumbnails_in_the_file_are_not_taken_for_the_picture() -> None:
    file = io.BytesIO()
    made = pillow_heif.from_pillow(corners(256, 192))
    made.info["thumbnails"] = [128]
    made.save(file, **FINE)
    assert images.small(file.getvalue(), "a.heic", 64).size == (64, 48)
    assert not pillow_heif.options.THUMBNAILS


def test_damaged_ones_are_named() -> None:
    whole = bytearray(heic(Image.effect_noise((64, 64), 80).convert("RGB")))
    rng = np.random.default_rng(0)
    broken = [whole[:size] for size in rng.integers(13, len(whole), 30)]
    for at in rng.integers(32, len(whole), 60):
        broken.append(whole[:at] + bytes([whole[at] ^ 0xFF]) + whole[at + 1 :])
    refused = len(broken)
    for content in broken:
        with contextlib.suppress(UserError):
            images.decode(bytes(content), "IMG_1.HEIC")
            refused -= 1
    assert refused >= 30, "at least what is cut short"


def test_folders_with_and_without_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.WARNING)
    files = {"IMG_1.HEIC": heic(corners()), "IMG_1.txt": "x", "IMG_2.heif": heic(corners()), "IMG_2.HEIC.txt": "no"}
    write(tmp_path, files | {"IMG_2.txt": "y"})
    assert captions(records(tmp_path)) == {"IMG_1.HEIC": ("x",), "IMG_2.heif": ("y",)}
    monkeypatch.setattr(images, "HEIC", False)
    with pytest.raises(UserError, match="a HEIC photo") as caught:
        images.probe(files["IMG_1.HEIC"], "IMG_1.HEIC")
    assert caught.value.fix == "pip install pillow-heif, or convert it to JPEG or PNG"
    monkeypatch.setattr(tree, "PICTURES", tree.PICTURES - {".heic", ".heif"})
    with pytest.raises(UserError, match=r"1 \.heic, 1 \.heif") as caught:
        records(tmp_path)
    assert "pip install pillow-heif" in caught.value.fix
    write(tmp_path, {"a.png": None, "a.txt": "z"})
    assert captions(records(tmp_path)) == {"a.png": ("z",)}
    assert "convert .heic and .heif to JPEG or PNG to train on them, or for .heic pip install" in caplog.text
