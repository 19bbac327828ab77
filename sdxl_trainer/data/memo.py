"""What is known of files that did not change: hashes, sizes. Losing it costs time only."""

import json
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from sdxl_trainer import files
from sdxl_trainer.data.table import Table, opened

# What is known of a picture's bytes by its stamp: their SHA-256, and height and width in pixels.
FACTS = {"content": ("u1", (32,)), "size": ("<i4", (2,))}
# New facts after which they are saved, since looking at millions of pictures takes hours.
SAVED = 50_000


@dataclass
class Memo:
    """What is known about files that did not change since: hashes and sizes, by stamp. Losing it costs time only.
    `facts` are those of pictures, `known` all others."""

    path: Path
    known: dict[str, Any] = field(default_factory=dict)
    changed: bool = False
    learned: list[tuple[np.ndarray, bytes, tuple[int, int]]] = field(default_factory=list)

    @cached_property
    def facts(self) -> Table:
        """Memory-mapped when it is first asked for."""
        return opened(self.table, FACTS)

    def recall(self, stamp: str, length: int) -> list[Any] | None:
        """The list that is known under a stamp, None if there is none of that length."""
        known = self.known.get(stamp)
        return known if isinstance(known, list) and len(known) == length else None

    def remember(self, stamp: str, value: Any) -> Any:
        self.known[stamp] = value
        self.changed = True
        return value

    def learn(self, stamp: np.ndarray, content: bytes, size: tuple[int, int]) -> None:
        """Note the facts of a picture under the key of its stamp."""
        self.learned.append((stamp, content, size))
        if len(self.learned) >= SAVED:
            self.save()

    def save(self) -> None:
        if self.changed:
            files.write_json(self.path, self.known)
            self.changed = False
        if self.learned:
            stamps, contents, sizes = zip(*self.learned, strict=True)
            content = np.frombuffer(b"".join(contents), dtype="u1").reshape(-1, 32)
            self._add(np.array(stamps), {"content": content, "size": np.array(sizes, dtype="<i4").reshape(-1, 2)}, 0)
            self.learned.clear()

    def take_in(self, table: Path) -> None:
        """Add the facts that another place knows; of what both know this one's stay."""
        found = opened(table, FACTS).columns
        stamps = np.stack([found["key"], found["low"]], axis=1)
        self._add(stamps, {name: found[name] for name in FACTS}, 2)

    def _add(self, stamps: np.ndarray, columns: dict[str, np.ndarray], oldness: int) -> None:
        """Facts by their stamps' keys int64 [n, 2], beside those that are known, whose oldness is 1."""
        more = {**columns, "oldness": np.full(len(stamps), oldness, "<i4")}
        known = {**self.facts.columns, "oldness": np.ones(len(self.facts), "<i4")}
        merged = Table(known).with_rows(stamps, more, "oldness")
        del merged.columns["oldness"]
        merged.save(self.table)
        self.facts = opened(self.table, FACTS)

    @property
    def table(self) -> Path:
        """Where the facts lie."""
        return self.path.with_name("pictures.table")


def open_memo(folder: Path) -> Memo:
    path = folder / "files.json"
    try:
        with files.explained(folder):
            known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    except ValueError:
        known = {}
    return Memo(path, known if isinstance(known, dict) else {})
