"""The header of a safetensors file: which tensors it holds, and whether the file is whole. No tensor is read."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError

PICKLED = (b"PK\x03\x04", b"\x80")  # how files of `torch.save` begin, new and old
LFS = b"version "
UNPICKLE = "pickles can run code and are not opened: convert it with diffusers' save_pretrained"
# Bytes that are read of a file at first, which most headers fit in.
FIRST = 1 << 17
# No header is longer: the format says so.
LARGEST = 100_000_000

Entries = dict[str, dict[str, Any]]


def read(path: Path, fix: str) -> Entries:
    """The entries (dtype, shape, data_offsets) of all tensors by name. UserError, with `fix`, for what is no whole
    safetensors file."""
    return described(path, fix)[0]


def described(path: Path, fix: str) -> tuple[Entries, dict[str, str]]:
    """The entries of all tensors, as `read` gives them, and the file's metadata."""
    return placed(path, fix)[:2]


def placed(path: Path, fix: str) -> tuple[Entries, dict[str, str], int]:
    """The entries of all tensors, the file's metadata, and where in the file the first tensor begins."""
    if not path.is_file():
        raise UserError("this is a link that leads nowhere, or not a file", str(path), fix)
    try:
        with path.open("rb") as file:
            return parsed(lambda a, b: os.pread(file.fileno(), b - a, a), path.stat().st_size, str(path), fix)
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", str(path), "make it readable") from None


def parsed(
    part: Callable[[int, int], bytes], size: int | None, where: str, fix: str
) -> tuple[Entries, dict[str, str], int]:
    """The same of a file of `size` bytes, if that is known, anywhere: `part` gives the bytes from one place up to
    another."""
    start = part(0, FIRST if size is None else min(FIRST, size))
    length = int.from_bytes(start[:8], "little")
    if start[8:9] != b"{":
        raise _foreign(start, where, fix)
    if 8 + length > (LARGEST if size is None else size):
        raise UserError("the file is cut short or damaged: it ends within its header", where, fix)
    text = start[8 : 8 + length]
    if len(text) < length:
        text += part(8 + len(text), 8 + length)
    try:
        entries = json.loads(text)
        metadata = {str(key): str(value) for key, value in (entries.pop("__metadata__", None) or {}).items()}
        end = 8 + length + max((entry["data_offsets"][1] for entry in entries.values()), default=0)
    except (ValueError, KeyError, TypeError, IndexError, AttributeError):
        raise UserError("the file is cut short or damaged: its header cannot be read", where, fix) from None
    if size is not None and end != size:
        what = f"the file is cut short or damaged: {size:,} bytes in place of {end:,}"
        raise UserError(what, where, fix)
    return entries, metadata, 8 + length


def _foreign(start: bytes, where: str, fix: str) -> UserError:
    if not start:
        return UserError("the file is cut short or damaged: it is empty", where, fix)
    if start.startswith(PICKLED):
        return UserError("this is a pickle, not a safetensors file, whatever its name", where, UNPICKLE)
    if start.startswith(LFS):
        return UserError("this is a Git LFS pointer, not the file itself", where, "run: git lfs pull")
    return UserError("the file is cut short or damaged, or not a safetensors file", where, fix)
