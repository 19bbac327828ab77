"""Encoded pictures to pixels: every format, mode and rotation becomes upright 8-bit RGB, or an error that names it.

Decisions (each changes pixels; `DECODER` is part of the cache keys and must change with them):
- Transparency is composited over white, the paper that most cut-out pictures were made for.
- Pictures with an embedded ICC profile are converted to sRGB, which is what the VAE was trained on: shown without
  conversion, wide-gamut photographs are dull. A profile that maps every colour to (nearly) itself is left alone, and
  one that is broken or of another colour space than the picture is ignored, as browsers do.
- 16-bit pictures are scaled to 8 bits, never clipped (colour ones by Pillow, which rounds down). 32-bit ones have no
  defined range: see `_full_scale`.
- The first frame of animations is used.
"""

import base64
import io
import re
import struct
import warnings
import zlib
from collections.abc import Callable
from functools import cache, lru_cache
from importlib.util import find_spec
from typing import Any

import numpy as np
from PIL import Image, ImageChops, UnidentifiedImageError, features

from sdxl_trainer.data import resize
from sdxl_trainer.data.geometry import Geometry
from sdxl_trainer.errors import UserError

DECODER = "1" if features.check("littlecms2") else "1 without ICC"
# Pillow refuses to open more than this (twice its MAX_IMAGE_PIXELS); three bytes each make half a gigabyte.
MAX_PIXELS = 178_956_970
# Only what training pictures come in: other plug-ins of Pillow start programs (EPS) or are seldom looked after.
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF") + (("AVIF",) if features.check("avif") else ())
ANIMATIONS = {"GIF", "PNG", "WEBP", "AVIF"}  # several pictures in a JPEG or TIFF are sizes or pages
# Photographs of phones, with an extra: its plug-in is asked for these alone, and only once there is one.
HEIC = find_spec("pillow_heif") is not None
HEIC_BRANDS = {b"heic", b"heix", b"heim", b"heis", b"hevc", b"hevx", b"hevm", b"hevs"}
GET_HEIC = "pip install pillow-heif"
# EXIF orientation to what makes the picture upright. From 5 on, height and width change places.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
ORIENTATION = 0x0112
# What Pillow's plug-ins raise on damaged files.
DAMAGED = (
    OSError,
    SyntaxError,
    ValueError,
    TypeError,
    EOFError,
    IndexError,
    KeyError,
    RuntimeError,
    struct.error,
    zlib.error,
)
# Where a PNG keeps its orientation. Any of them may follow the pixels, so that Pillow has to decode to look.
PNG_METADATA = (b"eXIf", b"XML:com.adobe.xmp", b"Raw profile type exif")
# Beginnings of what is often found in place of a picture: (offset, bytes, what it is, what to do).
CONVERT = "convert it to JPEG or PNG"
DOWNLOAD = "download the picture itself"
FOREIGN = (
    (0, b"version https://git-lfs", "a Git LFS pointer", "run 'git lfs pull' to get the picture itself"),
    (0, b"<!", "a web page", DOWNLOAD),
    (0, b"<html", "a web page", DOWNLOAD),
    (0, b"<svg", "an SVG drawing", CONVERT),
    (0, b"<?xml", "an XML or SVG file", CONVERT),
    (0, b"%PDF", "a PDF document", CONVERT),
    (0, b"%!PS", "a PostScript document", CONVERT),
    (0, b"8BPS", "a Photoshop document", CONVERT),
    (0, b"PK\x03\x04", "a zip archive", "unpack it"),
    (4, b"ftyphe", "a damaged HEIC photo", CONVERT),
    (4, b"ftypmif", "a HEIF picture that is neither HEIC nor AVIF", CONVERT),
    (4, b"ftypavif", "a damaged AVIF picture, or one that this Pillow cannot read", CONVERT),
    (4, b"ftyp", "a video", "take the frames out of it"),
    (0, b"\xff\x0a", "a JPEG XL picture", CONVERT),
    (0, b"\0\0\0\x0cJXL", "a JPEG XL picture", CONVERT),
    (0, b"\0\0\0\x0cjP", "a JPEG 2000 picture", CONVERT),
    (0, b"v/1\x01", "an OpenEXR picture", CONVERT),
)
NO_WARNINGS = ("ignore", None, Warning, re.compile(r"PIL\."), 0)
REPLACE = "replace the file with a whole one, or take it out of the data set"


