"""Rows on disk: immutable safetensors shards whose own headers are the index and whose names are their hashes.

A row is one tensor; its name is a content key. Any number of processes may write side by side, since each makes
its own shards; a shard that two of them made alike has one name.
"""

import hashlib
import json
import uuid
import zlib
from collections.abc import Collection, Iterable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from sdxl_trainer import files
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.formats import header

SHARD_BYTES = 64 << 20
_NAME_DIGITS = 32
SUMS = "checksums"  # among the notes of a shard


def key(*parts: Any) -> str:
    """A content key: SHA-256 over what decides a row, as JSON."""
    return hashlib.sha256(json.dumps(parts, separators=(",", ":")).encode()).hexdigest()


@dataclass
class Store:
    """The rows of one folder. Reading is memory-mapped; nothing is decoded."""

    folder: Path
    shard_of: dict[str, Path] = field(default_factory=dict)
    _opened: dict[Path, Any] = field(default_factory=dict)
    _sums: dict[Path, dict[str, int]] = field(default_factory=dict)
    _checked: set[str] = field(default_factory=set)

    def __contains__(self, row: str) -> bool:
        return row in self.shard_of

    def get(self, row: str) -> Tensor:
        """A row, compared with its checksum when it is read for the first time. UserError if it is damaged: its shard
        is set aside then, so that the same command encodes it anew."""
        path = self.shard_of[row]
        try:
            if path not in self._opened:
                opened = safe_open(path, framework="pt")
                self._sums[path] = _sums(opened.metadata())
                self._opened[path] = opened
            tensor = self._opened[path].get_tensor(row)
        except (OSError, SafetensorError) as error:
            raise _set_aside(path, f"a file of the cache cannot be read: {error}") from None
        if row not in self._checked:
            expected = self._sums[path].get(row)
            # Shards of older versions have no sums.
            if self._sums[path] and expected != checksum(tensor):
                raise _set_aside(path, "a row of the cache is damaged: its bytes are not those that were written")
            self._checked.add(row)
        return tensor

    def refresh(self) -> "Store":
        """Read the headers of shards that are new since the last look, also those of other processes."""
        known = set(self.shard_of.values())
        for path in sorted(self.folder.glob("*.safetensors")):
            if path not in known:
                self.shard_of.update(dict.fromkeys(_header(path), path))
        return self

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
        path.rename(aside)
    return UserError(what, str(path), f"it is {aside.name} now: run the same command, which encodes it anew")


def open_store(folder: Path) -> Store:
    return Store(folder).refresh()


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
    """Shards whose bytes are not those that were written."""
    return [p for p in sorted(folder.glob("*.safetensors")) if not p.stem == files.sha256(p)[:_NAME_DIGITS]]


def collect_garbage(folder: Path, needed: Collection[str]) -> int:
    """Delete rows that are not needed; gives the bytes freed. Shards holding both kinds are written anew."""
    before, store = Store(folder).bytes(), open_store(folder)
    for path in sorted(folder.glob("*.safetensors")):
        names = _header(path)
        live = [name for name in names if name in needed]
        if len(live) == len(names):
            continue
        if live:
            with safe_open(path, framework="pt") as shard:
                notes = json.loads(shard.metadata()["notes"])
                write_shard(folder, {n: store.get(n) for n in live}, {n: notes[n] for n in live if n in notes})
        path.unlink()
    return before - Store(folder).bytes()


def finite(rows: Iterable[tuple[str, Tensor]]) -> None:
    """Refuse rows that cannot be trained on. Pairs of (what the user calls it, tensor)."""
    bad = [name for name, tensor in rows if not bool(torch.isfinite(tensor).all())]
    if bad:
        raise UserError(
            f"the encoder gives values that are not finite in 16 bits for {shortened(bad)}",
            "cache",
            'check the weights; a VAE that overflows in fp16 needs [cache] vae_precision = "fp32"',
        )


def _header(path: Path) -> list[str]:
    """Names of a shard's rows, after checking that the file is as long as its header says."""
    return list(header.read(path, "delete it: what it held is encoded anew"))
