"""Captions in files beside the pictures, and files that look like captions and are not read."""

import json
import posixpath
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from sdxl_trainer.config import Data
from sdxl_trainer.data.sources import extras
from sdxl_trainer.data.sources.metadata import READERS
from sdxl_trainer.data.sources.tree import SIDECARS, Tree
from sdxl_trainer.errors import plural

JSON = SIDECARS[-1]
# How much of a file is looked at to see whether it holds captions, and how many pictures are looked for in it.
_LOOK, _NAMES = 1 << 16, 50
PROBLEMS = {
    "unreadable": ("caption files are not UTF-8 text", "save them as UTF-8"),
    "not JSON": ("JSON files beside pictures cannot be read", "correct them, or take them out of the folder"),
    "keyless": ("JSON files beside pictures hold no caption", "set caption_column to the key that does"),
}


@dataclass(frozen=True)
class Overlooked:
    """What seems to hold captions, the option that reads it, and what says so: files beside pictures, or pictures
    that are named in it."""

    option: str
    value: str
    seen: tuple[str, ...]
    what: str

    def fix(self) -> str:
        return f'set {self.option} = "{self.value}", which reads {self.what}'


def endings(data: Data) -> tuple[str, ...]:
    """Of caption files, in order of preference where several lie beside a picture."""
    given = data.caption_extension
    return SIDECARS if given is None else (given if given.startswith(".") else f".{given}",)


def path(data: Data, tree: Tree, name: str) -> str | None:
    """The caption file of a picture: `a.png.txt`, else `a.txt`."""
    starts = (name, posixpath.splitext(name)[0])
    names = (start + e for ending in endings(data) for start in starts for e in (ending, ending.upper()))
    return next((n for n in names if n in tree.captions or n in tree.others), None)


def captions(
    data: Data, fallback: str | None, tree: Tree, name: str, problems: dict[str, list[str]]
) -> tuple[str, ...]:
    """The captions in the file beside a picture; else the one for all. What is wrong is noted."""
    found = path(data, tree, name)
    text = "" if found is None else _text(tree, found, problems)
    if text is None:
        return ()
    written: tuple[str, ...] | None = (text,) if text else ()
    if found is not None and found.lower().endswith(JSON):
        written = _in_json(data, found, text, fallback is None, problems)
        if written is None:
            return ()
    elif data.caption_per_line:
        written = tuple(line.strip() for line in text.split("\n") if line.strip())
    if written or fallback is not None:
        return written or (str(fallback).strip(),)
    problems["empty" if found else "uncaptioned"].append(found or name)
    return ()


def _text(tree: Tree, name: str, problems: dict[str, list[str]]) -> str | None:
    try:
        return (tree.root / name).read_text(encoding="utf-8-sig").strip()
    except UnicodeDecodeError:
        problems["unreadable"].append(name)
    except OSError as error:
        problems["unreadable"].append(f"{name} ({error.strerror})")
    return None


def _in_json(data: Data, name: str, text: str, needed: bool, problems: dict[str, list[str]]) -> tuple[str, ...] | None:
    """The captions of a JSON file; none where a caption for all will do; None if something is noted."""
    try:
        values = json.loads(text or "{}")
    except ValueError as error:
        problems["not JSON"].append(f"{name} ({error})")
        return None
    written = extras.in_json(data, values) if isinstance(values, dict) else None
    if written is None:
        if needed:
            keys = ", ".join(map(str, values)) if isinstance(values, dict) else ""
            problems["keyless"].append(f"{name} ({f'keys: {keys[:100]}' if keys else 'no keys'})")
        return None if needed else ()
    found = extras.clean(written)
    if found is None:
        problems["type"].append(name)
    return found


def used(data: Data, tree: Tree, names: Iterable[str]) -> set[str]:
    """The caption files of pictures."""
    return {found for name in names if (found := path(data, tree, name)) is not None}


def overlooked(tree: Tree, without: Iterable[str]) -> list[Overlooked]:
    """Files that look like the captions of pictures that have none of their own, those of most pictures first."""
    names = dict.fromkeys(without)
    starts = names.keys() | {posixpath.splitext(name)[0] for name in names}
    endings: dict[str, list[str]] = {}
    for other in sorted(tree.others) if names else ():
        start, ending = posixpath.splitext(other)
        if start in starts and ending and ending.lower() != JSON:
            endings.setdefault(ending, []).append(other)
    found = [
        Overlooked(
            "caption_extension", ending, tuple(there), f"the {plural(len(there), f'{ending} file')} beside pictures"
        )
        for ending, there in endings.items()
        if _text_of(tree.root / there[0])
    ]
    some = {name: posixpath.basename(posixpath.splitext(name)[0]) for name in list(names)[:_NAMES]}
    beside = {other for there in endings.values() for other in there}
    for table in sorted(tree.others - beside if names else ()):
        start, ending = posixpath.splitext(table)
        if ending.lower() in READERS and start not in starts:
            text = _text_of(tree.root / table)
            named = tuple(n for n, stem in some.items() if any(f"{mark}{stem}" in text for mark in ('"', "/", "\n")))
            if named:
                found.append(Overlooked("metadata", table, named, f"{table}, in which pictures are named"))
    return sorted(found, key=lambda files: -len(files.seen))


def _text_of(path: Path) -> str:
    """How a text file begins; nothing of one that is binary, or markup, as photographs' notes of other programs are."""
    try:
        with path.open("rb") as file:
            text = file.read(_LOOK).decode("utf-8-sig", errors="ignore")
    except OSError:
        return ""
    return "" if "\0" in text or text.lstrip().startswith("<") else text
