"""Rows on disk: immutable safetensors shards whose own headers are the index and whose names are their hashes.

A row is one tensor; its name is a content key. Any number of processes may write side by side, since each makes
its own shards; a shard that two of them made alike has one name.
"""

import hashlib
import json
import math
import os
import tempfile
import threading
import time
import uuid
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open
from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.data.table import Table, empty, keys, let_go, opened
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import header

SHARD_BYTES = 64 << 20
_NAME_DIGITS = 32
SUMS = "checksums"  # among the notes of a shard
# Drafts that did not change for so long belong to nobody: a shard is written in seconds.
DRAFT_SECONDS = 3600
# Shards that are kept open.
OPEN = 128
# Look-ups after which the memory of what was seen of the table is given back: each sees a few pages, and many all.
LOOKS = 16
# safetensors' names of what rows are made of.
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}


def key(*parts: Any) -> str:
    """A content key: SHA-256 over what decides a row, as JSON."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


# Where a row begins in its shard, of which type and shape it is, and its checksum: -1 in shards of older
# versions, whose bytes are compared with their name at the first look, -2 where it is missing.
COLUMNS = {"begin": ("<i8", ()), "shard": ("<i4", ()), "kind": ("<i4", ()), "sum": ("<i8", ())}


@dataclass
class Store:
    """The rows of one folder, found by a sorted table of all shards' headers, which lies beside the folder. A row is
    read by itself: nothing is decoded, and no row stays in memory."""

    folder: Path
    table: Table = field(default_factory=lambda: empty(COLUMNS))
    shards: list[str] = field(default_factory=list)
    kinds: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    _opened: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _checked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))
    _looks: int = 0

    def __contains__(self, row: str) -> bool:
        return self.table.place(row) >= 0

    def __len__(self) -> int:
        return len(self.table)

    def get(self, row: str) -> Tensor:
        """A row, compared with its checksum when it is read for the first time; KeyError if there is none of that name.
        UserError if it is damaged: its shard is set aside then, so that the same command encodes it anew."""
        at = self.table.place(row)
        if at < 0:
            raise KeyError(row)
        kind, shard, begin, expected = (int(self.table.columns[name][at]) for name in ("kind", "shard", "begin", "sum"))
        self._looks += 1
        if self._looks % LOOKS == 0:
            let_go(self.table.columns.values())
        dtype, shape = self.kinds[kind]
        tensor, name = torch.empty(shape, dtype=TYPES[dtype]), self.shards[shard]
        buffer = tensor.reshape(-1).view(torch.uint8).numpy().data
        try:
            with self._lock:
                # Within the lock, for another thread may close the oldest file.
                count = os.preadv(self._file(name), [buffer], begin)
        except OSError as error:
            raise _set_aside(self.folder / name, f"a file of the cache cannot be read: {error.strerror}") from None
        if count != len(buffer):
            raise _set_aside(self.folder / name, "a file of the cache is shorter than it was")
        if len(self._checked) != len(self.table):
            self._checked = np.zeros(len(self.table), dtype=bool)
        if not self._checked[at]:
            if expected not in (-1, checksum(tensor)):
                what = "a row of the cache is damaged: its bytes are not those that were written"
                raise _set_aside(self.folder / name, what)
            self._checked[at] = True
        return tensor

    def _file(self, name: str) -> int:
        number = self._opened.pop(name, None)
        if number is None:
            while len(self._opened) >= OPEN:
                os.close(self._opened.pop(next(iter(self._opened))))
            number = os.open(self.folder / name, os.O_RDONLY)
        self._opened[name] = number
        return number

    def refresh(self) -> "Store":
        """Take in the headers of shards that are new since the last look, also those of other processes. Where one is
        gone, all are read anew."""
        there = sorted(path.name for path in self.folder.glob("*.safetensors"))
        if there == self.shards:
            return self
        if not set(self.shards) <= set(there):
            self.table, self.shards, self.kinds = empty(COLUMNS), [], []
        known, number_of = set(self.shards), {name: number for number, name in enumerate(there)}
        found = {name: _header(self.folder / name) for name in there if name not in known}
        kinds = sorted({*self.kinds, *(kind for rows in found.values() for _, kind, *_ in rows)})
        kind_of = {kind: number for number, kind in enumerate(kinds)}
        columns = self.table.columns
        if len(self.table):
            columns["shard"] = np.array([number_of[name] for name in self.shards], "<i4")[columns["shard"]]
            columns["kind"] = np.array([kind_of[kind] for kind in self.kinds], "<i4")[columns["kind"]]
        more = {
            "begin": np.array([begin for rows in found.values() for _, _, begin, _ in rows], "<i8"),
            "sum": np.array([total for rows in found.values() for *_, total in rows], "<i8"),
            "shard": np.repeat([number_of[name] for name in found], [len(rows) for rows in found.values()]).astype(
                "<i4"
            ),
            "kind": np.array([kind_of[kind] for rows in found.values() for _, kind, _, _ in rows], "<i4"),
        }
        # Of one row in two shards that of the first name is taken, whatever the order in which they came.
        names = keys(name for rows in found.values() for name, *_ in rows)
        self.table = self.table.with_rows(names, more, "shard")
        self.shards, self.kinds = there, kinds
        self._checked = np.zeros(len(self.table), dtype=bool)
        self.table.notes = {"shards": json.dumps(self.shards), "kinds": json.dumps(self.kinds)}
        return self

    def save(self) -> None:
        """Write the table, for the next start to find."""
        if self.shards and json.loads(opened(self.index, COLUMNS).notes.get("shards", "[]")) != self.shards:
            self.table.save(self.index)

    @property
    def index(self) -> Path:
        return self.folder.with_suffix(".index")

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def checksum(row: Tensor) -> int:
    """CRC-32 of a row's type, shape and bytes."""
    flat: Any = row.contiguous().reshape(-1).view(torch.uint8).numpy() if row.numel() else b""
    return zlib.crc32(flat, zlib.crc32(f"{row.dtype} {list(row.shape)}".encode()))


