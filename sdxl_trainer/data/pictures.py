"""The training samples: every picture with its captions and the geometries it may be trained under."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Any

import numpy as np

from sdxl_trainer.config import Config, Data
from sdxl_trainer.data import images, masks, sources, table
from sdxl_trainer.data.buckets import Size
from sdxl_trainer.data.geometry import Geometry, variants
from sdxl_trainer.data.memo import Memo
from sdxl_trainer.data.problems import Notes, Problem, raise_all
from sdxl_trainer.data.records import Mask, Record, Records
from sdxl_trainer.data.table import BATCH, distinct, let_go, present
from sdxl_trainer.errors import UserError
from sdxl_trainer.threads import mapped


@dataclass(frozen=True)
class Picture:
    """A picture that is trained at one size. `content` is the SHA-256 of the encoded bytes, `mask` what decides its
    mask: the SHA-256 of that file, or "alpha" before its own; None where all of it is trained."""

    record: Record
    data: Data
    content: str
    geometries: tuple[Geometry, ...]
    mask: str | None = None

    @property
    def held_out(self) -> bool:
        """Whether it is kept out of training: decided by its bytes alone, so that it never changes sides."""
        return is_held_out(self.content, self.data.held_out)

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def captions(self) -> tuple[str, ...]:
        return self.record.captions


@dataclass(frozen=True)
class Source:
    """A data set's records that can be used, with the facts about them: `content` uint8 [n, 32], `size` int32 [n, 2]
    height and width; `masks` and `focus` (of masks) where these are asked for."""

    data: Data
    number: int
    records: Records
    content: np.ndarray
    size: np.ndarray
    masks: tuple[str | None, ...] | None = None
    focus: tuple[tuple[float, float] | None, ...] | None = None


ROW = np.dtype([("source", "<u2"), ("target", "<u2"), ("resolution", "u1"), ("plain", "?"), ("record", "<u4")])


class Pictures(Sequence[Picture]):
    """Pictures by number, made when they are asked for: a few bytes each in memory. `rows` say which record of which
    source a picture is, at which resolution and target size, and whether it has its first geometry alone."""

    def __init__(self, sources: Sequence[Source], targets: Sequence[Size], rows: np.ndarray) -> None:
        self.sources, self.targets, self.rows = tuple(sources), tuple(targets), rows

    @cached_property
    def _made(self) -> Callable[[int], Picture]:
        return lru_cache(maxsize=256)(self._make)

    @cached_property
    def _centred(self) -> Callable[[int, Size, int], tuple[Geometry, ...]]:
        return lru_cache(maxsize=4096)(self._of_size)

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return self.take(np.arange(len(self))[index])
        count = len(self.rows)
        if not -count <= index < count:
            raise IndexError(index)
        return self._made(int(index) % count)

    def __iter__(self) -> Iterator[Picture]:
        return (self._make(index) for index in range(len(self)))

    def __reduce__(self) -> Any:
        return Pictures, (self.sources, self.targets, self.rows)

    def take(self, numbers: np.ndarray, plain: bool = False) -> "Pictures":
        """Some of the pictures; `plain` ones have their first geometry alone."""
        rows = self.rows[numbers].copy()
        rows["plain"] |= plain
        return Pictures(self.sources, self.targets, rows)

    def let_go(self) -> None:
        """Give the memory of what is read from tables back, after all of it was looked at."""
        for source in self.sources:
            let_go(source.records.columns.values())

    def and_also(self, other: "Pictures") -> "Pictures":
        """These pictures and others of the same sources."""
        return Pictures(self.sources, self.targets, np.concatenate([self.rows, other.rows]))

    def _make(self, index: int) -> Picture:
        row = self.rows[index]
        source, number = self.sources[row["source"]], int(row["record"])
        record = source.records[number]
        content = source.content[number].tobytes().hex()
        focus = (source.focus[number] if source.focus else None) or record.focus
        size, resolution = tuple(source.size[number].tolist()), int(row["resolution"])
        if source.data.crop == "center" and focus is None:  # then pictures of one size are cut alike
            options = self._centred(int(row["source"]), size, resolution)
        else:
            options = geometries(source.data, size, content, resolution, record.name, focus)
        mask = source.masks[number] if source.masks else None
        return Picture(record, source.data, content, options[:1] if row["plain"] else options, mask)

    def _of_size(self, source: int, size: Size, resolution: int) -> tuple[Geometry, ...]:
        return geometries(self.sources[source].data, size, "0", resolution, "", None)

    def column(self, name: str) -> np.ndarray:
        """A column of the sources or of their records, for each picture."""
        first = self.sources[0]
        shape = (getattr(first, name) if hasattr(first, name) else getattr(first.records, name)).shape[1:]
        values = [getattr(s, name) if hasattr(s, name) else getattr(s.records, name) for s in self.sources]
        found = np.empty((len(self), *shape), dtype=values[0].dtype)
        for start in range(0, len(self), BATCH):
            part, rows = found[start : start + BATCH], self.rows[start : start + BATCH]
            for number in present(rows["source"]) if len(values) > 1 else ():
                mine = rows["source"] == number
                part[mine] = values[number][rows["record"][mine]]
            if len(values) == 1:
                part[:] = values[0][rows["record"]]
        return found

    def measured(self, measure: Callable[[Geometry], float]) -> np.ndarray:
        """A number of each picture that its first geometry's sizes decide: float64 [n]."""
        known: dict[tuple[int, ...], float] = {}
        found = np.empty(len(self))
        for start, part in self._parts():
            sizes, rows = part.column("size"), part.rows
            alike = np.stack([rows["source"], rows["resolution"], sizes[:, 0], sizes[:, 1]], axis=1)
            kinds, first, inverse = np.unique(alike, axis=0, return_index=True, return_inverse=True)
            names = [tuple(kind) for kind in kinds.tolist()]
            for name, number in zip(names, first.tolist(), strict=True):
                if name not in known:
                    known[name] = measure(part[number].geometries[0])
            found[start : start + len(part)] = np.array([known[name] for name in names])[inverse.reshape(-1)]
        return found

    def _parts(self) -> Iterator[tuple[int, "Pictures"]]:
        """The pictures in runs of a few thousand, and where each begins: what is computed of them stays small."""
        for start in range(0, len(self), BATCH):
            yield start, Pictures(self.sources, self.targets, self.rows[start : start + BATCH])

    def distinct_captions(self) -> int:
        """How many different captions the pictures have, if no two have a part of theirs in common."""
        found = int(self.column("captions")[distinct(self.column("said"))].sum())
        self.let_go()
        return found

    def distinct(self) -> np.ndarray:
        """A number for each picture that is to be learned, at one of its resolutions. The pictures of prior prediction
        may be the subject's own."""
        numbers = np.unique(self.rows[["source", "record"]], return_index=True)[1]
        learned = np.array([not source.data.prior_prediction for source in self.sources])
        return numbers[learned[self.rows["source"][numbers]]]

    def different(self) -> np.ndarray:
        """Numbers of pictures without two of the same bytes, ascending."""
        halves = np.empty((len(self), 16), "u1")  # of the hashes: 128 bits tell them apart too
        for start, part in self._parts():
            halves[start : start + len(part)] = part.column("content")[:, :16]
        return distinct(halves.view("<i8"))

    def of(self, source: int) -> np.ndarray:
        """Numbers of the pictures of one data set."""
        return np.flatnonzero(self.rows["source"] == source)

    def digest(self) -> str:
        """SHA-256 over all that pictures and their records say, in their order."""
        found = hashlib.sha256()
        for _, part in self._parts():
            for name in ("content", "said", "repeats"):
                found.update(np.ascontiguousarray(part.column(name)).data)
            for name in ("source", "target", "resolution", "plain"):
                found.update(np.ascontiguousarray(part.rows[name]).data)
        self.let_go()
        for source in self.sources:
            found.update(json.dumps([source.masks, source.focus]).encode())
        found.update(json.dumps(self.targets).encode())
        return found.hexdigest()


