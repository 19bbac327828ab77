"""Columns of numbers found by a 128-bit key: sorted, on disk, memory-mapped. A look-up touches a few pages, so that a
table of any length costs next to no memory.

Tables hold what can be found out again: losing one costs time only.
"""

import hashlib
import json
import mmap
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trainer import files
from sdxl_trainer.errors import UserError
from sdxl_trainer.formats import header

# Rows that are looked at together.
BATCH = 8192
_TYPES = {"I64": "<i8", "I32": "<i4", "U8": "u1"}


def key(name: str) -> tuple[int, int]:
    """The two halves of a name's key."""
    digest = hashlib.blake2b(name.encode("utf-8", "surrogatepass"), digest_size=16).digest()
    return int.from_bytes(digest[:8], "little", signed=True), int.from_bytes(digest[8:], "little", signed=True)


def keys(names: Iterable[str]) -> np.ndarray:
    """int64 [n, 2]."""
    encoded = (name.encode("utf-8", "surrogatepass") for name in names)
    whole = b"".join(hashlib.blake2b(name, digest_size=16).digest() for name in encoded)
    return np.frombuffer(whole, dtype="<i8").reshape(-1, 2)


def grouped(rows: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """An order of the rows int64 [n, k] in which equal ones follow each other as they came, and where in it each group
    begins, bool [n]. Of large sets this takes a fraction of the time and memory of `np.unique`."""
    order = np.lexsort(rows.T)
    begins = np.zeros(len(rows), dtype=bool)
    begins[:1] = True
    for column in rows.T:
        ordered = column[order]
        begins[1:] |= ordered[1:] != ordered[:-1]
    return order, begins


def present(numbers: np.ndarray) -> np.ndarray:
    """Which small numbers there are, ascending. `np.unique` would import numpy.ma to tell: a third of the time in which
    a start sees that all is cached."""
    return np.flatnonzero(np.bincount(numbers))


def distinct(rows: np.ndarray) -> np.ndarray:
    """Where each different row of int64 [n, k] comes first, ascending."""
    order, begins = grouped(rows)
    return np.sort(order[begins])


def let_go(columns: Iterable[np.ndarray]) -> None:
    """Give the pages of memory-mapped columns back to the system: they count as this process's memory once they were
    looked at, and come back when they are looked at again."""
    bases: list[Any] = [column.base for column in columns]
    for mapped in {id(base): base for base in bases if isinstance(base, mmap.mmap)}.values():
        if hasattr(mmap, "MADV_DONTNEED"):
            mapped.madvise(mmap.MADV_DONTNEED)


@dataclass
class Table:
    """`columns` of one length, in the order of `key` int64 [n], then `low` int64 [n]; `notes` are short texts."""

    columns: dict[str, np.ndarray]
    notes: dict[str, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.columns["key"])

    def find(self, wanted: np.ndarray) -> np.ndarray:
        """The places of keys int64 [m, 2], -1 for those that are not there."""
        parts = [self._find(wanted[start : start + BATCH]) for start in range(0, len(wanted), BATCH)]
        return np.concatenate([np.zeros(0, "<i8"), *parts])

    def _find(self, wanted: np.ndarray) -> np.ndarray:
        high, low = self.columns["key"], self.columns["low"]
        if not len(high):
            return np.full(len(wanted), -1)
        places = np.searchsorted(high, wanted[:, 0])
        while True:  # as good as never more than once: 64 bits are alike
            inside = np.minimum(places, len(high) - 1)
            same = (high[inside] == wanted[:, 0]) & (places < len(high))
            other = same & (low[inside] != wanted[:, 1])
            if not other.any():
                return np.where(same, inside, -1)
            places = places + other

    def place(self, name: str) -> int:
        """The place of one name, -1 if it is not there."""
        wanted, low = key(name)
        high = self.columns["key"]
        at = int(np.searchsorted(high, wanted))
        while at < len(high) and high[at] == wanted:
            if self.columns["low"][at] == low:
                return at
            at += 1
        return -1

    def with_rows(self, found: np.ndarray, columns: Mapping[str, np.ndarray], first: str) -> "Table":
        """A table with more rows, of keys [m, 2]; of rows with one key that with the least of the column `first` is
        kept."""
        more = {"key": found[:, 0], "low": found[:, 1], **columns}
        whole = {name: np.concatenate([self.columns[name], more[name]]) for name in self.columns}
        order = np.lexsort((whole[first], whole["low"], whole["key"]))
        high, low = whole["key"][order], whole["low"][order]
        kept = np.ones(len(order), dtype=bool)
        kept[1:] = (high[1:] != high[:-1]) | (low[1:] != low[:-1])
        return Table({name: column[order[kept]] for name, column in whole.items()}, self.notes)

    def save(self, path: Path) -> None:
        save_columns(path, self.columns, self.notes)


def save_columns(path: Path, columns: Mapping[str, np.ndarray], notes: Mapping[str, str]) -> None:
    """Write columns with a hash of them and of the notes."""
    import torch

    tensors = {name: torch.from_numpy(np.ascontiguousarray(column)) for name, column in columns.items()}
    digest = _digest([columns[name] for name in sorted(columns)], notes)
    # One entry: safetensors writes several in no fixed order, and equal tables shall make equal bytes.
    told = {"notes": json.dumps({**notes, "sha256": digest}, sort_keys=True)}
    with files.explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        files.write_atomically(path, lambda draft: files.save_tensors(draft, tensors, told))


def empty(columns: Mapping[str, tuple[str, Sequence[int]]]) -> Table:
    """A table without rows; columns by type and shape of a row."""
    more = {name: np.zeros((0, *shape), dtype=kind) for name, (kind, shape) in columns.items()}
    return Table({"key": np.zeros(0, "<i8"), "low": np.zeros(0, "<i8"), **more})


def opened(path: Path, columns: Mapping[str, tuple[str, Sequence[int]]]) -> Table:
    """The table at a path, memory-mapped; an empty one where there is none, or one that is damaged."""
    made = empty(columns)
    found = open_columns(path, {name: column.shape[1:] for name, column in made.columns.items()})
    return made if found is None else Table(*found)


def open_columns(
    path: Path, shapes: Mapping[str, tuple[int, ...]]
) -> tuple[dict[str, np.ndarray], dict[str, str]] | None:
    """Memory-mapped columns with rows of these shapes, and their notes; None for what is not there or damaged."""
    try:
        with path.open("rb") as file:
            whole = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        entries, told, start = header.parsed(lambda a, b: whole[a:b], len(whole), str(path), "delete it")
        notes = json.loads(told["notes"])
        found = {name: _column(whole, entries[name], start) for name in shapes}
    except (OSError, UserError, KeyError, ValueError, TypeError):
        return None
    fitting = all(found[name].shape[1:] == shape for name, shape in shapes.items())
    digest = notes.pop("sha256", "")
    if not fitting or digest != _digest([found[name] for name in sorted(found)], notes):
        return None
    return found, notes


def _column(whole: mmap.mmap, entry: Mapping[str, Any], start: int) -> np.ndarray:
    kind, shape = _TYPES[entry["dtype"]], tuple(entry["shape"])
    if 0 in shape:
        raise KeyError("no rows")
    return np.ndarray(shape, kind, whole, start + entry["data_offsets"][0])


def _digest(columns: Sequence[np.ndarray], notes: Mapping[str, str]) -> str:
    digest = hashlib.sha256(json.dumps(notes, sort_keys=True).encode())
    for column in columns:
        for start in range(0, len(column), BATCH):
            digest.update(np.ascontiguousarray(column[start : start + BATCH]).data)
        if len(column) > BATCH:
            let_go([column])
    return digest.hexdigest()
