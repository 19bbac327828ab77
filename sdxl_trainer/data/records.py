"""What a data source yields: pictures with their captions, not yet opened."""

import hashlib
import json
import os
import tempfile
import weakref
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, overload

import numpy as np

from sdxl_trainer import files
from sdxl_trainer.data.table import BATCH, keys, open_columns, save_columns

# Part of the name of what is kept: raise it when records would be read or written otherwise.
VERSION = 2
# Bytes of the text that are read at a time.
BLOCK = 1 << 16
# The columns in which records are kept.
SHAPES: dict[str, tuple[int, ...]] = {
    "begin": (),
    "length": (),
    "stamp": (2,),
    "said": (2,),
    "captions": (),
    "repeats": (),
}


@dataclass(frozen=True)
class Mask:
    """The mask of a picture, or the picture itself where its transparency is the mask."""

    name: str
    read: Callable[[], bytes]
    stamp: str


@dataclass(frozen=True)
class Record:
    """One picture and its captions.

    `name` is what messages call it (a path, or dataset and row). `read` gives the encoded bytes of the
    picture (JPEG, PNG, ...) and can be sent to a worker process. `stamp` changes when the bytes may have
    changed (size and modification time of a file): while it stays, the hash of the bytes is not computed anew.
    `focus` is a point (x, y) in shares of width and height, `repeats` how often it is seen in a pass over its set.
    `seconds` are what the second text encoder reads, one for each caption; none if it reads the captions too.
    """

    name: str
    captions: tuple[str, ...]
    read: Callable[[], bytes]
    stamp: str
    mask: Mask | None = None
    focus: tuple[float, float] | None = None
    repeats: int = 1
    seconds: tuple[str, ...] = ()


@dataclass(frozen=True)
class Lasting:
    """Records of a thing that need not be read again while its stamp stays. `rows` reads them, or what it is that has
    them, and adds to `told` what the user is told. `files`: the stamp changes with the files that pictures are read
    from, too."""

    of: Sequence[object]
    stamp: object
    rows: Callable[[], "Iterable[Record] | Lasting"]
    files: bool = False
    told: list[str] = field(default_factory=list)


# What reads a picture, by name: functions of (arguments as text or numbers ..., name) that give its bytes.
Readers = Mapping[str, Callable[..., bytes]]


class _Text:
    """An open file without a name, closed with the last records that lie in it."""

    def __init__(self, file: BinaryIO) -> None:
        self.number = os.dup(file.fileno())
        weakref.finalize(self, os.close, self.number)

    def read(self, start: int, end: int) -> bytes:
        return os.pread(self.number, end - start, start)


class Records(Sequence[Record]):
    """Records by number. What they say lies in a file, and is read when it is asked for; in memory are a few numbers of
    each: where it lies in that file, 128-bit keys of its stamp and of its captions, its repeats."""

    def __init__(
        self, text: _Text, columns: Mapping[str, np.ndarray], readers: Readers, told: Sequence[str] = ()
    ) -> None:
        self._text, self.columns, self._readers, self.told = text, dict(columns), readers, told

    def __reduce__(self) -> Any:
        # For worker processes that are not forks: they get the records themselves.
        return packed, (list(self), self._readers)

    def __len__(self) -> int:
        return len(self.columns["length"])

    @overload
    def __getitem__(self, index: int) -> Record: ...
    @overload
    def __getitem__(self, index: slice) -> "Records": ...
    def __getitem__(self, index: int | slice) -> "Record | Records":
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        start, length = (int(self.columns[name][index]) for name in ("begin", "length"))
        return self._decoded(self._text.read(start, start + length))

    def __iter__(self) -> Iterator[Record]:
        return (self[index] for index in range(len(self)))

    def read_by(self) -> set[str]:
        """The names of the functions that read the pictures."""
        rows = (json.loads(self._text.read(b, b + n)) for b, n in zip(*self._places(), strict=True))
        return {how[0] for row in rows for how in (row[2], (row[4] or [None, row[2]])[1])}

    def copy(self, path: Path) -> None:
        """Write what the records say to another file."""
        with path.open("wb") as file:
            for begin, length in zip(*self._places(), strict=True):
                file.write(self._text.read(begin, begin + length))

    def _places(self) -> tuple[list[int], list[int]]:
        return self.columns["begin"].tolist(), self.columns["length"].tolist()

    def take(self, numbers: np.ndarray) -> "Records":
        """Some of the records, in the order of their numbers."""
        return Records(self._text, {name: column[numbers] for name, column in self.columns.items()}, self._readers)

    @property
    def stamps(self) -> np.ndarray:
        """int64 [n, 2]: keys of the stamps."""
        return self.columns["stamp"]

    @property
    def said(self) -> np.ndarray:
        """int64 [n, 2]: keys of all that a record says of its picture (captions, focus)."""
        return self.columns["said"]

    @property
    def captions(self) -> np.ndarray:
        """int32 [n]: how many captions each has."""
        return self.columns["captions"]

    @property
    def repeats(self) -> np.ndarray:
        """int32 [n]"""
        return self.columns["repeats"]

    def _decoded(self, text: bytes) -> Record:
        name, captions, how, stamp, mask, focus, repeats, seconds = json.loads(text)
        masked = None if mask is None else Mask(mask[0], self._read(mask[1], mask[0]), mask[2])
        point = None if focus is None else (focus[0], focus[1])
        return Record(name, tuple(captions), self._read(how, name), stamp, masked, point, repeats, tuple(seconds))

    def _read(self, how: list[Any], name: str) -> Callable[[], bytes]:
        return partial(self._readers[how[0]], *how[1:], name)


