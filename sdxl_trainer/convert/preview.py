"""A picture that shows what a file does: small in its header, and beside it for the browsers of models."""

from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.data import images
from sdxl_trainer.errors import UserError

SIDE = 256  # of the thumbnail, at most


def thumbnail(picture: Path) -> str:
    """A JPEG of at most 256 x 256 pixels as a data URL, as `modelspec.thumbnail` wants it."""
    opened = _opened(picture)
    opened.thumbnail((SIDE, SIDE))
    return images.data_url(opened, quality=85)


def beside(path: Path, picture: Path) -> Path:
    """`name.preview.png` beside `name.safetensors`, where A1111 and ComfyUI look for it."""
    place = path.with_name(f"{path.stem}.preview.png")
    opened = _opened(picture)
    files.write_atomically(place, lambda draft: opened.save(draft, "PNG"))
    return place


def _opened(picture: Path) -> Any:
    from PIL import Image, UnidentifiedImageError

    try:
        with Image.open(picture) as opened:
            return opened.convert("RGB")
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError) as error:
        said = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise UserError(f"the preview cannot be read: {said}", str(picture), "give a PNG, JPEG or WebP") from None
