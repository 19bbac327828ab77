"""Files at any address that fsspec opens: a folder here, s3://, gs://, https://, hf://, ... Here alone addresses are
opened, what may pass is tried again, and what the libraries of clouds raise is put in words.

Credentials are those libraries' own (environment, profiles, logins): a config holds none.
"""

import errno
import hashlib
import posixpath
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, TypeVar

from sdxl_trainer import files
from sdxl_trainer.errors import Interrupted, UserError

T = TypeVar("T")
# The bytes of a file, if they are known, and a text that changes with it.
File = tuple[int | None, str]

# Seconds before each further try of what may pass: about a minute in all.
WAITS: tuple[float, ...] = (1, 2, 4, 8, 16, 32)
# Of the statuses of HTTP that blame the request those that may pass.
PASSING = {408, 425, 429}
# Errors that are the same at the next try.
LASTING = (
    FileNotFoundError,
    PermissionError,
    FileExistsError,
    IsADirectoryError,
    NotADirectoryError,
    ImportError,
    ValueError,
    NotImplementedError,
)
# Errors of the disk here.
FULL = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EFBIG}
# Modules whose errors speak of what was done with a file, or of a mistake here, and not of the network.
OURS = sys.stdlib_module_names - {"asyncio", "http"}
# Bytes that are read at a time of a file that is read whole.
BLOCK = 1 << 20
# Stores without folders: what is asked to make one there makes a bucket, of a name that may be a slip.
BUCKETS = {"s3", "s3a", "gs", "gcs", "az", "abfs", "abfss", "oss", "obs", "hf"}
# What libraries call what changes with a file, beside its size.
MARKS = ("ETag", "etag", "mtime", "LastModified", "created", "blob_id", "Last-Modified")


class Gone(UserError):
    """There is no file at an address."""


