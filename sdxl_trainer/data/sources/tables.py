"""Records of parquet files at any address that fsspec opens, and of hub datasets that are not to be copied whole.

A row of a parquet file cannot be read by itself: each file is copied, a few rows in memory at a time, into an Arrow
file where datasets are kept, and its rows are read from there as those of any dataset. Where `disk` bounds the copies,
those that were opened longest ago make room for the next, and are made again when they are wanted: pictures are looked
at and encoded in the order of their files, so that this happens once for each.
"""

import fcntl
import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache, partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from sdxl_trainer import addresses, files
from sdxl_trainer.config import Data
from sdxl_trainer.config.section import bytes_of
from sdxl_trainer.data.problems import Notes
from sdxl_trainer.data.records import Lasting
from sdxl_trainer.data.sources import dataset
from sdxl_trainer.data.sources.addresses import KINDS, File, stamped
from sdxl_trainer.errors import UserError, closest, shortened

# Rows in memory at a time.
BATCH = 100


def records(
    data: Data, found: list[File], split: str, place: str, datasets_dir: str | None, notes: Notes | None = None
) -> Lasting:
    """The rows of all files, in their order."""
    import datasets

    root = Path(datasets_dir or datasets.config.HF_DATASETS_CACHE).expanduser()
    folder = root / ("addresses" if data.disk is None else "passing")
    names = [hashlib.sha256(f"1 {address} {stamp}".encode()).hexdigest()[:32] for address, stamp in found]
    copies = [str(folder / f"{name}.arrow") for name in names]
    if data.disk is None:
        for (address, _), copy in zip(found, copies, strict=True):
            with _alone(folder):
                if not Path(copy).is_file():
                    _copy(address, Path(copy), place)

    def parts() -> list[dataset.Part]:
        made, offset = list[dataset.Part](), 0
        for (address, _), name, copy in zip(found, names, copies, strict=True):
            if data.disk is None:
                opened, read = partial(_opened, copy), partial(dataset.read_row, copy)
                count, schema = (table := opened()).num_rows, table.schema
            else:
                where: Any = (address, copy, round(bytes_of(data.disk)))
                opened, read = partial(_passing, *where), partial(read_passing, *where)
                count, schema = addresses.asked(partial(_footer, address, place), address, place)
            rows = SimpleNamespace(column_names=schema.names, features=datasets.Features.from_arrow_schema(schema))
            dataset.require_columns(data, rows, place)
            made += dataset.cut(dataset.Part(opened, read, split, offset, 0, count, name))
            offset += count
        return made

    made = partial(dataset.rows, data, parts, split, place, [folder], notes)
    return Lasting([data.model_dump(mode="json")], names, made)


def of_hub(data: Data, split: str, place: str, datasets_dir: str | None) -> tuple[str, list[File]]:
    """The kind of a hub dataset's files, and those of a split, at the revision that it has now. None is downloaded."""
    import datasets

    wrong = (datasets.exceptions.DatasetsError, OSError, ValueError, RuntimeError)
    try:
        builder = datasets.load_dataset_builder(data.path, name=data.name, data_dir=data.folder, cache_dir=datasets_dir)
    except wrong as error:
        raise dataset.not_loaded(error, place, None) from None
    splits = {str(name): [str(file) for file in found] for name, found in (builder.config.data_files or {}).items()}
    if split not in splits:
        fix = f"set 'split'; {closest(split, splits)}" if splits else "remove 'disk'"
        raise UserError(f"the dataset has no files of a split '{split}'", place, f"{fix} (of a part: max_samples)")
    kinds = {kind for kind in KINDS if any(file.endswith(kind) for file in splits[split])}
    if len(kinds) != 1 or not all(file.endswith(KINDS) for file in splits[split]):
        what = "with 'disk' a dataset is read from parquet files or from .tar shards, and this one has"
        raise UserError(f"{what} {shortened(splits[split], 2)}", place, "remove 'disk': it is downloaded whole then")

    def stamp(address: str) -> File:
        system, path = addresses.opened(address, place)
        return stamped(system, path)

    return kinds.pop(), [addresses.asked(partial(stamp, file), file, place) for file in splits[split]]


def read_passing(address: str, copy: str, limit: int, column: str, row: int, name: str) -> bytes:
    """The bytes of the picture in one row of a parquet file, which is copied once more if its copy made room."""
    return dataset.picture(partial(_passing, address, copy, limit), column, row, name)


@lru_cache(maxsize=2)
def _passing(address: str, copy: str, limit: int) -> Any:
    """The rows of a parquet file by its copy. Few are open at a time: what is open takes room on the disk."""
    path = Path(copy)
    with _alone(path.parent):
        if not path.is_file():
            _copy(address, path, address)
            _make_room(path, limit)
        os.utime(path)
        return _opened(copy)


def _opened(copy: str) -> Any:
    import pyarrow

    try:
        return dataset.arrow.__wrapped__(copy)
    except (OSError, pyarrow.ArrowException) as error:
        what = f"the copy of a parquet file is damaged: {error}"
        raise UserError(what, copy, "delete it: it is copied once more") from None


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """One thread of one process at a time makes or deletes copies in a folder."""
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        with (folder / ".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def _make_room(kept: Path, limit: int) -> None:
    """Delete the copies that were opened longest ago, until all together take no more than `limit` bytes."""
    there = sorted(kept.parent.glob("*.arrow"), key=lambda path: path.stat().st_mtime_ns)
    taken = sum(path.stat().st_size for path in there)
    for path in there:
        if taken > limit and path != kept:
            taken -= path.stat().st_size
            path.unlink()


def _footer(address: str, place: str) -> tuple[int, Any]:
    """How many rows a parquet file has, and their schema; nothing else of it is read."""
    import pyarrow.parquet

    system, path = addresses.opened(address, place)
    with system.open(path, "rb") as stream:
        try:
            file = pyarrow.parquet.ParquetFile(stream)
        except pyarrow.ArrowException as error:
            raise _broken(address, place, error) from None
        return file.metadata.num_rows, file.schema_arrow


def _broken(address: str, place: str, error: Exception) -> UserError:
    what = f"the parquet file {address} cannot be copied: {' '.join(str(error).split())}"
    return UserError(what, place, "write the file once more")


def _copy(address: str, copy: Path, place: str) -> None:
    """A parquet file as an Arrow file, whole or absent."""
    import pyarrow
    import pyarrow.parquet

    def rows(draft: Path) -> None:
        system, path = addresses.opened(address, place)
        with system.open(path, "rb") as stream:
            source = pyarrow.parquet.ParquetFile(stream)
            with (
                pyarrow.OSFile(os.fspath(draft), "wb") as sink,
                pyarrow.ipc.new_stream(sink, source.schema_arrow) as writer,
            ):
                for batch in source.iter_batches(BATCH):
                    writer.write_batch(batch)

    def write(draft: Path) -> None:
        try:
            rows(draft)
        except pyarrow.ArrowException as error:
            raise _broken(address, place, error) from None

    files.write_atomically(copy, lambda draft: addresses.asked(partial(write, draft), address, place))