def probe(content: bytes, name: str) -> tuple[int, int]:
    """(height, width) in pixels after EXIF rotation, from the header alone. UserError names the picture."""
    _quiet()
    image = _open(content, name)
    try:
        turned = _orientation(image, content) >= 5
    except DAMAGED as error:
        raise _damaged(error, name) from None
    return (image.width, image.height) if turned else (image.height, image.width)


def decode(content: bytes, name: str) -> Image.Image:
    """The whole picture as upright RGB, 8 bits per channel. UserError names a picture that cannot be read."""
    return _upright(content, name, _rgb)


def small(content: bytes, name: str, side: int) -> Image.Image:
    """The whole upright picture as RGB, made smaller until its longer side is `side`. JPEG is decoded at a fraction of
    its size, which takes a fraction of the time and reads every byte all the same. UserError as `decode`."""
    made = _upright(content, name, _rgb, side)
    made.thumbnail((side, side), Image.Resampling.BOX)
    return made


def animated(content: bytes, name: str) -> bool:
    """Are there frames after the first, which is the one that is read? UserError as `decode`."""
    _quiet()
    image = _open(content, name)
    try:
        return image.format in ANIMATIONS and bool(getattr(image, "is_animated", False))
    except DAMAGED:
        return True  # there is a second one, damaged


def opacity(content: bytes, name: str) -> Image.Image:
    """The upright picture's alpha channel, mode L; white all over where there is none."""
    return _upright(content, name, _alpha)


def _upright(
    content: bytes, name: str, converted: Callable[[Image.Image, str], Image.Image], side: int | None = None
) -> Image.Image:
    _quiet()
    image = _open(content, name)
    try:
        if side is not None:
            image.draft(None, (2 * side, 2 * side))
        upright = UPRIGHT.get(_orientation(image, content))
        image.load()
        _correct_transparency(image, content)
        made = converted(image, name)
    except DAMAGED as error:
        raise _damaged(error, name) from None
    return made if upright is None else made.transpose(upright)


def pixels(image: Image.Image, geometry: Geometry, interpolation: str) -> np.ndarray:
    """The training picture, uint8 [height, width, 3]: resized with a filter of `resize.FILTERS`, mirrored, cropped."""
    return cut(resized(image, geometry, interpolation), geometry)


def resized(image: Image.Image, geometry: Geometry, interpolation: str) -> np.ndarray:
    """uint8 [height, width, 3] of the geometry's resized size, which several crops may share. ValueError if the
    geometry was not made for this picture."""
    if (image.height, image.width) != geometry.original:
        raise ValueError(f"the picture is {image.height} x {image.width}, its geometry is for {geometry.original}")
    return resize.resized(image, geometry.resized, interpolation)


def cut(picture: np.ndarray, geometry: Geometry) -> np.ndarray:
    """Mirror and crop a resized picture, [rows, columns, 3], or [rows, columns] of a grey one: a copy. ValueError if
    the crop leaves the picture."""
    (rows, columns), (top, left), (height, width) = geometry.resized, geometry.crop, geometry.target
    if top < 0 or left < 0 or top + height > rows or left + width > columns:
        raise ValueError(f"the crop leaves the picture: {geometry}")
    mirrored = picture[:, ::-1] if geometry.flip else picture
    return mirrored[top : top + height, left : left + width].copy()


def data_url(image: Image.Image, kind: str = "JPEG", **options: Any) -> str:
    """A picture as a page or a header holds it: a file of this kind, written with Pillow's options, as text."""
    file = io.BytesIO()
    image.save(file, kind, **options)
    return f"data:image/{kind.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def _quiet() -> None:
    """No warnings from Pillow: they speak of metadata that nobody needs, of large pictures, for which there is a limit
    here, or of what becomes an error when the pixels are read. (`catch_warnings` is not for threads.)"""
    if NO_WARNINGS not in warnings.filters:
        warnings.filterwarnings("ignore", module=NO_WARNINGS[3].pattern)