def opened(address: str, where: str) -> tuple[Any, str]:
    """The file system of an address, and the path on it. UserError, at `where`, if nothing here opens it."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except (ValueError, ImportError) as error:
        raise _refusal(error, address, where) from None


def asked(call: Callable[[], T], address: str, where: str) -> T:
    """What a call to the library of an address gives, tried again while it fails for a reason that may pass.
    UserError, at `where`, for all other reasons; `Gone` where there is nothing."""
    waits = iter(WAITS)
    while True:
        with _Caught() as caught:
            return call()
        assert caught.error is not None
        wait = None if _lasts(caught.error) else next(waits, None)
        if wait is None:
            raise _refusal(caught.error, address, where) from None
        time.sleep(wait)


def part(address: str, start: int, end: int, where: str) -> bytes:
    """The bytes start..end - 1 of a file, fewer if it ends before. Nothing else of it is fetched."""

    def read() -> bytes:
        system, path = opened(address, where)
        # Other file systems read ahead, megabytes for each part.
        options = {} if system.async_impl else {"cache_type": "none"}
        return system.cat_file(path, start=start, end=end, **options)

    content = asked(read, address, where)
    if len(content) > end - start:
        what = f"the server of {address} sends the whole file where a part of it is asked for"
        raise UserError(what, where, "use a server that knows ranges (nginx, Apache, caddy), or copy the files here")
    return content


def listed(address: str, where: str) -> dict[str, File] | None:
    """The files in a folder by their names; None where there is no such folder."""

    def look() -> list[dict[str, Any]]:
        system, path = opened(address, where)
        system.invalidate_cache(path)
        return system.ls(path, detail=True)

    try:
        found = asked(look, address, where)
    except Gone:
        return None
    return {posixpath.basename(i["name"]): (i.get("size"), stamp(i)) for i in found if i["type"] == "file"}


def stamp(info: Mapping[str, Any]) -> str:
    """A text that changes with a file of which this is known."""
    return f"{info.get('size')}:{[str(info[mark]) for mark in MARKS if info.get(mark) is not None]}"


def stamped(address: str, where: str) -> str | None:
    """The stamp of one file, None where it is not there."""

    def look() -> dict[str, Any]:
        system, path = opened(address, where)
        system.invalidate_cache(posixpath.dirname(path))
        return system.info(path)

    try:
        return stamp(asked(look, address, where))
    except Gone:
        return None


def fetch(address: str, path: Path, where: str) -> None:
    """Copy a file from an address to a new place here."""

    def copy() -> None:
        system, source = opened(address, where)
        system.get_file(source, str(path))

    asked(copy, address, where)


def put(path: Path, address: str, where: str) -> None:
    """Copy a file to an address, and look whether all of it is there."""

    def copy() -> int:
        system, target = opened(address, where)
        if not BUCKETS & set([system.protocol] if isinstance(system.protocol, str) else system.protocol):
            system.makedirs(posixpath.dirname(target), exist_ok=True)
        system.put_file(str(path), target)
        system.invalidate_cache(posixpath.dirname(target))
        return system.size(target)

    try:
        with files.explained(Path(address)):
            size = asked(copy, address, where)
    except Gone:
        fix = "check the spelling; a bucket is not made here: make it first"
        raise UserError(f"'{address}' cannot be written: its bucket is not there", where, fix) from None
    if size != path.stat().st_size:
        raise UserError(f"{address} holds {size} bytes of {path.stat().st_size}", where, "upload it again")


def sha256(address: str, where: str) -> str:
    """The hash of a file, all of which is read."""

    def read() -> str:
        system, path = opened(address, where)
        digest = hashlib.sha256()
        with system.open(path, "rb") as file:
            while block := file.read(BLOCK):
                digest.update(block)
        return digest.hexdigest()

    return asked(read, address, where)


class _Caught(AbstractContextManager["_Caught"]):
    """Keeps what a library raises, whatever it is; what is meant for the user, and our own mistakes, go on."""

    error: Exception | None = None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if isinstance(error, Exception) and not isinstance(error, UserError | Interrupted):
            library = type(error).__module__.partition(".")[0]
            theirs = isinstance(error, (OSError, *LASTING)) or library not in OURS
            self.error = error if theirs and getattr(error, "errno", None) not in FULL else None
        return self.error is not None


def _status(error: Exception) -> int | None:
    """The status of HTTP that an error tells, by any of the names that libraries have for it."""
    told = ((error, "status"), (getattr(error, "response", None), "status_code"), (error, "code"))
    return next((status for of, name in told if isinstance(status := getattr(of, name, None), int)), None)


def _lasts(error: Exception) -> bool:
    status = _status(error)
    if status is not None:
        return 400 <= status < 500 and status not in PASSING
    return isinstance(error, LASTING) or "Credential" in type(error).__name__


def _refusal(error: Exception, address: str, where: str) -> UserError:
    """An error of a library in our words."""
    status, said = _status(error), f"{type(error).__name__}: {error}"
    if isinstance(error, ImportError):
        fix = "install what the address needs, for example: pip install s3fs (gcsfs for gs://, aiohttp for https://)"
        return UserError(f"'{address}' cannot be opened: {error}", where, fix)
    if isinstance(error, FileNotFoundError) or status == 404:
        return Gone(f"'{address}' cannot be opened: nothing is there", where, "check the spelling of the address")
    if isinstance(error, PermissionError) or status in {401, 403} or "Credential" in type(error).__name__:
        fix = "check rights and credentials; they come from the environment, or from a login with the cloud's own tool"
        return UserError(f"'{address}' cannot be opened: access is denied ({said})", where, fix)
    if isinstance(error, ValueError):
        fix = "check the spelling: a folder, or an address such as s3://bucket/run (which needs: pip install s3fs)"
        return UserError(f"'{address}' cannot be opened: {error}", where, fix)
    if _lasts(error):
        return UserError(f"'{address}' cannot be used: {said}", where, "check the address, and what is there")
    what = f"'{address}' does not answer, tried {len(WAITS) + 1} times over {sum(WAITS):.0f} seconds: {said}"
    return UserError(what, where, "check network and service; the same command goes on")
