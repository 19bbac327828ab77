"""Copies of checkpoints at any address that fsspec opens: for machines whose disk goes away with them.

Object stores cannot rename: a checkpoint's manifest.json is written last, and without it a copy does not count.
"""

import json
import posixpath
from collections.abc import Callable
from functools import partial
from pathlib import Path

from sdxl_trainer import addresses, checkpoint, files
from sdxl_trainer.checkpoint import PREFIX, Checkpoint
from sdxl_trainer.errors import UserError

MANIFEST = "manifest.json"
WHERE = "train.checkpoint_mirror"


def upload(folder: Path, address: str, limit: int | None) -> None:
    """Copy a verified checkpoint, then delete the oldest copies until `limit` are left."""
    system, root = addresses.opened(address, WHERE)
    target = f"{address.rstrip('/')}/{folder.name}"

    def remove(path: str) -> None:
        if system.exists(path):
            system.rm(path, recursive=True)

    addresses.asked(lambda: remove(posixpath.join(root, folder.name)), address, WHERE)
    local = sorted(p for p in folder.rglob("*") if p.is_file())
    for path in sorted(local, key=lambda p: p.name == MANIFEST and p.parent == folder):
        addresses.put(path, f"{target}/{path.relative_to(folder).as_posix()}", WHERE)
    for step, old in _complete(address)[:-limit] if limit else []:
        if step < int(folder.name.removeprefix(PREFIX)):
            addresses.asked(partial(remove, old), address, WHERE)


def newest(address: str, output: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Bring the newest checkpoint of a mirror that is whole and undamaged into the output folder. UserError if the
    mirror does not answer: it may hold the run that would begin anew without it."""
    for step, _ in reversed(_complete(address)):
        path, source = output / f"{PREFIX}{step}", f"{address.rstrip('/')}/{PREFIX}{step}"
        try:
            files.write_atomically(path, partial(_fetch, source, step))
        except UserError as error:
            say(f"{source} is not used: {error.what}")
            continue
        say(f"{path.name} was brought back from {address}")
        return Checkpoint(path, step)
    return None


def _fetch(source: str, step: int, folder: Path) -> None:
    """Copy what the manifest names into a new folder, and verify it."""
    folder.mkdir()
    addresses.fetch(f"{source}/{MANIFEST}", folder / MANIFEST, WHERE)
    try:
        named = [str(name) for name in json.loads((folder / MANIFEST).read_bytes())["files"]]
    except (ValueError, KeyError, TypeError):
        raise UserError("its manifest.json is damaged", source, "delete this copy") from None
    for name in named:
        target = (folder / name).resolve()
        if not target.is_relative_to(folder.resolve()):
            raise UserError(f"its manifest names '{name}', outside of its folder", source, "delete this copy")
        target.parent.mkdir(parents=True, exist_ok=True)
        addresses.fetch(f"{source}/{name}", target, WHERE)
    checkpoint.verify(Checkpoint(folder, step))


def _complete(address: str) -> list[tuple[int, str]]:
    """(step, path) of the copies that have a manifest, oldest first."""

    def look() -> list[str]:
        system, root = addresses.opened(address, WHERE)
        return system.glob(posixpath.join(root, f"{PREFIX}*", MANIFEST))

    found = []
    for manifest in addresses.asked(look, address, WHERE):
        folder = posixpath.dirname(str(manifest))
        number = posixpath.basename(folder).removeprefix(PREFIX)
        if number.isdigit():
            found.append((int(number), folder))
    return sorted(found)