def _open(content: bytes, name: str) -> Image.Image:
    """The picture with its header read and its pixels not."""
    if not content:
        raise UserError("the picture is empty (zero bytes)", name, REPLACE)
    try:
        image = Image.open(io.BytesIO(content), formats=_formats(content, name))
    except UnidentifiedImageError:
        raise _unidentified(content, name) from None
    except Image.DecompressionBombError:
        raise _too_large("more", name) from None
    except DAMAGED as error:
        raise _damaged(error, name) from None
    if image.width * image.height > MAX_PIXELS:
        raise _too_large(f"{image.width} x {image.height}, more", name)
    return image


def _formats(content: bytes, name: str) -> tuple[str, ...]:
    """Under which plug-ins of Pillow to look for the picture's own. UserError for a HEIC photo without the extra."""
    size = int.from_bytes(content[:4]) if content[4:8] == b"ftyp" else 0
    brands = {content[at : at + 4] for at in (8, *range(16, min(size, 256), 4))}
    if not size or not brands & HEIC_BRANDS:
        return FORMATS
    if not HEIC:
        what = "not a picture that can be read without an extra package, but a HEIC photo"
        raise UserError(what, name, f"{GET_HEIC}, or {CONVERT}")
    _open_heic()
    return ("HEIF",)


@cache
def _open_heic() -> None:
    """The whole picture is decoded, never the thumbnail in its file, and by the thread that asks for it."""
    import pillow_heif

    pillow_heif.register_heif_opener(thumbnails=False, depth_images=False, aux_images=False, decode_threads=1)


def _unidentified(content: bytes, name: str) -> UserError:
    start = content[:64].lstrip(b"\xef\xbb\xbf \t\r\n") if content[:1] in b"<\xef \t\r\n" else content[:64]
    for offset, mark, what, fix in FOREIGN:
        if start[offset : offset + len(mark)].lower() == mark.lower():
            return UserError(f"not a picture that can be read, but {what}", name, fix)
    supported = ", ".join(FORMATS)
    return UserError(f"not a picture that can be read ({supported}), or its beginning is damaged", name, REPLACE)


def _too_large(size: str, name: str) -> UserError:
    what = f"the picture has {size} than {MAX_PIXELS / 1e6:.0f} million pixels"
    return UserError(what, name, "make the picture smaller; training uses a few million pixels at most")


def _damaged(error: Exception, name: str) -> UserError:
    return UserError(f"the picture is damaged: {error}", name, REPLACE)


def _orientation(image: Image.Image, content: bytes) -> int:
    """The EXIF (or XMP) orientation 1 to 8 that is still to be applied; 1 when there is none or it is unreadable."""
    if image.format in {"TIFF", "HEIF"}:
        return 1  # These are turned as they are read, and their size is given turned.
    if image.format == "PNG" and "exif" not in image.info:
        if not any(mark in content for mark in PNG_METADATA):
            return 1
        image.load()
    try:
        orientation = image.getexif().get(ORIENTATION, 1)
    except DAMAGED:
        return 1  # Damaged metadata; viewers show such a picture as it is stored, and so was it captioned.
    return orientation if orientation in UPRIGHT else 1


def _correct_transparency(image: Image.Image, content: bytes) -> None:
    """Pillow reads PNG with 16-bit RGB as 8 bits, but leaves the colour that means transparent at 16."""
    colour = image.info.get("transparency")
    if image.format == "PNG" and content[24:26] == b"\x10\x02" and isinstance(colour, tuple):
        image.info["transparency"] = tuple(value >> 8 for value in colour)


def _rgb(image: Image.Image, name: str) -> Image.Image:
    """Any mode to RGB: 8 bits, colours to sRGB, transparency over white."""
    profile = image.info.get("icc_profile")
    image, alpha = _opaque(_eight_bit(image, name))
    image = _colours(image, profile)
    if alpha is not None:
        paper = Image.new("RGB", image.size, "white")
        paper.paste(image, mask=alpha)
        return paper
    return image