def geometries(
    data: Data, size: Size, content: str, resolution: int, name: str, focus: tuple[float, float] | None
) -> tuple[Geometry, ...]:
    """All geometries of a picture at the resolution of that number."""
    wanted = (data.resolution, *data.more_resolutions)[resolution]
    return tuple(variants(data, size, int(content[:16], 16), name, wanted, focus))


def load(config: Config, memo: Memo, notes: Notes | None = None) -> Pictures:
    """All pictures of all data sets, in a fixed order. UserError names every picture that cannot be used; with `notes`
    it is noted, and they are left out."""
    found: list[Source] = []
    rows: list[np.ndarray] = []
    targets: dict[Size, int] = {}
    unreadable: list[UserError] = []
    unfit: list[UserError] = []
    for index, data in enumerate(config.data):
        where = f"data.{index}.path"
        folder, hub = memo.path.parent / "shards", config.cache.datasets_dir
        records = sources.records(data, seed=config.seed, where=where, datasets_dir=hub, index_dir=folder, notes=notes)
        before = len(unreadable) + len(unfit)
        found.append(_source(data, index, records, memo, unreadable))
        rows.append(_rows(found[-1], targets, unfit))
        if notes is not None:
            notes.unusable[f"{where} = '{data.path}'"] += len(unreadable) + len(unfit) - before
    memo.save()
    if notes is None:
        raise_all([*unreadable, *unfit])
    else:
        notes.problems += [*grouped("unreadable", unreadable), *grouped("unfit", unfit)]
    return Pictures(found, list(targets), np.concatenate(rows))


