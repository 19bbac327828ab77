"""Metadata files of picture folders: metadata.jsonl, .csv or .parquet with a column `file_name`."""

import csv
import json
import posixpath
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdxl_trainer.config import Data
from sdxl_trainer.data.sources.tree import Tree
from sdxl_trainer.errors import UserError, closest

FILE_NAME = "file_name"


@dataclass(frozen=True)
class Row:
    """`metadata` is the file's name in the tree, `place` names file and line; `caption` is as written, `extra` are
    the values of other columns that were asked for."""

    metadata: str
    place: str
    file_name: str | None
    caption: object
    extra: dict[str, object]


def rows(tree: Tree, data: Data, place: str, more: Sequence[tuple[str, str]] = ()) -> Iterator[Row]:
    """The rows of all metadata files, with `more` columns as (option, column). UserError: a file that cannot be read,
    or lacks a column."""
    folders: dict[str, str] = {}
    for name in tree.metadata:
        other = folders.setdefault(posixpath.dirname(name), name)
        if other != name:
            raise UserError(f"two metadata files in one folder: {other} and {name}", place, "remove one of them")
        try:
            table = READERS[posixpath.splitext(name)[1].lower()](tree.root / name)
        except (UnicodeDecodeError, csv.Error, OSError, ValueError) as error:
            raise UserError(f"{name} cannot be read: {error}", place, "correct the file (UTF-8 text)") from None
        columns = {column for _, row in table for column in row}
        _require(columns, FILE_NAME, name, place, "name the column with the pictures' paths 'file_name'")
        if data.caption is None:
            near = closest(data.caption_column, columns - {FILE_NAME}) if columns - {FILE_NAME} else "add captions"
            _require(columns, data.caption_column, name, place, f"set caption_column; {near}")
        for option, column in more:
            _require(columns, column, name, place, f"set {option}; {closest(column, columns - {FILE_NAME})}")
        for line, row in table:
            file_name = row.get(FILE_NAME)
            written = file_name if isinstance(file_name, str) and file_name else None
            extra = {column: row.get(column) for _, column in more}
            yield Row(name, f"{name}:{line}", written, row.get(data.caption_column), extra)


def _require(columns: set[str], wanted: str, name: str, place: str, fix: str) -> None:
    if wanted not in columns:
        there = ", ".join(sorted(columns)) or "none, the file is empty"
        raise UserError(f"{name} has no column '{wanted}'; columns: {there}", place, fix)


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


READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet}
