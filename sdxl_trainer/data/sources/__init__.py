"""Where pictures and captions come from: a folder of pictures, a local dataset folder, shards, or the hub.

A new kind of source is one module with a function that gives records, and one line in `records`.
"""

import logging
import re
import stat
from collections.abc import Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np

from sdxl_trainer import keyed
from sdxl_trainer.config import Data
from sdxl_trainer.data.problems import Notes
from sdxl_trainer.data.records import Lasting, Readers, Record, Records, kept, known, packed
from sdxl_trainer.data.sources import addresses, dataset, folder, metadata, shards, tables
from sdxl_trainer.data.sources.tree import read_file, scan, stamp
from sdxl_trainer.errors import UserError, shortened

READERS: Readers = {
    "file": read_file,
    "row": dataset.read_row,
    "shard": shards.read,
    "passing": tables.read_passing,
}
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
log = logging.getLogger("sdxl_trainer")


def records(
    data: Data,
    *,
    seed: int,
    where: str,
    datasets_dir: str | None = None,
    split: str | None = None,
    index_dir: Path | None = None,
    notes: Notes | None = None,
) -> Records:
    """The pictures of one data set with their captions, in a fixed order; no picture is opened.

    `where` names the option in messages (data.0.path), `datasets_dir` is where hub datasets are kept, `split`
    takes the place of `data.split`, `index_dir` is where it is kept what lies where in shards. UserError names
    everything that is wrong with the data set at once; with `notes` it is noted, and pictures that cannot be used are
    left out.
    """
    rows = _records(data, split or data.split, where, datasets_dir, index_dir, notes)
    found = _packed(rows, data, where, index_dir.parent if index_dir else None, notes)
    if data.max_samples is None:
        return found
    if data.max_samples > len(found):
        log.warning("%s: max_samples is %d, there are %d pictures: all are used", where, data.max_samples, len(found))
    if notes is not None:
        notes.skipped[where]["not drawn (max_samples)"] += len(found) - data.max_samples
    return found.take(np.array(subset(len(found), data.max_samples, seed)))


def _packed(
    rows: Iterable[Record] | Lasting, data: Data, where: str, folder: Path | None, notes: Notes | None
) -> Records:
    # With notes all is read, since the counts of what is left out are wanted too.
    keep = folder if notes is None else None
    lasting = None
    while isinstance(rows, Lasting):
        before = known(rows, READERS, keep) if keep else None
        if before is not None:
            for line in before.told:
                log.warning("%s", line)
            return before
        lasting, rows = rows, rows.rows()
    if data.caption_only and data.caption is not None:
        alone = (data.caption.strip(),)
        rows = (replace(record, captions=alone, seconds=()) for record in rows)
    if lasting is None or keep is None:
        return packed(rows, READERS, folder)
    return kept(lasting, rows, READERS, keep, READERS.keys() - {"file"})


def pictures(folder: Path, place: str, mask_suffix: str) -> list[str]:
    """Names of the pictures in a folder and below; none where there is no folder yet."""
    return list(scan(folder, place, mask_suffix).pictures) if folder.is_dir() else []


def subset(count: int, wanted: int, seed: int) -> list[int]:
    """`wanted` of the numbers 0..count-1, ascending. A larger subset of the same seed contains a smaller one."""
    draw = keyed.generator(seed, "subset").random(count)
    return sorted(np.argsort(draw, kind="stable")[:wanted].tolist())


def _records(
    data: Data, split: str, where: str, datasets_dir: str | None, index_dir: Path | None, notes: Notes | None
) -> Iterable[Record] | Lasting:
    place = f"{where} = '{data.path}'"
    if "://" in data.path:
        return _addressed(data, split, place, datasets_dir, index_dir, notes)
    path = _folder(data.path, place)
    if path is None:
        return _remote(data, split, place, datasets_dir, index_dir, notes)
    _refuse(data, ("disk",), "this is a folder here, of which no copies are made", place)
    if dataset.is_saved(path):
        _refuse_folders_only(data, place)
        _refuse(data, ("name", "folder"), "the dataset was saved with save_to_disk", place)
        return dataset.saved(data, path, split, place, notes)
    root = path / (data.folder or "")
    if not root.is_dir():
        raise UserError(
            f"there is no sub-folder '{data.folder}'", place, f"allowed: {shortened(_folders(path)) or 'none'}"
        )
    mark = stamp(root)
    told: list[str] = []
    made = partial(_scanned, data, path, split, place, datasets_dir, index_dir, notes, told)
    of = [data.model_dump(mode="json"), split, place, _stamped(metadata.named(data, root))]
    return made() if mark is None else Lasting(of, mark, made, files=True, told=told)