def held_out(pictures: Pictures) -> np.ndarray:
    """Whether each picture is kept out of training: decided by its bytes alone, so that it never changes sides."""
    shares = [source.data.held_out for source in pictures.sources]
    found = np.zeros(len(pictures), dtype=bool)
    for number, share in enumerate(shares):
        for index in pictures.of(number) if share else ():
            row = pictures.rows[index]
            found[index] = is_held_out(pictures.sources[number].content[row["record"]].tobytes().hex(), share)
    return found


def is_held_out(content: str, share: float) -> bool:
    return int(hashlib.sha256(f"held out {content}".encode()).hexdigest()[:12], 16) < share * 16**12


def grouped(kind: str, errors: Iterable[UserError]) -> list[Problem]:
    """Errors about single pictures as one problem for each way to mend them."""
    alike: dict[str, list[UserError]] = defaultdict(list)
    for error in errors:
        alike[re.sub(r"\d[\d.]*", "", error.fix)].append(error)
    what = {"unreadable": "pictures cannot be read", "unfit": "pictures do not fit the wanted size"}[kind]
    return [Problem(kind, what, m[0].fix, tuple(f"{e.where}: {e.what}" for e in m)) for m in alike.values()]


def _rows(source: Source, targets: dict[Size, int], unfit: list[UserError]) -> np.ndarray:
    """ROW of each picture at each resolution; once where it is too small for two and `no_upscale` gives it one size.
    Sizes are few, and each is looked at once."""
    order, begins = table.grouped(source.size[:, ::-1])
    inverse = np.empty_like(order)
    inverse[order] = np.cumsum(begins) - 1
    chosen = [_targets(source.data, (height, width)) for height, width in source.size[order[begins]].tolist()]
    bad = np.array([isinstance(options, UserError) for options in chosen], dtype=bool)
    for number in np.flatnonzero(bad[inverse]):
        error = chosen[inverse[number]]
        assert isinstance(error, UserError)
        unfit.append(UserError(error.what, source.records[int(number)].name, error.fix))
    options = [[] if isinstance(of, UserError) else of for of in chosen]
    flat = np.array([(r, targets.setdefault(t, len(targets))) for of in options for t, r in of], dtype="<i8")
    flat = flat.reshape(-1, 2)
    counts = np.array([len(of) for of in options], dtype="<i8")
    starts = np.cumsum(counts) - counts
    each = counts[inverse]
    rows = np.zeros(int(each.sum()), dtype=ROW)
    rows["source"], rows["record"] = source.number, np.repeat(np.arange(len(inverse)), each)
    within = np.arange(len(rows)) - np.repeat(np.cumsum(each) - each, each)
    picked = flat[np.repeat(starts[inverse], each) + within]
    rows["resolution"], rows["target"] = picked[:, 0], picked[:, 1]
    return rows