def _sums(metadata: dict[str, str] | None) -> dict[str, int]:
    try:
        return {str(name): int(number) for name, number in json.loads((metadata or {})["notes"])[SUMS].items()}
    except (ValueError, KeyError, TypeError, AttributeError):
        return {}


def _set_aside(path: Path, what: str) -> UserError:
    aside = path.with_name(f"{path.name}.damaged")
    with suppress(OSError):  # what cannot be renamed has to be deleted by hand
        # The table too: what it says of this shard may come from a damaged header.
        path.parent.with_suffix(".index").unlink(missing_ok=True)
        path.rename(aside)
    return UserError(what, str(path), f"it is {aside.name} now: run the same command, which encodes it anew")


def open_store(folder: Path) -> Store:
    """The rows of a folder: from its table, and the headers of shards that are not in it yet."""
    store = Store(folder)
    found = opened(store.index, COLUMNS)
    if found.notes:
        store.table, store.shards = found, json.loads(found.notes["shards"])
        store.kinds = [(dtype, tuple(shape)) for dtype, shape in json.loads(found.notes["kinds"])]
    known = store.shards
    if store.refresh().shards != known:
        store.save()
    return store


@dataclass
class Writer:
    """Collects rows and writes them as shards of about 64 MB; `notes` on rows lie in the shard's header."""

    store: Store
    rows: dict[str, Tensor] = field(default_factory=dict)
    notes: dict[str, Any] = field(default_factory=dict)
    size: int = 0

    def add(self, row: str, tensor: Tensor, note: Any = None) -> None:
        self.rows[row] = tensor.contiguous()
        self.size += tensor.numel() * tensor.element_size()
        if note is not None:
            self.notes[row] = note
        if self.size >= SHARD_BYTES:
            self.flush()

    def flush(self) -> None:
        if self.rows:
            write_shard(self.store.folder, self.rows, self.notes)
            self.rows, self.notes, self.size = {}, {}, 0
            self.store.refresh()


