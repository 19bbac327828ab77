"""The training samples: every picture with its captions and the geometries it may be trained under."""

import hashlib
import json
from collections.abc import Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.config import Config, Data
from sdxl_trainer.data import images, sources
from sdxl_trainer.data.geometry import Geometry, variants
from sdxl_trainer.data.records import Record
from sdxl_trainer.errors import UserError, shortened


@dataclass(frozen=True)
class Picture:
    """One training sample. `content` is the SHA-256 of the encoded bytes."""

    record: Record
    data: Data
    content: str
    geometries: tuple[Geometry, ...]

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


def load(config: Config, memo: Memo) -> list[Picture]:
    """All pictures of all data sets, in a fixed order. UserError names every picture that cannot be used."""
    pictures: list[Picture] = []
    problems: list[UserError] = []
    for index, data in enumerate(config.data):
        found = sources.records(
            data, seed=config.seed, where=f"data.{index}.path", datasets_dir=config.cache.datasets_dir
        )
        facts = _facts(found, memo, problems)
        for record, fact in zip(found, facts, strict=True):
            if fact is not None:
                content, height, width = fact
                try:
                    options = variants(data, (height, width), int(content[:16], 16), record.name)
                except UserError as error:
                    problems.append(error)
                else:
                    pictures.append(Picture(record, data, content, tuple(options)))
    memo.save()
    raise_all(problems)
    return pictures


def raise_all(problems: Sequence[UserError]) -> None:
    """One error for many: all of one kind are named together."""
    if len(problems) == 1:
        raise problems[0]
    if problems:
        listed = shortened((f"{p.where} ({p.what})" for p in problems), 8)
        fixes = list(dict.fromkeys(p.fix for p in problems))
        raise UserError(f"{len(problems)} pictures cannot be used", listed, fixes[0])


def _facts(records: Iterable[Record], memo: Memo, problems: list[UserError]) -> list[tuple[str, int, int] | None]:
    """(content hash, height, width) of each record; None, and a problem noted, for what is not a picture."""

    def look(record: Record) -> tuple[str, int, int] | UserError:
        known = memo.known.get(record.stamp)
        if isinstance(known, list) and len(known) == 3:
            return tuple(known)
        try:
            content = record.read()
            return (hashlib.sha256(content).hexdigest(), *images.probe(content, record.name))
        except UserError as error:
            return error

    with ThreadPoolExecutor() as pool:
        results = list(pool.map(look, records))
    facts: list[tuple[str, int, int] | None] = []
    for record, result in zip(records, results, strict=True):
        if isinstance(result, UserError):
            problems.append(result)
            facts.append(None)
        else:
            if memo.known.get(record.stamp) != list(result):
                memo.remember(record.stamp, list(result))
            facts.append(result)
    return facts
