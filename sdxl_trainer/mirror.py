"""Copies of checkpoints at any address that fsspec opens: for machines whose disk goes away with them.

Object stores cannot rename: a checkpoint's manifest.json is written last, and without it a copy does not count.
"""

import json
import posixpath
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

from sdxl_trainer import checkpoint, files
from sdxl_trainer.checkpoint import PREFIX, Checkpoint
from sdxl_trainer.errors import UserError

MANIFEST = "manifest.json"
WHERE = "train.checkpoint_mirror"


def opened(address: str) -> tuple[Any, str]:
    """The file system of an address and the path on it. UserError if there is none."""
    from fsspec.core import url_to_fs

    try:
        return url_to_fs(address)
    except (ValueError, ImportError) as error:
        fix = "give a folder, or an address such as s3://bucket/run (which needs: pip install s3fs)"
        raise UserError(f"'{address}' cannot be opened: {error}", WHERE, fix) from None


def upload(folder: Path, address: str, limit: int | None) -> None:
    """Copy a verified checkpoint, then delete the oldest copies until `limit` are left."""
    system, root = opened(address)
    target = posixpath.join(root, folder.name)
    if system.exists(target):
        system.rm(target, recursive=True)
    local = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in sorted(local, key=lambda p: p.name == MANIFEST and p.parent == folder):
        place = posixpath.join(target, path.relative_to(folder).as_posix())
        system.makedirs(posixpath.dirname(place), exist_ok=True)
        system.put_file(str(path), place)
        size = system.size(place)
        if size != path.stat().st_size:
            raise UserError(f"{place} holds {size} bytes of {path.stat().st_size}", address, "upload it again")
    for step, old in _complete(system, root)[:-limit] if limit else []:
        if step < int(folder.name.removeprefix(PREFIX)):
            system.rm(old, recursive=True)


def newest(address: str, output: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Bring the newest checkpoint of a mirror that is whole and undamaged into the output folder. UserError if the
    mirror does not answer: it may hold the run that would begin anew without it."""
    with ThreadPoolExecutor(1) as beside:
        asked = beside.submit(_newest, address, output, say)
    error = asked.exception()  # whatever the libraries of clouds raise
    if error is None or isinstance(error, UserError):
        return asked.result()
    what = f"the mirror cannot be read: {type(error).__name__}: {error}"
    raise UserError(what, f"{WHERE} = '{address}'", "make it reachable, or remove the option to begin without it")


def _newest(address: str, output: Path, say: Callable[[str], None]) -> Checkpoint | None:
    system, root = opened(address)
    for step, source in reversed(_complete(system, root)):
        path = output / f"{PREFIX}{step}"
        try:
            files.write_atomically(path, partial(_fetch, system, source, step))
        except UserError as error:
            say(f"{source} is not used: {error.what}")
            continue
        say(f"{path.name} was brought back from {address}")
        return Checkpoint(path, step)
    return None


def _fetch(system: Any, source: str, step: int, folder: Path) -> None:
    """Copy what the manifest names into a new folder, and verify it."""
    manifest = system.cat_file(posixpath.join(source, MANIFEST))
    try:
        named = [str(name) for name in json.loads(manifest)["files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError("its manifest.json is damaged", source, "delete this copy") from None
    folder.mkdir()
    for name in [*named, MANIFEST]:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise UserError(f"its manifest names '{name}', outside of its folder", source, "delete this copy")
        target.parent.mkdir(parents=True, exist_ok=True)
        system.get_file(posixpath.join(source, name), str(target))
    checkpoint.verify(Checkpoint(folder, step))


def _complete(system: Any, root: str) -> list[tuple[int, str]]:
    """(step, path) of the copies that have a manifest, oldest first."""
    found = []
    for manifest in system.glob(posixpath.join(root, f"{PREFIX}*", MANIFEST)):
        folder = posixpath.dirname(str(manifest))
        number = posixpath.basename(folder).removeprefix(PREFIX)
        if number.isdigit():
            found.append((int(number), folder))
    return sorted(found)