def packed(records: Iterable[Record], readers: Readers, folder: Path | None = None) -> Records:
    """Records as they come, without holding more than a few of them. They are kept in a file without a name, which is
    gone with the process, in `folder` if it is given."""
    if folder is not None:
        with files.explained(folder):
            folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder) as file:
        columns = _written(file, records, {function: name for name, function in readers.items()})
        return Records(_Text(file), columns, readers)


def known(lasting: Lasting, readers: Readers, folder: Path) -> Records | None:
    """The records that are kept in `folder`, if the stamp is what it was."""
    text, table = _places(lasting, folder)
    found = open_columns(table, SHAPES)
    if found is None or found[1].get("stamp") != _digest(lasting.stamp) or not text.is_file():
        return None
    with text.open("rb") as file:
        digest = hashlib.sha256()
        while block := file.read(BLOCK):
            digest.update(block)
        if found[1]["text"] != digest.hexdigest():
            return None
        return Records(_Text(file), found[0], readers, json.loads(found[1]["told"]))


def kept(lasting: Lasting, rows: Iterable[Record], readers: Readers, folder: Path, names: Collection[str]) -> Records:
    """The records packed, and kept in `folder` in the place of older ones, if functions of these names alone read the
    pictures."""
    made = packed(rows, readers, folder)
    if lasting.files or made.read_by() <= set(names):
        text, table = _places(lasting, folder)
        with files.explained(text):
            text.parent.mkdir(parents=True, exist_ok=True)
            files.write_atomically(text, made.copy)
        notes = {"text": files.sha256(text), "stamp": _digest(lasting.stamp), "told": json.dumps(lasting.told)}
        save_columns(table, made.columns, notes)
    return made


def _places(lasting: Lasting, folder: Path) -> tuple[Path, Path]:
    """Where the text and the columns of records are kept."""
    place = folder / "records" / _digest(lasting.of)[:32]
    return place.with_suffix(".rows"), place.with_suffix(".table")


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps([VERSION, value]).encode()).hexdigest()


def _written(file: BinaryIO, records: Iterable[Record], names: Mapping[Callable[..., bytes], str]) -> dict[str, Any]:
    parts: list[list[np.ndarray]] = []
    end = 0
    rows = iter(records)
    while batch := list(islice(rows, BATCH)):
        texts = [_encoded(record, names) for record in batch]
        with files.explained(Path(tempfile.gettempdir())):
            file.write(b"".join(texts))
        lengths = np.array([len(text) for text in texts], dtype="<i4")
        begins = end + np.cumsum(lengths, dtype="<i8") - lengths
        end = int(begins[-1] + lengths[-1])
        said = keys(json.dumps([r.captions, r.seconds, r.focus]) for r in batch)
        numbers = [(len(r.captions), r.repeats) for r in batch]
        parts.append([begins, lengths, keys(r.stamp for r in batch), said, np.array(numbers, dtype="<i4")])
    file.flush()
    if not parts:
        parts = [[np.zeros(0, "<i8"), np.zeros(0, "<i4"), keys(()), keys(()), np.zeros((0, 2), "<i4")]]
    begins, lengths, stamps, spoken, counts = (np.concatenate(column) for column in zip(*parts, strict=True))
    return {"begin": begins, "length": lengths, "stamp": stamps, "said": spoken} | {
        "captions": counts[:, 0],
        "repeats": counts[:, 1],
    }


def _encoded(record: Record, names: Mapping[Callable[..., bytes], str]) -> bytes:
    mask = record.mask
    masked = None if mask is None else [mask.name, _how(mask.read, names), mask.stamp]
    how = _how(record.read, names)
    row = [record.name, record.captions, how, record.stamp, masked, record.focus, record.repeats, record.seconds]
    return json.dumps(row, separators=(",", ":")).encode()


def _how(read: Callable[[], bytes], names: Mapping[Callable[..., bytes], str]) -> list[Any]:
    """The name of the function that reads, and its arguments but the picture's name."""
    assert isinstance(read, partial)
    return [names[read.func], *(str(part) if isinstance(part, Path) else part for part in read.args[:-1])]
