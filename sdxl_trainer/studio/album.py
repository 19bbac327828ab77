"""A folder of pictures with its captions, read and written where training reads them: the files stay the truth."""

import csv
import io
import json
import posixpath
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.config import Data
from sdxl_trainer.data.sources import beside, metadata
from sdxl_trainer.data.sources.tree import CAPTIONS, Tree, scan
from sdxl_trainer.errors import UserError, shortened
from sdxl_trainer.studio.workspace import inside

LONGEST = 20_000  # characters of a caption; CLIP reads a few hundred
TEXT, FOCUS = "text", "focus"
_PLAIN = Data(path=".")


@dataclass(frozen=True)
class Entry:
    """A picture: its caption, the file that holds it ("" if there is none yet), whether that file is text that can be
    read, and the point that crops keep."""

    name: str
    caption: str
    source: str
    readable: bool = True
    focus: tuple[float, float] | None = None


@dataclass(frozen=True)
class Album:
    """What is in a folder now. Made anew for each request, so that edits by other programs are seen."""

    root: Path
    tree: Tree
    entries: dict[str, Entry]

    def entry(self, name: object) -> Entry:
        if not isinstance(name, str) or name not in self.entries:
            raise UserError(f"there is no picture '{str(name)[:120]}'", str(self.root), "look at the folder again")
        return self.entries[name]

    def file(self, name: object) -> Path:
        """The picture's file; never one outside of the folder."""
        return inside(self.root, self.entry(name).name)


def open_album(root: Path) -> Album:
    """Read a folder. UserError for what training would refuse in finding the files."""
    tree = scan(root, str(root), "-masklabel")
    rows = {name: (table, row) for table in tree.metadata for name, row in _rows(tree, table)}
    entries = {}
    for name in tree.pictures:
        if name in rows:
            table, row = rows[name]
            entries[name] = Entry(name, _caption(row), table, True, _focus(row.get(FOCUS)))
        else:
            entries[name] = _beside(tree, name)
    return Album(root, tree, entries)


def _rows(tree: Tree, table: str) -> list[tuple[str, dict[str, Any]]]:
    """(picture, row) of a metadata file. UserError if it cannot be read."""
    try:
        read = metadata.READERS[posixpath.splitext(table)[1].lower()](tree.root / table)
    except (UnicodeDecodeError, csv.Error, OSError, ValueError) as error:
        raise UserError(f"{table} cannot be read: {error}", str(tree.root), "correct the file (UTF-8 text)") from None
    return [(_named(table, row.get(metadata.FILE_NAME)), row) for _, row in read]


def _named(table: str, written: object) -> str:
    return posixpath.normpath(posixpath.join(posixpath.dirname(table), str(written).replace("\\", "/")))


def _caption(row: Mapping[str, Any]) -> str:
    value = row.get(TEXT)
    return "\n".join(map(str, value)) if isinstance(value, list) else value if isinstance(value, str) else ""


def _focus(value: object) -> tuple[float, float] | None:
    parts = value.split(",") if isinstance(value, str) else value
    try:
        x, y = (float(part) for part in parts)  # type: ignore[attr-defined]  # what is not a list is a TypeError
    except (TypeError, ValueError):
        return None
    return (x, y) if 0 <= x <= 1 and 0 <= y <= 1 else None


def _beside(tree: Tree, name: str) -> Entry:
    """What the file beside a picture says. A .json is not written to: a .txt, which is read before it, will be."""
    path = beside.path(_PLAIN, tree, name) or ""
    if path.lower().endswith(beside.JSON):
        return Entry(name, "\n".join(beside.captions(_PLAIN, "", tree, name, defaultdict(list))), "")
    text = _read(tree.root / path) if path else ""
    return Entry(name, text or "", path, text is not None)


def _read(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError):
        return None


def readonly(entry: Entry) -> str | None:
    """Why a caption can be looked at only: it would be lost, or cut."""
    if not entry.readable:
        return f"{entry.source} is not UTF-8 text"
    return f"longer than {LONGEST:,} characters" if len(entry.caption) > LONGEST else None


