"""The training samples: every picture with its captions and the geometries it may be trained under."""

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.config import Config, Data
from sdxl_trainer.data import images, masks, sources
from sdxl_trainer.data.geometry import Geometry, variants
from sdxl_trainer.data.problems import Notes, Problem, raise_all
from sdxl_trainer.data.records import Mask, Record
from sdxl_trainer.errors import UserError


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
        draw = int(hashlib.sha256(f"held out {self.content}".encode()).hexdigest()[:12], 16)
        return draw < self.data.held_out * 16**12

    @property
    def name(self) -> str:
        return self.record.name

    @property
    def captions(self) -> tuple[str, ...]:
        return self.record.captions


@dataclass
class Memo:
    """What is known about files that did not change since: hashes and sizes, by stamp. Losing it costs time only."""

    path: Path
    known: dict[str, Any] = field(default_factory=dict)
    changed: bool = False

    def recall(self, stamp: str, length: int) -> list[Any] | None:
        """The list that is known under a stamp, None if there is none of that length."""
        known = self.known.get(stamp)
        return known if isinstance(known, list) and len(known) == length else None

    def remember(self, stamp: str, value: Any) -> Any:
        self.known[stamp] = value
        self.changed = True
        return value

    def save(self) -> None:
        if self.changed:
            files.write_json(self.path, self.known)
            self.changed = False


def open_memo(folder: Path) -> Memo:
    path = folder / "files.json"
    try:
        known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        known = {}
    return Memo(path, known if isinstance(known, dict) else {})


def load(config: Config, memo: Memo, notes: Notes | None = None) -> list[Picture]:
    """All pictures of all data sets, in a fixed order. UserError names every picture that cannot be used; with `notes`
    it is noted, and they are left out."""
    pictures: list[Picture] = []
    unreadable: list[UserError] = []
    unfit: list[UserError] = []
    for index, data in enumerate(config.data):
        found = sources.records(
            data,
            seed=config.seed,
            where=f"data.{index}.path",
            datasets_dir=config.cache.datasets_dir,
            index_dir=memo.path.parent / "shards",
            notes=notes,
        )
        before = len(unreadable) + len(unfit)
        for record, fact in zip(found, _facts(found, data, memo, unreadable), strict=True):
            if fact is not None:
                try:
                    pictures += _sizes(record, data, fact)
                except UserError as error:
                    unfit.append(error)
        if notes is not None:
            notes.unusable[f"data.{index}.path = '{data.path}'"] += len(unreadable) + len(unfit) - before
    memo.save()
    if notes is None:
        raise_all([*unreadable, *unfit])
    else:
        notes.problems += [*grouped("unreadable", unreadable), *grouped("unfit", unfit)]
    return pictures


def grouped(kind: str, errors: Iterable[UserError]) -> list[Problem]:
    """Errors about single pictures as one problem for each way to mend them."""
    alike: dict[str, list[UserError]] = defaultdict(list)
    for error in errors:
        alike[re.sub(r"\d[\d.]*", "", error.fix)].append(error)
    what = {"unreadable": "pictures cannot be read", "unfit": "pictures do not fit the wanted size"}[kind]
    return [Problem(kind, what, m[0].fix, tuple(f"{e.where}: {e.what}" for e in m)) for m in alike.values()]


def _sizes(record: Record, data: Data, fact: "Fact") -> list[Picture]:
    """The picture at each resolution; once where it is too small for two and `no_upscale` gives it one size."""
    focus, number = fact.focus or record.focus, int(fact.content[:16], 16)
    made: dict[tuple[int, int], Picture] = {}
    for resolution in (data.resolution, *data.more_resolutions):
        options = tuple(variants(data, fact.size, number, record.name, resolution, focus))
        made.setdefault(options[0].target, Picture(record, data, fact.content, options, fact.mask))
    return list(made.values())


@dataclass(frozen=True)
class Fact:
    """What the bytes of a record say: `content` and `mask` as in Picture, the (height, width) of the upright
    picture, and the centre of the mask where that is asked for."""

    content: str
    size: tuple[int, int]
    mask: str | None
    focus: tuple[float, float] | None


def _facts(records: Iterable[Record], data: Data, memo: Memo, problems: list[UserError]) -> list[Fact | None]:
    """Facts of each record; None, and a problem noted, for what is not a picture."""

    def look(record: Record) -> Fact | UserError:
        try:
            content, *size = memo.recall(record.stamp, 3) or _look(record, memo)
            mask, focus = _mask(record, data, (size[0], size[1]), content, memo)
        except UserError as error:
            return error
        return Fact(content, (size[0], size[1]), mask, focus)

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(look, records))
    problems += [result for result in results if isinstance(result, UserError)]
    return [None if isinstance(result, UserError) else result for result in results]


def _look(record: Record, memo: Memo) -> list[Any]:
    """SHA-256 of the bytes, height, width."""
    content = record.read()
    return memo.remember(record.stamp, [hashlib.sha256(content).hexdigest(), *images.probe(content, record.name)])


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
