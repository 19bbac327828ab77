"""One run in an output folder at a time: a lock of the operating system, which a crash releases."""

import errno
import fcntl
import json
import os
import socket
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from sdxl_trainer import files
from sdxl_trainer.errors import UserError

NAME = ".lock"
# What file systems say that know no locks; they are trusted to have one user.
_UNKNOWN = {errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL}
_TRIES = 20


@contextmanager
def held(folder: Path, main: bool = True) -> Iterator[None]:
    """Hold the folder, which is made if it is missing, for as long as the block runs, after it was swept: who holds it
    is alone there. Of the processes of one run only the main one does. UserError names who holds it already."""
    if not main:
        yield
        return
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = _acquired(folder / NAME)
    try:
        with files.explained(folder):
            files.sweep(folder)
        yield
    finally:
        # Removed while it is held: whoever waits for this file sees that it is no longer the folder's.
        (folder / NAME).unlink(missing_ok=True)
        os.close(descriptor)


def is_held(folder: Path) -> bool:
    """Whether a run holds the folder, by what its lock says; of another machine's processes nothing more is known."""
    try:
        told = json.loads((folder / NAME).read_text(encoding="utf-8"))
        return told["host"] != socket.gethostname() or _lives(told["pid"], told.get("began"))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _lives(pid: int, began: str | None) -> bool:
    """Whether a process is there, and not another one that has its number now."""
    with suppress(PermissionError):  # somebody else's process: it is there
        os.kill(pid, 0)
    return None in (began, now := _began(pid)) or began == now


def _began(pid: int) -> str | None:
    """When a process began, in the system's own count; None where it does not tell (macOS)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[19]
    except (OSError, ValueError, IndexError):
        return None


def _acquired(path: Path) -> int:
    """A descriptor of the locked file. POSIX record locks, unlike flock's, are not inherited by worker processes,
    which may outlive a killed run by seconds; and they reach over NFS."""
    for _ in range(_TRIES):
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        try:
            fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in _UNKNOWN:
                return descriptor
            holder = _holder(descriptor)
            os.close(descriptor)
            if error.errno not in {errno.EACCES, errno.EAGAIN}:
                raise
            what = f"another run is at work in this folder{holder}"
            raise UserError(what, str(path.parent), "wait for it or stop it, or choose another output_dir") from None
        if _is_at(descriptor, path):
            told = {"pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%F %T")}
            told["began"] = _began(os.getpid())
            os.truncate(descriptor, 0)
            os.write(descriptor, json.dumps(told).encode())
            return descriptor
        os.close(descriptor)  # its last holder removed it while we opened it
    raise UserError("the lock of this folder changes hands all the time", str(path), "start one run at a time")


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(descriptor), path.stat())
    except FileNotFoundError:
        return False


def _holder(descriptor: int) -> str:
    try:
        told = json.loads(os.read(descriptor, 4096))
        return f": process {told['pid']} on {told['host']}, since {told['since']}"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
