"""Files at any address that fsspec opens: a folder here, s3://, gs://, https://, ..."""

from typing import Any

from sdxl_trainer.data.sources.tree import natural
from sdxl_trainer.errors import UserError

KINDS = (".tar", ".parquet")
# The address of a file, and a stamp that changes with it.
File = tuple[str, str]


def opened(address: str) -> tuple[Any, str]:
    """The file system of an address, and the path on it."""
    import fsspec

    return fsspec.core.url_to_fs(address)


def files(address: str, place: str) -> tuple[str, list[File]]:
    """The kind of the files at an address (a file of `KINDS`, or a folder), and these in natural order of their names.
    UserError where there are none, or some of both kinds."""
    try:
        system, path = opened(address)
        names = [path] if path.endswith(KINDS) else [p for p in system.find(path) if p.endswith(KINDS)]
        found = [_stamped(system, name) for name in sorted(names, key=natural)]
    except ImportError as error:
        raise UserError(str(error), place, "install what the address needs, for example: pip install s3fs") from None
    except (OSError, ValueError) as error:
        raise UserError(f"the address cannot be opened: {error}", place, "check spelling, rights and network") from None
    kinds = sorted({kind for kind in KINDS if any(name.endswith(kind) for name in names)})
    if not found:
        fix = "pack the pictures in WebDataset shards (.tar) or parquet, or copy the folder to this machine"
        raise UserError("there are no .tar shards and no parquet files at this address", place, fix)
    if len(kinds) > 1:
        what = "there are both .tar shards and parquet files at this address"
        raise UserError(what, place, "give each kind a folder, and a data set, of its own")
    return kinds[0], found


def _stamped(system: Any, name: str) -> File:
    info = system.info(name)
    changed = [info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "created")]
    return system.unstrip_protocol(name), f"{name}:{info['size']}:{changed}"
