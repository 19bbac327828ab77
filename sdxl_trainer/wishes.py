"""What a run is asked for while it goes on: a checkpoint or pictures, now. A wish is an empty file in the run's folder,
so that anything that can write there can ask: another terminal, another machine, the studio."""

import tomllib
from pathlib import Path

from sdxl_trainer import files, lock
from sdxl_trainer.errors import UserError, closest

WISHES = {"save": ".save-now", "sample": ".sample-now"}


def ask(folder: Path, names: list[str]) -> list[str]:
    """Ask the run that is at work in a folder; what will happen, in words. UserError if there is none, or if it cannot
    do what is asked."""
    for name in names:
        if name not in WISHES:
            raise UserError(f"'{name}' cannot be asked of a run", "sdxl now", f"choose from: {closest(name, WISHES)}")
    if not lock.is_held(folder):
        fix = "start it with sdxl train; of a run that has ended sdxl sample draws pictures"
        raise UserError("no run is at work in this folder", str(folder), fix)
    if "sample" in names and not _prompts(folder):
        fix = f"draw with sdxl sample from a checkpoint, which 'sdxl now {folder} save' makes"
        raise UserError("this run has no validation.prompts", str(folder / "config.toml"), fix)
    with files.explained(folder):
        for name in names:
            (folder / WISHES[name]).touch()
    said = {"save": "a checkpoint is saved", "sample": "the validation pictures are drawn"}
    return [f"{said[name]} after the step that is running" for name in names]


def granted(folder: Path) -> set[str]:
    """The wishes that are waiting in a folder. They are taken away."""
    found = set()
    for name, file in WISHES.items():
        try:
            (folder / file).unlink()
        except OSError:
            continue
        found.add(name)
    return found


def _prompts(folder: Path) -> bool:
    try:
        tree = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # it has not begun, and will say so itself
    return bool(tree.get("validation", {}).get("prompts"))
