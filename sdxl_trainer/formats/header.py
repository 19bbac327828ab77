"""The header of a safetensors file: which tensors it holds, and whether the file is whole. No tensor is read."""

import json
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError

PICKLED = (b"PK\x03\x04", b"\x80")  # how files of `torch.save` begin, new and old
LFS = b"version "
UNPICKLE = "pickles can run code and are not opened: convert it with diffusers' save_pretrained"


def read(path: Path, fix: str) -> dict[str, dict[str, Any]]:
    """The entries (dtype, shape, data_offsets) of all tensors by name. UserError, with `fix`, for what is no whole
    safetensors file."""
    return described(path, fix)[0]


def described(path: Path, fix: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """The entries of all tensors, as `read` gives them, and the file's metadata."""
    if not path.is_file():
        raise UserError("this is a link that leads nowhere, or not a file", str(path), fix)
    try:
        return _described(path, fix)
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", str(path), "make it readable") from None


def _described(path: Path, fix: str) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    size = path.stat().st_size
    with path.open("rb") as file:
        start = file.read(9)
        length = int.from_bytes(start[:8], "little")
        if start[8:] != b"{":
            raise _foreign(start, path, fix)
        if 8 + length > size:
            raise UserError("the file is cut short or damaged: it ends within its header", str(path), fix)
        file.seek(8)
        text = file.read(length)
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in (entries.pop("__metadata__", None) or {}).items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise UserError("the file is cut short or damaged: its header cannot be read", str(path), fix) from None
    if end != size:
        what = f"the file is cut short or damaged: {size:,} bytes in place of {end:,}"
        raise UserError(what, str(path), fix)
    return entries, metadata


def _foreign(start: bytes, path: Path, fix: str) -> UserError:
    if not start:
        return UserError("the file is cut short or damaged: it is empty", str(path), fix)
    if start.startswith(PICKLED):
        return UserError("this is a pickle, not a safetensors file, whatever its name", str(path), UNPICKLE)
    if start.startswith(LFS):
        return UserError("this is a Git LFS pointer, not the file itself", str(path), "run: git lfs pull")
    return UserError("the file is cut short or damaged, or not a safetensors file", str(path), fix)
