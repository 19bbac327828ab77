"""What is written is whole or absent (law 8): temporary name, fsync, rename."""

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdxl_trainer.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

# In how many places a file is read to tell it from another, and how much at each.
SAMPLES, SAMPLE_BYTES = 64, 1 << 16
# Nanoseconds within which two changes of a file may have one time: file systems count in steps, of 2 s at most.
COARSE = 2_000_000_000
_FIXES = {
    errno.ENOSPC: "free some space, or choose another folder on a larger disk",
    errno.EDQUOT: "free some of your quota, or choose another folder",
    errno.EROFS: "choose a folder on a file system that can be written",
    errno.EACCES: "choose a folder that you may write, or change its permissions",
    errno.EPERM: "choose a folder that you may write, or change its permissions",
    errno.ENOTDIR: "choose another folder: a part of this path is a file",
    errno.EEXIST: "choose another folder: this path is a file",
    errno.EISDIR: "choose another place: a folder is in the way",
    errno.ELOOP: "choose another folder: links in this path lead in a circle",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.EFBIG: "choose a folder on a file system that can hold larger files",
    errno.EIO: "save what is on this disk and choose a folder on another: the disk reports errors",
}


@contextmanager
def explained(path: Path) -> Iterator[None]:
    """Turn the operating system's refusals to write into messages for the user."""
    from safetensors import SafetensorError

    try:
        yield
    except SafetensorError as error:
        # The system's refusal is told in its text alone.
        number = re.search(r"\(os error (\d+)\)", str(error))
        if number is None or int(number[1]) not in _FIXES:
            raise
        raise _refusal(int(number[1]), str(path)) from None
    except OSError as error:
        if error.errno not in _FIXES:
            raise
        # Temporary names are ours: the user knows the final one.
        named = str(error.filename or path)
        raise _refusal(error.errno, str(path) if ".tmp" in named else named) from None


def _refusal(number: int, where: str) -> UserError:
    return UserError(f"cannot write: {os.strerror(number).lower()}", where, _FIXES[number])


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write` make a file or folder under a temporary name beside `path`, then put it in `path`'s place."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            write(temporary)
            _sync_tree(temporary)
            _replace(temporary, path)
        finally:
            remove(temporary)
        _sync(path.parent)


def write_bytes(path: Path, content: bytes) -> None:
    write_atomically(path, lambda temporary: temporary.write_bytes(content))


def write_text(path: Path, text: str) -> None:
    write_bytes(path, text.encode("utf-8"))


def write_json(path: Path, value: Any) -> None:
    try:
        content = json.dumps(value, indent=1, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError:
        # File names that are not UTF-8: JSON's escapes hold them, and they are read back as they were.
        content = json.dumps(value, indent=1).encode("ascii")
    write_bytes(path, content + b"\n")


def save_tensors(path: Path, tensors: Mapping[str, "Tensor"], metadata: Mapping[str, str] | None = None) -> None:
    """A safetensors file, not atomically: for use inside of `write_atomically`. Tensors are written from where they
    lie. The metadata of a model needs `format = pt`: transformers refuses files without it."""
    from safetensors.torch import save_file

    path.touch()
    mode = path.stat().st_mode
    whole = {name: tensor.contiguous() for name, tensor in tensors.items()}
    save_file(whole, path, dict(metadata or {"format": "pt"}))
    path.chmod(mode)  # safetensors makes files that only their owner can read


def remove(path: Path) -> None:
    """Delete a file or folder if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def sampled(path: Path) -> str:
    """SHA-256 of a file's size and of parts that lie evenly in it: quick, and another for each other set of weights."""
    size = path.stat().st_size
    digest = hashlib.sha256(str(size).encode())
    with path.open("rb") as file:
        for part in range(SAMPLES):
            file.seek(size * part // SAMPLES)
            digest.update(file.read(SAMPLE_BYTES))
    return digest.hexdigest()


def forget(path: Path) -> None:
    """Let the system drop its copy of a synced file, so that it is read from the disk next; macOS cannot be told to."""
    if hasattr(os, "posix_fadvise"):
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def tree_hashes(folder: Path, known: Mapping[str, str] | None = None) -> dict[str, str]:
    """SHA-256 of every file below a folder, by relative path; those that are `known` are not read again."""
    names = {str(p.relative_to(folder)): p for p in sorted(folder.rglob("*")) if p.is_file()}
    return {name: (known or {}).get(name) or sha256(path) for name, path in names.items()}


def _replace(temporary: Path, path: Path) -> None:
    if temporary.is_dir() and path.is_dir() and not path.is_symlink():
        # A folder cannot be renamed over a full one: move the old one aside first, delete it last.
        old = path.with_name(f".{path.name}.{os.getpid()}.old")
        path.rename(old)
        temporary.rename(path)
        remove(old)
    else:
        temporary.replace(path)


def sweep(folder: Path) -> None:
    """Remove what killed processes left half-written in a folder, and put back what they had only set aside. For who
    alone writes there: a draft that another process is at would go too."""
    for path in folder.glob(".*.*"):
        name, _, kind = path.name[1:].rpartition(".")
        name, _, number = name.rpartition(".")
        if kind not in {"tmp", "old"} or not number.isdigit():
            continue
        if kind == "tmp" or (folder / name).exists():
            remove(path)
        else:
            path.rename(folder / name)


def _sync_tree(path: Path) -> None:
    if path.is_dir():
        for child in path.iterdir():
            _sync_tree(child)
    _sync(path)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