def _targets(data: Data, size: Size) -> list[tuple[Size, int]] | UserError:
    """(target size, number of the resolution) of pictures of a size."""
    found: dict[Size, int] = {}
    try:
        for number, resolution in enumerate((data.resolution, *data.more_resolutions)):
            found.setdefault(variants(data, size, 0, "", resolution)[0].target, number)
    except UserError as error:
        return error
    return list(found.items())


def _source(data: Data, number: int, records: Records, memo: Memo, unreadable: list[UserError]) -> Source:
    """The records that are pictures, with their facts; a problem is noted for each that is not."""
    content, size = np.zeros((len(records), 32), "u1"), np.zeros((len(records), 2), "<i4")
    known, usable = np.zeros(len(records), dtype=bool), np.ones(len(records), dtype=bool)
    for start in range(0, len(records), BATCH):
        part = slice(start, start + BATCH)
        places = memo.facts.find(records.stamps[part])
        known[part] = there = places >= 0
        for column, name in ((content, "content"), (size, "size")):
            column[part][there] = memo.facts.columns[name][places[there]]
    let_go([*memo.facts.columns.values(), *records.columns.values()])
    new = np.flatnonzero(~known).tolist()
    for index, seen in mapped(lambda i: _look(records[i]), new) if new else ():
        if isinstance(seen, UserError):
            usable[index] = False
            unreadable.append(seen)
        else:
            content[index], size[index] = np.frombuffer(seen[0], "u1"), seen[1]
            memo.learn(records.stamps[index], *seen)
    if data.mask == "none":
        if usable.all():
            return Source(data, number, records, content, size)
        numbers = np.flatnonzero(usable)
        return Source(data, number, records.take(numbers), content[numbers], size[numbers])
    masked: dict[int, tuple[str | None, tuple[float, float] | None]] = {}
    for index in np.flatnonzero(usable).tolist():
        height, width = size[index].tolist()
        try:
            masked[index] = _mask(records[index], data, (height, width), content[index].tobytes().hex(), memo)
        except UserError as error:
            unreadable.append(error)
    kept = np.array(list(masked), dtype="<i8")
    masks_of, focus_of = tuple(mask for mask, _ in masked.values()), tuple(focus for _, focus in masked.values())
    return Source(data, number, records.take(kept), content[kept], size[kept], masks_of, focus_of)


def _look(record: Record) -> tuple[bytes, tuple[int, int]] | UserError:
    """SHA-256 of the bytes, and (height, width)."""
    try:
        content = record.read()
        return hashlib.sha256(content).digest(), images.probe(content, record.name)
    except UserError as error:
        return error


def _mask(
    record: Record, data: Data, size: tuple[int, int], content: str, memo: Memo
) -> tuple[str | None, tuple[float, float] | None]:
    """What decides the mask of a picture, and its centre if that is asked for."""
    if record.mask is None:
        return None, None
    stamp = f"{data.mask} mask of {record.mask.stamp}"
    known = memo.recall(stamp, 5)
    if known is None or (data.focus == "mask" and known[3] is None):
        known = memo.remember(stamp, _look_at_mask(record.mask, data))
    found, height, width, x, y = known
    masks.refuse_shape((height, width), size, record.mask.name)
    return (f"alpha {content}" if data.mask == "alpha" else found), ((x, y) if data.focus == "mask" else None)


def _look_at_mask(mask: Mask, data: Data) -> list[Any]:
    """SHA-256 of the bytes, height, width, and x and y of the centre, which are None unless asked for."""
    content = mask.read()
    centre: tuple[float | None, float | None] = (None, None)
    if data.focus == "mask":
        centre = masks.centroid(masks.image(content, mask.name, data.mask == "alpha"), mask.name)
    return [hashlib.sha256(content).hexdigest(), *images.probe(content, mask.name), *centre]