def _stamped(path: Path | None) -> list[int]:
    """What changes with a file that need not lie in the folder of pictures."""
    status = path.stat() if path else None
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns] if status else []


def _scanned(
    data: Data,
    path: Path,
    split: str,
    place: str,
    datasets_dir: str | None,
    index_dir: Path | None,
    notes: Notes | None,
    told: list[str],
) -> Iterable[Record] | Lasting:
    """What a folder here holds: pictures, a dataset or shards. What the user is told is added to `told`."""
    tree = scan(path / (data.folder or ""), place, data.mask_suffix, notes)
    tables = [path.relative_to(tree.root).as_posix() for path in tree.tables]
    of_shards = not tree.pictures and set(addresses.without_tables([*tree.archives, *tables])).isdisjoint(tables)
    if tree.tables and not of_shards and (not tree.pictures or dataset.holds(tree.tables[0], data.image_column)):
        _refuse_folders_only(data, place)
        return dataset.loaded(data, split, place, datasets_dir, path, notes)
    if not tree.pictures and tree.archives and all(name.endswith(".tar") for name in tree.archives):
        return _addressed(data, split, place, datasets_dir, index_dir, notes)
    _refuse(data, ("name",), "this is a folder of pictures", place)
    found = folder.records(data, tree, split, place, notes)
    told += tree.told
    return found


def _addressed(
    data: Data, split: str, place: str, datasets_dir: str | None, index_dir: Path | None, notes: Notes | None
) -> Lasting:
    kind, files = addresses.files(data.path, place)
    what = {".tar": "these are shards", ".parquet": "these are files at an address"}[kind]
    _refuse(data, ("name", "folder"), what, place)
    _refuse_folders_only(data, place, what, ("file", "column") if kind == ".tar" else ("file",))
    if split != "train":
        raise UserError(f"no split '{split}' in {what.split()[-1]}", place, "give the address of that split's files")
    if kind == ".tar":
        _refuse(data, ("disk",), f"{what}, of which no copies are made", place)
        return shards.records(data, files, place, index_dir, notes)
    return tables.records(data, files, split, place, datasets_dir, notes)


def _folder(text: str, place: str) -> Path | None:
    """The local folder that a path names, None if there is nothing of that name."""
    try:
        path = Path(text).expanduser()
        mode = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise UserError(
            f"the folder cannot be opened: {error.strerror}", place, "check the path and its rights"
        ) from None
    if not stat.S_ISDIR(mode):
        raise UserError("the path of a data set is a file, not a folder", place, "give the folder that holds it")
    return path


def _remote(
    data: Data, split: str, place: str, datasets_dir: str | None, index_dir: Path | None, notes: Notes | None
) -> Lasting:
    if HUB_ID.fullmatch(data.path):
        _refuse_folders_only(data, place)
        if data.disk is None:
            return dataset.loaded(data, split, place, datasets_dir, None, notes)
        kind, files = tables.of_hub(data, split, place, datasets_dir)
        if kind == ".tar":
            return shards.records(data, files, place, index_dir, notes)
        return tables.records(data, files, split, place, datasets_dir, notes)
    raise UserError(
        "there is no such folder, and it is not the id of a dataset on the hub either",
        place,
        f"check the spelling (relative paths start at {Path.cwd()}); hub ids are written owner/name",
    )


def _refuse_folders_only(
    data: Data,
    place: str,
    reason: str = "this is a dataset, not a folder of pictures",
    masks: tuple[str, ...] = ("file",),
) -> None:
    if data.kohya_folders:
        raise UserError(f"'kohya_folders' has no effect: {reason}", place, "remove 'kohya_folders'")
    for option in ("metadata", "caption_extension"):
        if getattr(data, option) is not None:
            raise UserError(f"'{option}' has no effect: {reason}", place, f"remove '{option}'")
    if data.caption_per_line and "column" not in masks:
        raise UserError(f"'caption_per_line' has no effect: {reason}", place, "remove 'caption_per_line'")
    if data.mask in masks:
        other = ["alpha"] if "column" in masks else ["column", "alpha"]
        fix = "set mask = " + " or ".join(f'"{kind}"' for kind in other)
        raise UserError(f"'mask' has no effect: {reason}", place, fix)


def _refuse(data: Data, options: tuple[str, ...], reason: str, place: str) -> None:
    for option in options:
        if getattr(data, option) is not None:
            raise UserError(f"'{option}' has no effect: {reason}", place, f"remove '{option}'")


def _folders(path: Path) -> list[str]:
    return sorted(entry.name for entry in path.iterdir() if entry.is_dir() and not entry.name.startswith("."))
