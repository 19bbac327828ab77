"""Folders and datasets made for the tests of sources."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from handmade import corners, encoded

from sdxl_trainer.config import Data
from sdxl_trainer.data import sources
from sdxl_trainer.data.records import Record

PNG = encoded(corners(8, 8))


def write(root: Path, files: Mapping[str, bytes | str | None]) -> Path:
    """Writes the files of a folder; None stands for a picture."""
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(PNG if content is None else content.encode() if isinstance(content, str) else content)
    return root


def jsonl(*rows: Mapping[str, Any]) -> str:
    return "".join(json.dumps(row) + "\n" for row in rows)


def row(name: str, text: Any = "a cat") -> dict[str, Any]:
    return {"file_name": name, "text": text}


def records(path: Path | str, seed: int = 0, split: str | None = None, **options: Any) -> list[Record]:
    cache = str(Path(path).parent / "datasets-cache")
    data = Data(path=str(path), **options)
    return sources.records(data, seed=seed, where="data.0.path", datasets_dir=cache, split=split)


def captions(found: list[Record]) -> dict[str, tuple[str, ...]]:
    return {record.name: record.captions for record in found}
