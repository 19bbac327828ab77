"""What a run is asked for while it goes on: a checkpoint or pictures, now, or to pause. A wish is an empty file in the
run's folder, so that anything that can write there can ask: another terminal, another machine, the studio."""

import os
import tomllib
from pathlib import Path

from sdxl_trainer import files, lock
from sdxl_trainer.errors import UserError, closest

# The wish to pause stays until it is taken back, by asking to continue.
WISHES = {"save": ".save-now", "sample": ".sample-now", "pause": ".pause"}
CONTINUE = "continue"
SAID = {
    "save": "a checkpoint is saved",
    "sample": "the validation pictures are drawn",
    "pause": "the run saves a checkpoint and holds",
}


def ask(folder: Path, names: list[str]) -> list[str]:
    """Ask the run that is at work in a folder; what will happen, in words. UserError if there is none, or if it cannot
    do what is asked."""
    known = [*WISHES, CONTINUE]
    for name in names:
        if name not in known:
            raise UserError(f"'{name}' cannot be asked of a run", "sdxl now", closest(name, known))
    if not lock.is_held(folder):
        fix = "start it with sdxl train; of a run that has ended sdxl sample draws pictures"
        raise UserError("no run is at work in this folder", str(folder), fix)
    if "sample" in names and not _prompts(folder):
        fix = f"draw with sdxl sample from a checkpoint, which 'sdxl now {folder} save' makes"
        raise UserError("this run has no validation.prompts", str(folder / "config.toml"), fix)
    paused = asked_to_pause(folder)
    _refuse_contradictions(folder, names, paused)
    with files.explained(folder):
        if CONTINUE in names:
            (folder / WISHES["pause"]).unlink(missing_ok=True)
            return ["the run goes on"]
        for name in names:
            (folder / WISHES[name]).touch()
    when = "while the run is paused" if paused else "after the step that is running"
    return [f"{SAID[name]} {when}" for name in names]


def _refuse_contradictions(folder: Path, names: list[str], paused: bool) -> None:
    if CONTINUE in names and len(set(names)) > 1:
        raise UserError("continue goes with no other wish", "sdxl now", "ask for one after the other")
    if CONTINUE in names and not paused:
        raise UserError("this run is not paused", str(folder), f"'sdxl now {folder} pause' lets it hold")
    if paused and {"save", "pause"} & set(names):
        fix = f"'sdxl now {folder} continue' lets it go on"
        raise UserError("this run is asked to pause, which saves its last step", str(folder), fix)


def asked_to_pause(folder: Path) -> bool:
    """Whether a run is to hold; it does after the step that is running."""
    return (folder / WISHES["pause"]).exists()


def granted(folder: Path) -> set[str]:
    """The wishes that are waiting in a folder. All but the one to pause are taken away."""
    found = {name for name, file in WISHES.items() if os.access(f"{folder}/{file}", os.F_OK)}
    for name in found - {"pause"}:
        try:
            (folder / WISHES[name]).unlink()
        except OSError:
            found.discard(name)
    return found


def forget(folder: Path) -> None:
    """Take all wishes away."""
    for file in WISHES.values():
        (folder / file).unlink(missing_ok=True)


def _prompts(folder: Path) -> bool:
    try:
        tree = tomllib.loads((folder / "config.toml").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return True  # it has not begun, and will say so itself
    return bool(tree.get("validation", {}).get("prompts"))