def write_shard(folder: Path, rows: dict[str, Tensor], notes: dict[str, Any]) -> Path:
    """One shard, under the hash of its own bytes."""
    with files.explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        draft = folder / f".{uuid.uuid4().hex}.tmp"
        try:
            # One entry: safetensors writes several in no fixed order, and equal rows shall make equal bytes.
            told = {**notes, SUMS: {name: checksum(row) for name, row in rows.items()}}
            files.save_tensors(draft, rows, {"notes": json.dumps(told, sort_keys=True)})
            path = folder / f"{files.sha256(draft)[:_NAME_DIGITS]}.safetensors"
            files.write_atomically(path, draft.rename)
        finally:
            files.remove(draft)
    return path


def damaged(folder: Path) -> list[Path]:
    """Shards whose bytes are not those that were written, and the table if it is not what the shards say."""
    bad = [p for p in sorted(folder.glob("*.safetensors")) if not p.stem == files.sha256(p)[:_NAME_DIGITS]]
    store = Store(folder)
    if bad or not store.index.is_file():
        return bad
    with tempfile.TemporaryDirectory() as anew:
        right = Path(anew) / "index"
        store.refresh().table.save(right)
        return [] if files.sha256(right) == files.sha256(store.index) else [store.index]


def collect_garbage(folder: Path, needed: Collection[str]) -> int:
    """Delete rows that are not needed; gives the bytes freed. Shards holding both kinds are written anew."""
    before, store = Store(folder).bytes(), open_store(folder)
    for path in sorted(folder.glob("*.safetensors")):
        names = [name for name, *_ in _header(path)]
        live = [name for name in names if name in needed]
        if len(live) == len(names):
            continue
        if live:
            with safe_open(path, framework="pt") as shard:
                notes = json.loads(shard.metadata()["notes"])
                write_shard(folder, {n: store.get(n) for n in live}, {n: notes[n] for n in live if n in notes})
        path.unlink()
    return before - Store(folder).bytes()


def remove_drafts(folder: Path) -> int:
    """Delete what writers that were killed left half-written anywhere in a cache; gives the bytes freed. What changed
    within `DRAFT_SECONDS` may still be written, by a process of any machine."""
    freed = 0
    for path in folder.rglob(".*.tmp"):
        with suppress(FileNotFoundError):  # its writer is done after all
            status = path.stat()
            if path.is_file() and time.time() - status.st_mtime > DRAFT_SECONDS:
                path.unlink()
                freed += status.st_size
    return freed


def finite(rows: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse rows that cannot be trained on. Pairs of (what the user calls it, tensor)."""
    bad = [name for name, tensor in rows if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"the encoder gives values that are not finite in 16 bits for {shortened(bad)}",
            "cache",
            'check the weights; a VAE that overflows in fp16 needs [cache] vae_precision = "fp32"',
        )


def _header(path: Path) -> list[tuple[str, tuple[str, tuple[int, ...]], int, int]]:
    """(name, (type, shape), place in the file, checksum) of a shard's rows, after checking that the file is as long as
    its header says."""
    again = "delete it: what it held is encoded anew"
    entries, told = header.described(path, again)
    for entry in entries.values():
        shape: Any = entry.get("shape")
        begin, end = entry["data_offsets"]
        fits = isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)
        kind = TYPES.get(str(entry.get("dtype")))
        if not fits or kind is None or end - begin != kind.itemsize * math.prod(shape):
            raise UserError("the file is cut short or damaged: its header contradicts itself", str(path), again)
    sums = _sums(told)
    if not sums and len(path.stem) == _NAME_DIGITS and path.stem != files.sha256(path)[:_NAME_DIGITS]:
        raise _set_aside(path, "a file of the cache is damaged: its bytes are not those that were written")
    with path.open("rb") as file:
        start = 8 + int.from_bytes(file.read(8), "little")
    return [
        (
            name,
            (entry["dtype"], tuple(entry["shape"])),
            start + entry["data_offsets"][0],
            sums.get(name, -2 if sums else -1),
        )
        for name, entry in entries.items()
    ]
