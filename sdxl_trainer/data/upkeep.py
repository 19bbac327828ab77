"""Looking after a cache: damage found, rows that nobody needs deleted, and what killed writers left behind."""

import json
import tempfile
import time
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from safetensors import safe_open

from sdxl_trainer import files
from sdxl_trainer.data import cache

# Drafts that did not change for so long belong to nobody: a shard is written in seconds.
DRAFT_SECONDS = 3600


def damaged(folder: Path) -> list[Path]:
    """Shards whose bytes are not those that were written, and the table if it is not what the shards say."""
    bad = [path for path in sorted(folder.glob("*.safetensors")) if not cache.is_whole(path)]
    store = cache.Store(folder)
    if bad or not store.index.is_file():
        return bad
    with tempfile.TemporaryDirectory() as anew:
        right = Path(anew) / "index"
        store.refresh().table.save(right)
        return [] if files.sha256(right) == files.sha256(store.index) else [store.index]


def collect_garbage(folder: Path, needed: Collection[str]) -> int:
    """Delete rows that are not needed; gives the bytes freed. Shards holding both kinds are written anew."""
    before, store = cache.Store(folder).bytes(), cache.open_store(folder)
    for path in sorted(folder.glob("*.safetensors")):
        names = [name for name, *_ in cache.described(path)]
        live = [name for name in names if name in needed]
        if len(live) == len(names):
            continue
        if live:
            with safe_open(path, framework="pt") as shard:
                notes = json.loads((shard.metadata() or {}).get("notes", "{}"))  # shards of old have none
                cache.write_shard(folder, {n: store.get(n) for n in live}, {n: notes[n] for n in live if n in notes})
        path.unlink()
    return before - cache.Store(folder).bytes()


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
