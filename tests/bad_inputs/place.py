"""A place with an older finished run in it, for one bad input: what a row of the table says, and how it is tried.

All files are hard links to those of one pristine place. `Place.put` breaks the link before it writes, so nothing here
can change another row's files; what the program changes shows as another inode, size, time or hash.
"""

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from sdxl_trainer import files

PARTS = ("base", "pictures", "cache", "run")
# What a run that got going may write anew before it fails: its records. Everything else of an older run stays.
RECORDS = ("config.toml", "manifest.json", "metrics.jsonl")
# What is known about files, and saves time only.
MEMO = tuple(f"cache/{name}" for name in ("files.json", "pictures.table", "latents.index", "texts.index"))
PROGRESS = re.compile(
    r"((masked )?pictures|captions|steps) \d+/\d+|continuing after step \d+|\d+ pictures?, \d+ steps? of \d+: "
)


@dataclass(frozen=True)
class Place:
    """Folders base/, pictures/, cache/, run/ below `root`, and the config's plain data, to be made bad."""

    root: Path
    tree: dict[str, Any]
    patch: pytest.MonkeyPatch

    def __truediv__(self, name: str) -> Path:
        return self.root / name

    @property
    def config(self) -> Path:
        return self.root / "config.toml"

    def put(self, name: str, content: bytes | str) -> Path:
        """Write a file of its own, in the place of a link to the pristine one."""
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.unlink(missing_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        return path

    def cut(self, name: str, share: float = 0.5) -> Path:
        """Keep the beginning of a file."""
        content = (self.root / name).read_bytes()
        return self.put(name, content[: int(len(content) * share)])

    def flip(self, name: str) -> Path:
        """Change the last byte of a file."""
        content = (self.root / name).read_bytes()
        return self.put(name, content[:-1] + bytes([content[-1] ^ 1]))

    def remove(self, name: str) -> None:
        files.remove(self.root / name)

    def edit(self, name: str, **changes: Any) -> Path:
        """Change entries of a JSON file; None removes one."""
        content = json.loads((self.root / name).read_bytes()) | changes
        return self.put(name, json.dumps({key: value for key, value in content.items() if value is not None}))

    def weights(self, name: str, change: Callable[[dict[str, torch.Tensor]], Mapping[str, torch.Tensor]]) -> Path:
        """Rewrite a safetensors file."""
        tensors = {key: value.clone() for key, value in load_file(self.root / name).items()}
        self.remove(name)
        save_file(dict(change(tensors)), self.root / name, {"format": "pt"})
        return self.root / name

    def rows(self, *rows: Mapping[str, Any]) -> None:
        """Append rows to the pictures' metadata."""
        old = (self.root / "pictures/metadata.jsonl").read_text()
        self.put("pictures/metadata.jsonl", old + "".join(json.dumps(row) + "\n" for row in rows))

    def picture(self, name: str, content: bytes) -> None:
        """One more picture with a caption."""
        self.put(f"pictures/{name}", content)
        self.rows({"file_name": name, "text": "a red circle"})

    def set(self, key: str, value: Any) -> None:
        """An option of the config, by its dotted name."""
        *parents, last = key.split(".")
        node: Any = self.tree
        for part in parents:
            node = node[int(part)] if isinstance(node, list) else node.setdefault(part, {})
        node[last] = value


@dataclass(frozen=True)
class Bad:
    """A bad input. `says`, `at` and `fix` are found in the three lines; `make` makes it, `options` are set in the
    config. The working folder is the place's. A run that `begins` may write records before it fails."""

    name: str
    says: str
    fix: str
    at: str = ""
    make: Callable[[Place], object] = lambda place: None
    options: Mapping[str, Any] = field(default_factory=dict)
    command: tuple[str, ...] = ("train", "config.toml")
    begins: bool = False


def prepare(bad: Bad, pristine: Path, root: Path, patch: pytest.MonkeyPatch) -> Place:
    """A place of its own with the row's bad input."""
    for part in PARTS:
        shutil.copytree(pristine / part, root / part, copy_function=os.link)
    place = Place(root, tree(), patch)
    for key, value in bad.options.items():
        place.set(key, value)
    place.put("config.toml", toml(place.tree))
    before = place.config.read_bytes()
    bad.make(place)
    if place.config.is_file() and place.config.read_bytes() == before:
        place.put("config.toml", toml(place.tree))
    return place


def tree() -> dict[str, Any]:
    """The config of a run that continues the finished one by two steps."""
    return {
        "output_dir": "run",
        "model": {"path": "base"},
        "data": [{"path": "pictures", "resolution": 64}],
        "cache": {"path": "cache", "workers": 0},
        "train": {"steps": 4, "batch_size": 2, "learning_rate": 1e-3, "checkpoint_every": 2, "workers": 0},
    }


def toml(data: Mapping[str, Any]) -> str:
    """Plain data as TOML, whatever it holds."""
    head, sections = [], []
    for name, value in data.items():
        if isinstance(value, dict):
            sections += [f"[{name}]", *(f"{key} = {json.dumps(entry)}" for key, entry in value.items())]
        elif isinstance(value, list) and value and isinstance(value[0], dict):
            for entry in value:
                sections += [f"[[{name}]]", *(f"{key} = {json.dumps(inner)}" for key, inner in entry.items())]
        else:
            head.append(f"{name} = {json.dumps(value)}")
    return "\n".join([*head, *sections]) + "\n"


def run_here(arguments: Sequence[str], patch: pytest.MonkeyPatch) -> int:
    """The command line in this process."""
    from sdxl_trainer.cli import command, guarded

    patch.setattr(sys, "argv", ["sdxl", *arguments])
    return guarded(command)


def snapshot(root: Path, begins: bool) -> dict[str, object]:
    """What must not change: path -> identity of every file of the older run and of the cache; its hash where a run
    that begins may write the same bytes anew."""
    found: dict[str, object] = {}
    for part in ("run", "cache"):
        paths = [p for p in sorted((root / part).rglob("*")) if p.is_file() and not p.is_symlink()]
        for path in paths:
            name = str(path.relative_to(root))
            status = path.stat()
            identity = (status.st_ino, status.st_size, status.st_mtime_ns)
            saves_time = name in MEMO or name.startswith("cache/records/")
            if not saves_time and not (begins and path.name in RECORDS):
                found[name] = files.sha256(path) if begins else identity
    return found


def leftovers(root: Path) -> list[str]:
    """Files that were only half written."""
    return [str(p.relative_to(root)) for p in root.rglob("*") if p.name.endswith((".tmp", ".old"))]


def complaint(stderr: str) -> list[str]:
    """The lines on stderr that are not progress."""
    return [line for line in stderr.splitlines() if not PROGRESS.match(line)]
