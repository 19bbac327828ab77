"""Rows on disk: immutable safetensors shards whose own headers are the index and whose names are their hashes.

A row is one tensor; its name is a content key. Any number of processes may write side by side, since each makes
its own shards; a shard that two of them made alike has one name.
"""

import hashlib
import json
import math
import os
import threading
import uuid
import zlib
from collections.abc import Iterable, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, NamedTuple

import numpy as np
import torch
from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.data.table import Table, empty, keys, let_go, opened
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import header
from sdxl_trainer.threads import mapped

SHARD_BYTES = 64 << 20
_NAME_DIGITS = 32
SUMS = "checksums"  # among the notes of a shard
# Shards that are kept open.
OPEN = 128
# safetensors' names of what rows are made of.
TYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
# What helps where a shard is no whole file.
AGAIN = "delete it: what it held is encoded anew"


_JSON = json.JSONEncoder(separators=(",", ":"))


def key(*parts: Any) -> str:
    """A content key: SHA-256 over what decides a row, as JSON."""
    return hashlib.sha256(_JSON.encode(parts).encode()).hexdigest()


# Where a row begins in its shard, of which type and shape it is, and its checksum: -1 in shards of older
# versions, whose bytes are compared with their name at the first look, -2 where it is missing.
COLUMNS = {"begin": ("<i8", ()), "shard": ("<i4", ()), "kind": ("<i4", ()), "sum": ("<i8", ())}
# (name, (type, shape), place in the file, checksum) of a row.
Described = tuple[str, tuple[str, tuple[int, ...]], int, int]


class Place(NamedTuple):
    """Where a row lies: its store, its number in the table there, its shard, its first byte and checksum; and what it
    is made of."""

    store: "Store"
    row: int
    shard: str
    begin: int
    checksum: int
    dtype: torch.dtype
    shape: tuple[int, ...]