def write_captions(album: Album, captions: Mapping[str, str], before: Mapping[str, str]) -> None:
    """Save captions of pictures where each is read from. `before` is what each was when the page showed it: UserError
    if another program has changed one since, and nothing is written then."""
    for name, text in captions.items():
        entry = album.entry(name)
        if not isinstance(text, str) or len(text) > LONGEST or _broken(text):
            what = "a caption is not text" if not isinstance(text, str) or _broken(text) else "a caption is too long"
            raise UserError(what, name, f"write at most {LONGEST:,} characters")
        if (why := readonly(entry)) is not None:
            raise UserError(f"the caption is not changed here: {why}", entry.name, "change it in an editor")
        if name in before and before[name] != entry.caption:
            raise UserError("the caption was changed by another program", name, "look at the folder again")
    _write(album, {name: {TEXT: text.strip()} for name, text in captions.items()})


def write_focus(album: Album, name: str, focus: Sequence[float] | None) -> None:
    """Save the point that a picture's crops keep; none: the plain crop. Such points stand in a metadata file: where
    captions stand in text files, a metadata.jsonl with all captions is made, which is read in their place."""
    entry = album.entry(name)
    point = _focus(list(focus)) if focus is not None else None
    if focus is not None and point is None:
        raise UserError("a point lies outside of its picture", name, "x and y are shares from 0 to 1")
    if not album.tree.metadata:
        unreadable = [e.source for e in album.entries.values() if not e.readable]
        if unreadable:
            raise UserError(f"not UTF-8 text: {shortened(unreadable, 3)}", str(album.root), "save them as UTF-8")
        rows = ({"file_name": e.name, TEXT: e.caption, FOCUS: None} for e in album.entries.values())
        files.write_text(album.root / "metadata.jsonl", "".join(_json(row) for row in rows))
        album = open_album(album.root)
    _write(album, {entry.name: {FOCUS: list(point) if point else None}})


def _broken(text: str) -> bool:
    """Halves of characters, which no file holds as UTF-8."""
    return any("\ud800" <= character <= "\udfff" for character in text)


def _write(album: Album, changes: Mapping[str, dict[str, Any]]) -> None:
    by_table: dict[str, dict[str, dict[str, Any]]] = {}
    for name, values in changes.items():
        source = album.entries[name].source
        table = source if source in album.tree.metadata else _governing(album.tree, name) if not source else ""
        if table:
            by_table.setdefault(table, {})[name] = values
        else:
            path = source or posixpath.splitext(name)[0] + CAPTIONS[0]
            files.write_text(album.root / path, values[TEXT] + "\n" if values[TEXT] else "")
    for table, rows in by_table.items():
        _write_table(album, table, rows)


def _governing(tree: Tree, name: str) -> str:
    """The metadata file that has to name a picture: one in its folder or above, the nearest first."""
    above = [t for t in tree.metadata if not posixpath.dirname(t) or name.startswith(posixpath.dirname(t) + "/")]
    return max(above, key=len, default="")


def _write_table(album: Album, table: str, changes: Mapping[str, dict[str, Any]]) -> None:
    """Change values of rows in a metadata file, all else as it was; rows that are missing come last."""
    kind = posixpath.splitext(table)[1].lower()
    if kind not in WRITERS:
        fix = "save its rows as metadata.jsonl beside it and remove it"
        raise UserError(f"{table} is read here but not changed", str(album.root), fix)
    rows = _rows(album.tree, table)
    there = {name for name, _ in rows}
    made = [{**row, **_fitting(row, changes.get(name, {}))} for name, row in rows]
    for name in changes.keys() - there:
        relative = posixpath.relpath(name, posixpath.dirname(table) or ".")
        made.append({metadata.FILE_NAME: relative, **changes[name]})
    files.write_text(album.root / table, WRITERS[kind](made))


def _fitting(row: Mapping[str, Any], values: dict[str, Any]) -> dict[str, Any]:
    """A list of captions stays one: its captions are shown one a line."""
    if isinstance(row.get(TEXT), list) and TEXT in values:
        return {**values, TEXT: [line.strip() for line in values[TEXT].split("\n") if line.strip()]}
    return values


def _json(row: Mapping[str, Any]) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def _jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(map(_json, rows))


def _csv(rows: Sequence[Mapping[str, Any]]) -> str:
    names = list(dict.fromkeys(name for row in rows for name in row))
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = {k: ",".join(map(str, v)) if isinstance(v, list) else v for k, v in row.items()}
        writer.writerow({name: cells.get(name) or "" for name in names})
    return text.getvalue()


WRITERS = {".jsonl": _jsonl, ".csv": _csv}
