"""Embedded colour profiles: wide-gamut, grey and CMYK pictures become sRGB, sRGB ones stay as they are."""

import struct

import numpy as np
import pytest
from handmade import corners, encoded, shown
from PIL import Image, ImageChops, ImageCms

SRGB = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB"))
# The colorants of Display P3 adapted to D50, as its profile has them (rows: X, Y, Z; columns: red, green, blue).
P3 = np.array([[0.51512, 0.29198, 0.15710], [0.24120, 0.69225, 0.06657], [-0.00105, 0.04189, 0.78407]])
SRGB_COLORANTS = np.array([[0.43607, 0.38515, 0.14307], [0.22249, 0.71687, 0.06061], [0.01392, 0.09708, 0.71410]])


def profile_with_primaries(colorants: np.ndarray) -> bytes:
    """ImageCms' own sRGB profile with other primaries written into it."""
    profile = bytearray(SRGB.tobytes())
    count = struct.unpack_from(">I", profile, 128)[0]
    for index in range(count):
        name, offset, _ = struct.unpack_from(">4sII", profile, 132 + 12 * index)
        if name in {b"rXYZ", b"gXYZ", b"bXYZ"}:
            xyz = np.rint(colorants[:, b"rgb".index(name[:1])] * 65536).astype(int)
            struct.pack_into(">3i", profile, offset + 8, *xyz.tolist())
    return bytes(profile)


def profile(space: bytes, kind: bytes, tags: dict[bytes, bytes]) -> bytes:
    """A small ICC version 2 profile made by hand."""
    offset, table, body = 128 + 4 + 12 * len(tags), struct.pack(">I", len(tags)), b""
    for name, data in tags.items():
        data += bytes(-len(data) % 4)
        table += struct.pack(">4sII", name, offset + len(body), len(data))
        body += data
    head = struct.pack(
        ">I4sI4s4s4s", offset + len(body), b"\0\0\0\0", 0x02100000, kind, space, b"Lab " if b"A2B0" in tags else b"XYZ "
    )
    head += bytes(12) + b"acsp" + bytes(28) + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)
    return head + bytes(128 - len(head)) + table + body


WHITE = b"XYZ \0\0\0\0" + struct.pack(">3i", 0xF6D6, 0x10000, 0xD32D)


def to_linear(values: np.ndarray) -> np.ndarray:
    return np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)


def from_linear(values: np.ndarray) -> np.ndarray:
    values = values.clip(0, 1)
    return np.where(values <= 0.0031308, values * 12.92, 1.055 * values ** (1 / 2.4) - 0.055)


def test_wide_gamut_becomes_srgb() -> None:
    colours = np.array([[200, 100, 50], [60, 180, 90], [128, 128, 128], [255, 255, 255], [10, 20, 200]])
    image = Image.fromarray(colours[None].astype(np.uint8))
    linear = to_linear(colours / 255) @ P3.T @ np.linalg.inv(SRGB_COLORANTS).T
    expected = from_linear(linear) * 255
    assert np.abs(expected - colours).max() > 15
    for kind, options in {"PNG": {}, "TIFF": {}, "WEBP": {"lossless": True}}.items():
        pixels = shown(encoded(image, kind, icc_profile=profile_with_primaries(P3), **options))
        assert np.abs(pixels[0] - expected).max() <= 2, kind


def test_transparent_wide_gamut_is_white_where_transparent() -> None:
    image = Image.new("RGBA", (2, 1), (200, 100, 50, 0))
    image.putpixel((1, 0), (200, 100, 50, 255))
    pixels = shown(encoded(image, icc_profile=profile_with_primaries(P3)))
    assert pixels[0, 0].tolist() == [255, 255, 255]
    assert pixels[0, 1, 0] > 210


# Other makers' sRGB profiles round its primaries otherwise.
@pytest.mark.parametrize("icc", [SRGB.tobytes(), profile_with_primaries(SRGB_COLORANTS + 1.5e-4)], ids=["own", "other"])
def test_srgb_pictures_are_not_touched(icc: bytes) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (20, 20, 3), dtype=np.uint8)
    assert (shown(encoded(Image.fromarray(pixels), icc_profile=icc)) == pixels).all()


def test_grey_profile() -> None:
    gamma = b"curv\0\0\0\0" + struct.pack(">IH", 1, round(1.8 * 256))
    icc = profile(b"GRAY", b"mntr", {b"wtpt": WHITE, b"kTRC": gamma})
    values = np.arange(0, 256, 5, dtype=np.uint8)
    pixels = shown(encoded(Image.fromarray(values[None]), icc_profile=icc))
    assert np.abs(pixels[0, :, 0] - from_linear((values / 255) ** 1.8) * 255).max() <= 2


def test_cmyk_profile() -> None:
    identity = struct.pack(">9i", 65536, 0, 0, 0, 65536, 0, 0, 0, 65536)
    ramp = bytes(range(256))
    # Two grid points per ink. Black ink is black; without it, all is L* = 53.2, a* = 80.1, b* = 67.2: the red of sRGB.
    table = (
        b"mft1\0\0\0\0" + bytes([4, 3, 2, 0]) + identity + ramp * 4 + bytes([136, 208, 195, 0, 128, 128]) * 8 + ramp * 3
    )
    icc = profile(b"CMYK", b"prtr", {b"wtpt": WHITE, b"A2B0": table})
    pixels = shown(encoded(Image.new("CMYK", (4, 4), (100, 0, 30, 0)), "JPEG", icc_profile=icc))
    assert np.abs(pixels[1, 1] - [255, 0, 0]).max() <= 12


@pytest.mark.parametrize("icc", [b"not a profile", profile(b"GRAY", b"mntr", {b"wtpt": WHITE}), SRGB.tobytes()[:200]])
def test_profiles_that_make_no_sense_are_ignored(icc: bytes) -> None:
    assert (shown(encoded(corners(), icc_profile=icc)) == np.asarray(corners())).all()


def test_profile_of_another_colour_space_is_ignored() -> None:
    grey = corners().convert("L")
    assert (shown(encoded(grey, icc_profile=profile_with_primaries(P3)))[..., 0] == np.asarray(grey)).all()


def test_cmyk_jpeg_with_and_without_adobes_inversion() -> None:
    image = corners().convert("CMYK")
    inverted = encoded(image, "JPEG", quality=95)
    # Pillow always writes Adobe's kind: turned over and without the mark it is the other one.
    other = encoded(ImageChops.invert(image), "JPEG", quality=95)
    start = other.index(b"\xff\xee")
    plain = other[:start] + other[start + 2 + struct.unpack_from(">H", other, start + 2)[0] :]
    assert b"Adobe" in inverted
    assert b"Adobe" not in plain
    for content in (inverted, plain):
        assert np.abs(shown(content)[8::16, 12::24] - np.asarray(corners())[8::16, 12::24]).max() < 6