@dataclass
class Store:
    """The rows of one folder, found by a sorted table of all shards' headers, which lies beside the folder. A row is
    read by itself: nothing is decoded, and no row stays in memory. Rows that are not here are those of `beyond`."""

    # How often a row is read that is not what was written, and whether one that was right once stays so.
    TRIES: ClassVar[int] = 1
    LASTING: ClassVar[bool] = True
    AT_ONCE: ClassVar[int] = 1  # rows read at a time

    folder: Path
    beyond: "Store | None" = None
    table: Table = field(default_factory=lambda: empty(COLUMNS))
    shards: list[str] = field(default_factory=list)
    kinds: list[tuple[str, tuple[int, ...]]] = field(default_factory=list)
    _saved: list[str] = field(default_factory=list)  # the shards of the table that was loaded or saved last
    _opened: dict[str, int] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _checked: np.ndarray = field(default_factory=lambda: np.zeros(0, dtype=bool))

    def __contains__(self, row: str) -> bool:
        return self.table.place(row) >= 0 or (self.beyond is not None and row in self.beyond)

    def __len__(self) -> int:
        return len(self.table)

    def lacking(self, rows: np.ndarray) -> np.ndarray:
        """Which of the rows with these keys, int64 [n, 2], are neither here nor beyond: bool [n]."""
        lacks = self.table.find(rows) < 0
        if self.beyond is not None and lacks.any():
            lacks[lacks] = self.beyond.lacking(rows[lacks])
        return lacks

    def get(self, row: str) -> Tensor:
        """A row; errors as those of `find` and `read`."""
        return self.stacked([row])[0]

    def stacked(self, rows: Sequence[str]) -> Tensor:
        """Rows of one shape, [n, ...]; errors as those of `find` and `read`."""
        return stacked(self.find(rows))

    def find(self, rows: Sequence[str]) -> list[Place]:
        """Where rows lie, here or beyond; KeyError if there is none of a name."""
        at = self.table.find(keys(rows)).tolist()
        found = [self._place(n) if n >= 0 else self._beyond(row) for n, row in zip(at, rows, strict=True)]
        let_go(self.table.columns.values())  # a look sees a few pages and the system brings their neighbours
        return found

    def _place(self, at: int) -> Place:
        kind, shard, begin, total = (int(self.table.columns[name][at]) for name in ("kind", "shard", "begin", "sum"))
        dtype, shape = self.kinds[kind]
        return Place(self, at, self.shards[shard], begin, total, TYPES[dtype], shape)

    def _beyond(self, row: str) -> Place:
        if self.beyond is None:
            raise KeyError(row)
        return self.beyond.find([row])[0]

    def read(self, place: Place, buffer: memoryview) -> None:
        """Read a row of this store into a buffer of its size, and compare it with its checksum if it is read for the
        first time. UserError if it is damaged: its shard is set aside then, so that the same command encodes it
        anew."""
        wrong = ""
        for _ in range(self.TRIES):
            if self.read_into(buffer, place.shard, place.begin) != len(buffer):
                wrong = "a file of the cache is shorter than it was"
            elif self._checked[place.row] or place.checksum in (-1, checksum(place.dtype, place.shape, buffer)):
                self._checked[place.row] = self.LASTING
                return
            else:
                wrong = "a row of the cache is damaged: its bytes are not those that were written"
        raise self.spoiled(place.shard, wrong)

    def read_into(self, buffer: memoryview, name: str, begin: int) -> int:
        """Fill a buffer from a place in a shard; gives how many bytes there were."""
        try:
            with self._lock:
                # Within the lock, for another thread may close the oldest file.
                return os.preadv(self._file(name), [buffer], begin)
        except OSError as error:
            raise self.spoiled(name, f"a file of the cache cannot be read: {error.strerror}") from None

    def spoiled(self, name: str, what: str) -> UserError:
        """What to say of a shard that cannot be used any more, after it was set aside."""
        return _set_aside(self.folder / name, what)

    def _file(self, name: str) -> int:
        number = self._opened.pop(name, None)
        if number is None:
            while len(self._opened) >= OPEN:
                os.close(self._opened.pop(next(iter(self._opened))))
            number = os.open(self.folder / name, os.O_RDONLY)
        self._opened[name] = number
        return number

    def there(self) -> list[str]:
        """The names of the shards that there are now, sorted."""
        paths = self.folder.iterdir() if self.folder.is_dir() else ()
        return sorted(path.name for path in paths if path.suffix == ".safetensors")

    def headers(self, names: Sequence[str]) -> dict[str, list[Described]]:
        """The rows of shards."""
        return {name: described(self.folder / name) for name in names}

    def refresh(self) -> "Store":
        """Take in the headers of shards that are new since the last look, also those of other processes. Where one is
        gone, all are read anew."""
        there = self.there()
        if there == self.shards:
            return self
        if not set(self.shards) <= set(there):
            self.forget(set(self.shards) - set(there))
        known = set(self.shards)
        found = self.headers([name for name in there if name not in known])
        there = [name for name in there if name in known or name in found]
        number_of = {name: number for number, name in enumerate(there)}
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

    def forget(self, gone: set[str]) -> None:
        """Leave out the rows of shards that are gone. Other shards may hold some of them: all are read anew."""
        self.table, self.shards, self.kinds = empty(COLUMNS), [], []

    def load(self) -> None:
        """Take the table that was saved last, if there is one."""
        found = opened(self.index, COLUMNS)
        if found.notes:
            self.table, self.shards = found, json.loads(found.notes["shards"])
            self._saved = self.shards
            self.kinds = [(dtype, tuple(shape)) for dtype, shape in json.loads(found.notes["kinds"])]
            self._checked = np.zeros(len(self.table), dtype=bool)

    def save(self) -> None:
        """Write the table, for the next start to find."""
        if self.shards and self.shards != self._saved:
            self.table.save(self.index)
            self._saved = self.shards

    @property
    def index(self) -> Path:
        return self.folder.with_suffix(".index")

    def all_shards(self) -> set[str]:
        """The names of the shards here and beyond."""
        return {*self.shards, *(self.beyond.all_shards() if self.beyond is not None else ())}

    def bytes(self) -> int:
        return sum(path.stat().st_size for path in self.folder.glob("*.safetensors"))


