"""Metadata files of picture folders: metadata.jsonl, .csv or .parquet with a column `file_name`, or a file that the
config names, which may also be JSON as kohya's fine-tuning scripts write it."""

import csv
import json
import os
import posixpath
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer.config import Data
from sdxl_trainer.data.sources.tree import Tree
from sdxl_trainer.errors import UserError, closest

FILE_NAME = "file_name"
# Kohya's name of that column, and where its captions are: both are one caption, with a comma between.
_KOHYA_NAME, _KOHYA_CAPTIONS = "image_path", ("caption", "tags")


@dataclass(frozen=True)
class Row:
    """`folder` is where its file names begin, from the tree's root, `place` names file and line; `caption` is as
    written, `extra` are the values of other columns that were asked for. `bare`: names may lack their endings."""

    folder: str
    place: str
    file_name: str | None
    caption: object
    extra: dict[str, object]
    bare: bool = False


def named(data: Data, root: Path) -> Path | None:
    """The file that `data.metadata` names, in the folder of pictures or elsewhere; None if there is none."""
    places = [root / Path(data.metadata).expanduser(), Path(data.metadata).expanduser()] if data.metadata else []
    return next((path for path in places if path.is_file()), None)


def tables(tree: Tree, data: Data, place: str) -> list[tuple[str, Path, str]]:
    """(name in messages, path, folder where its file names begin) of each metadata file. UserError if the one that is
    named does not exist, or is none."""
    if data.metadata is None:
        return [(name, tree.root / name, posixpath.dirname(name)) for name in tree.metadata]
    path = named(data, tree.root)
    if path is None:
        what = f"metadata = '{data.metadata}': there is no such file"
        raise UserError(
            what, place, f"give its name in {tree.root}, or its path (relative paths start at {Path.cwd()})"
        )
    if path.suffix.lower() not in READERS:
        what = f"metadata = '{data.metadata}' is no file of captions"
        raise UserError(what, place, f"known are {' '.join(sorted(READERS))}")
    inside = os.path.relpath(path.resolve().parent, tree.root).replace(os.sep, "/")
    return [(data.metadata, path, "" if inside == "." or inside.startswith("..") else inside)]


def rows(
    tree: Tree, data: Data, place: str, files: Sequence[tuple[str, Path, str]], more: Sequence[tuple[str, str]] = ()
) -> Iterator[Row]:
    """The rows of metadata files, with `more` columns as (option, column). UserError: a file that cannot be read, or
    lacks a column."""
    folders: dict[str, str] = {}
    for name, path, folder in files:
        other = folders.setdefault(folder, name)
        if other != name:
            raise UserError(f"two metadata files in one folder: {other} and {name}", place, "remove one of them")
        try:
            table = READERS[path.suffix.lower()](path)
        except (UnicodeDecodeError, csv.Error, OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: {error}", place, "correct the file (UTF-8 text)") from None
        columns = {column for _, row in table for column in row}
        kohya = _KOHYA_NAME in columns and FILE_NAME not in columns
        names = _KOHYA_NAME if kohya else FILE_NAME
        _require(columns, names, name, place, f"name the column with the pictures' paths '{FILE_NAME}'")
        joined = kohya and data.caption_column not in columns and not columns.isdisjoint(_KOHYA_CAPTIONS)
        if data.caption is None and not joined:
            near = closest(data.caption_column, columns - {names}) if columns - {names} else "add captions"
            _require(columns, data.caption_column, name, place, f"set caption_column; {near}")
        for option, column in more:
            _require(columns, column, name, place, f"set {option}; {closest(column, columns - {names})}")
        for line, row in table:
            written = row.get(names)
            caption = _joined(data, row) if joined else row.get(data.caption_column)
            extra = {column: row.get(column) for _, column in more}
            file_name = written if isinstance(written, str) and written else None
            yield Row(folder, f"{name}:{line}", file_name, caption, extra, kohya)


def _joined(data: Data, row: dict[str, Any]) -> object:
    """Kohya's caption of a row: what is said in `caption`, then the tags; with caption_per_line for each line."""
    caption, tags = (row.get(column) for column in _KOHYA_CAPTIONS)
    if not all(part is None or isinstance(part, str) for part in (caption, tags)):
        return [caption, tags]  # no text: refused where captions are looked at
    lines = [line for line in (caption or "").split("\n") if line.strip()] if data.caption_per_line else [caption or ""]
    return [", ".join(part.strip() for part in (line, tags or "") if part.strip()) for line in lines or [""]]


def _require(columns: set[str], wanted: str, name: str, place: str, fix: str) -> None:
    if wanted not in columns:
        there = ", ".join(sorted(columns)) or "none, the file is empty"
        raise UserError(f"{name} has no column '{wanted}'; columns: {there}", place, fix)


def _json(path: Path) -> list[tuple[int | str, dict[str, Any]]]:
    """A list of rows; or an object with the pictures' names for its keys, as kohya writes it."""
    content = json.loads(path.read_text(encoding="utf-8-sig"))
    if isinstance(content, dict):
        values = [{"caption": row} if isinstance(row, str) else row for row in content.values()]
        if any(not isinstance(row, dict) for row in values):
            raise ValueError("what a picture's name stands for is neither a caption nor an object with one")
        return [(name, {**row, _KOHYA_NAME: name}) for name, row in zip(content, values, strict=True)]
    if not isinstance(content, list) or any(not isinstance(row, dict) for row in content):
        raise ValueError("it is neither an object of pictures nor a list of objects")
    return list(enumerate(content, start=1))


def _jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    # Not splitlines(): JSON strings may hold the rarer line separators of Unicode.
    for number, line in enumerate(path.read_text(encoding="utf-8-sig").split("\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise ValueError(f"line {number} is not JSON: {error}") from None
        if not isinstance(row, dict):
            raise ValueError(f"line {number} is not a JSON object")
        found.append((number, row))
    return found


def _csv(path: Path) -> list[tuple[int, dict[str, Any]]]:
    found = []
    with path.open(encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, strict=True)
        for row in reader:
            if None in row or None in row.values():
                count = len(reader.fieldnames or ())
                raise ValueError(
                    f"line {reader.line_num} does not have {count} values: captions with commas need quotes"
                )
            found.append((reader.line_num, dict(row)))
    return found


def _parquet(path: Path) -> list[tuple[int, dict[str, Any]]]:
    import pyarrow.parquet

    return list(enumerate(pyarrow.parquet.read_table(path).to_pylist()))


READERS: dict[str, Callable[[Path], Sequence[tuple[int | str, dict[str, Any]]]]] = {
    ".jsonl": _jsonl,
    ".csv": _csv,
    ".parquet": _parquet,
    ".json": _json,
}
