"""Data sets at any address that fsspec opens: a folder here, s3://, gs://, https://, hf://, ..."""

from typing import Any

from sdxl_trainer import addresses
from sdxl_trainer.data.sources.tree import natural
from sdxl_trainer.errors import UserError

KINDS = (".tar", ".parquet")
# The address of a file, and a stamp that changes with it.
File = tuple[str, str]


def files(address: str, place: str) -> tuple[str, list[File]]:
    """The kind of the files at an address (a file of `KINDS`, a folder, or a pattern with *), and these in the natural
    order of their names. UserError where there are none, or some of both kinds."""

    def look() -> tuple[list[str], list[File]]:
        system, path = addresses.opened(address, place)
        there = system.glob(path) if "*" in path else [path] if path.endswith(KINDS) else system.find(path)
        names = without_tables([name for name in there if name.endswith(KINDS)])
        return names, [stamped(system, name) for name in sorted(names, key=natural)]

    names, found = addresses.asked(look, address, place)
    kinds = sorted({kind for kind in KINDS if any(name.endswith(kind) for name in names)})
    if not found:
        fix = "pack the pictures in WebDataset shards (.tar) or parquet, or copy the folder to this machine"
        raise UserError("there are no .tar shards and no parquet files at this address", place, fix)
    if len(kinds) > 1:
        what = "there are both .tar shards and parquet files at this address"
        raise UserError(what, place, "give each kind a folder, and a data set, of its own")
    return kinds[0], found


def without_tables(names: list[str]) -> list[str]:
    """Without 0.parquet where there is 0.tar: img2dataset writes a table of what is in each shard beside it."""
    shards = {name.removesuffix(".tar") for name in names if name.endswith(".tar")}
    return [name for name in names if not (name.endswith(".parquet") and name.removesuffix(".parquet") in shards)]


def stamped(system: Any, name: str) -> File:
    """The address of a file, with its stamp."""
    info = system.info(name)
    changed = [info.get(key) for key in ("ETag", "etag", "mtime", "LastModified", "created")]
    more = [str(info[key]) for key in ("Last-Modified", "blob_id") if info.get(key) is not None]
    return system.unstrip_protocol(name), f"{name}:{info['size']}:{changed}{more or ''}"