def stacked(places: Sequence[Place]) -> Tensor:
    """Rows of one type and shape, [n, ...]; errors as those of `Store.read`."""
    whole = torch.empty(len(places), *places[0].shape, dtype=places[0].dtype)
    buffer = buffer_of(whole)
    size = len(buffer) // len(places)
    read([(place, buffer[n * size : (n + 1) * size]) for n, place in enumerate(places)])
    return whole


def buffer_of(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor, to be written to."""
    return tensor.view(-1).view(torch.uint8).numpy().data


def read(rows: Sequence[tuple[Place, memoryview]]) -> None:
    """Read rows into buffers, as `Store.read` does. Those that come from afar are waited for together."""
    at_once = max(place.store.AT_ONCE for place, _ in rows) if rows else 1
    if at_once == 1:
        for place, buffer in rows:
            place.store.read(place, buffer)
    else:
        for _ in mapped(lambda n: rows[n][0].store.read(*rows[n]), range(len(rows)), at_once, at_once):
            pass


def checksum(dtype: torch.dtype, shape: Sequence[int], content: memoryview) -> int:
    """CRC-32 of a row's type, shape and bytes."""
    return zlib.crc32(content, zlib.crc32(f"{dtype} {list(shape)}".encode()))


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


def open_store(folder: Path, beyond: Store | None = None) -> Store:
    """The rows of a folder: from its table, and the headers of shards that are not in it yet; then those beyond."""
    return looked_over(Store(folder, beyond))


def looked_over(store: Store) -> Store:
    """A store that knows its shards of now, and whose next start will."""
    store.load()
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
            sums = {name: checksum(row.dtype, row.shape, buffer_of(row.contiguous())) for name, row in rows.items()}
            # One entry: safetensors writes several in no fixed order, and equal rows shall make equal bytes.
            files.save_tensors(draft, rows, {"notes": json.dumps({**notes, SUMS: sums}, sort_keys=True)})
            path = folder / f"{files.sha256(draft)[:_NAME_DIGITS]}.safetensors"
            files.write_atomically(path, draft.rename)
        finally:
            files.remove(draft)
    return path


def is_whole(shard: Path) -> bool:
    """Whether its bytes are those that its name says."""
    return shard.stem == files.sha256(shard)[:_NAME_DIGITS]


def finite(rows: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse rows that cannot be trained on. Pairs of (what the user calls it, tensor)."""
    bad = [name for name, tensor in rows if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"the encoder gives values that are not finite in 16 bits for {shortened(bad)}",
            "cache",
            'check the weights; a VAE that overflows in fp16 needs [cache] vae_precision = "fp32"',
        )


def described(path: Path) -> list[Described]:
    """The rows of a shard here, after checking that the file is as long as its header says."""
    entries, told, start = header.placed(path, AGAIN)
    rows = described_by(entries, told, start, str(path))
    if any(total == -1 for *_, total in rows) and len(path.stem) == _NAME_DIGITS:
        if not is_whole(path):
            raise _set_aside(path, "a file of the cache is damaged: its bytes are not those that were written")
    return rows


def described_by(entries: header.Entries, told: dict[str, str], start: int, where: str) -> list[Described]:
    """The rows of the shard that has this header, whose first row begins at `start`."""
    sums, rows = _sums(told), list[Described]()
    for name, entry in entries.items():
        shape: Any = entry.get("shape")
        begin, end = entry["data_offsets"]
        fits = isinstance(shape, list) and all(isinstance(side, int) and side >= 0 for side in shape)
        kind = TYPES.get(str(entry.get("dtype")))
        if not fits or kind is None or end - begin != kind.itemsize * math.prod(shape):
            raise UserError("the file is cut short or damaged: its header contradicts itself", where, AGAIN)
        total = sums.get(name, -2 if sums else -1)
        rows.append((name, (entry["dtype"], tuple(shape)), start + begin, total))
    return rows