def _alpha(image: Image.Image, name: str) -> Image.Image:
    opaque, alpha = _opaque(_eight_bit(image, name))
    return Image.new("L", opaque.size, 255) if alpha is None else alpha


def _eight_bit(image: Image.Image, name: str) -> Image.Image:
    """Grey pictures of 12, 16 or 32 bits or floats as mode L (LA where one value means transparent)."""
    if not image.mode.startswith(("I", "F")):
        return image
    values = np.asarray(image).astype(np.float64)
    scale = _full_scale(image, values, name)
    levels = np.rint(values * (255 / scale)).astype(np.uint8)
    tags: Any = getattr(image, "tag_v2", {})
    if tags.get(262) == 0 and image.mode != "F":
        levels = 255 - levels  # TIFF's "white is zero", which Pillow heeds for 8 bits only.
    grey = Image.fromarray(levels)
    transparent = image.info.get("transparency")
    if isinstance(transparent, int):
        grey.putalpha(Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8)))
    return grey


def _full_scale(image: Image.Image, values: np.ndarray, name: str) -> int:
    """The value of white. 32-bit integers and floats have none by definition: it is the smallest of 1 (floats only),
    255 and 65535 that holds all values. Negative, larger and non-finite values are refused."""
    if image.mode.startswith("I;16"):
        tags: Any = getattr(image, "tag_v2", {})
        bits = tags.get(258, (16,))
        return int((1 << (bits[0] if isinstance(bits, tuple) else bits)) - 1)
    low, high = float(values.min()), float(values.max())
    scales = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    if low >= 0:
        for scale in scales:
            if high <= scale:
                return scale
    what = f"pixel values from {low:g} to {high:g}; understood are 0 to 1 (floats), 255 or 65535"
    raise UserError(what, name, "save the picture with 8 or 16 bits per channel")


def _opaque(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours of a picture and its alpha channel (mode L) if it has any transparency."""
    if not image.has_transparency_data:
        return image.convert("RGB" if image.palette else "L") if image.mode in {"1", "P"} else image, None
    grey = image.mode in {"1", "L", "LA", "La"}
    image = image.convert("LA" if grey else "RGBA")
    return image.convert("L" if grey else "RGB"), image.getchannel("A")


def _colours(image: Image.Image, profile: bytes | None) -> Image.Image:
    """Mode L, RGB, CMYK, YCbCr, LAB or HSV to RGB, through the embedded profile where that means something else."""
    if image.mode not in {"L", "RGB", "CMYK"}:
        return image.convert("RGB")
    if image.mode == "CMYK" and image.format == "JPEG" and "adobe" not in image.info:
        image = ImageChops.invert(image)  # Pillow takes Adobe's inversion for granted.
    transform = _to_srgb(profile, image.mode) if profile else None
    return image.convert("RGB") if transform is None else transform.apply(image)


@lru_cache(maxsize=32)
def _to_srgb(profile: bytes, mode: str) -> Any:
    """An ImageCms transform from a profile to sRGB; None if it is not needed, not possible or makes no sense."""
    if not features.check("littlecms2"):
        return None
    from PIL import ImageCms

    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        if source.profile.xcolor_space.strip() != {"L": "GRAY"}.get(mode, mode):
            return None
        transform = ImageCms.buildTransform(source, ImageCms.createProfile("sRGB"), mode, "RGB")
    except (ImageCms.PyCMSError, OSError, ValueError):
        return None
    if mode == "CMYK":
        return transform
    # Names of profiles cannot be trusted ("Linear sRGB"): look at what becomes of 4096 colours instead.
    steps = np.arange(0, 256, 17, dtype=np.uint8)
    grid = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(64, 64, 3)
    probe_image = Image.fromarray(grid).convert(mode)
    change = np.asarray(transform.apply(probe_image)).astype(int) - np.asarray(probe_image.convert("RGB"))
    return transform if np.abs(change).max() > 3 else None
