"""What a source says of a picture besides its caption: its mask, its focus, and how often it is seen."""

import posixpath
import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import PurePosixPath

from sdxl_trainer.config import Data
from sdxl_trainer.data.records import Mask
from sdxl_trainer.data.sources.metadata import Row
from sdxl_trainer.data.sources.tree import Tree, read_file
from sdxl_trainer.errors import UserError

# kohya's convention: repeats, an underscore, words that are the caption of pictures that have none.
KOHYA = re.compile(r"(\d+)_(.+)")
# Keys of a picture's JSON file that hold its caption, where there is none under caption_column.
JSON_CAPTIONS = ("caption", "text")
PROBLEMS = {
    "mask_missing": ("masks named by metadata rows do not exist", "correct the column, or restore the files"),
    "mask_twice": ("pictures have two masks", "keep one mask for each"),
    "unmasked": ("pictures have no mask", "draw one for each; white all over trains the whole picture"),
    "pairs": (
        "pictures have not one caption in caption_column_2 for each in caption_column",
        "write both as strings, or as lists of one length",
    ),
    "unfocused": (
        "points of focus are not two shares from 0 to 1",
        "write x and y as shares of width and height from the top left, for example [0.5, 0.25]",
    ),
    "outside_kohya": (
        "pictures lie outside of folders named like 10_words",
        "move them into such a folder, or remove kohya_folders",
    ),
    "never": ("pictures have 0 repeats by their folder's name", "give 1 or more, or take them out of the folder"),
}


def columns(data: Data) -> list[tuple[str, str]]:
    """(option, column) of the metadata columns that are read besides captions."""
    wanted = [("mask_column", data.mask_column)] if data.mask == "column" else []
    wanted += [("caption_column_2", data.caption_column_2)] if data.caption_column_2 is not None else []
    return wanted + ([("focus_column", data.focus_column)] if data.focus == "column" else [])


def refuse_without_files(data: Data, tree: Tree, place: str) -> None:
    """Columns can only be read from a metadata file, lines only from caption files, which must be there: but for users
    of kohya an ending that no file has is how to read none."""
    ending = (data.caption_extension or "").lower()
    if (
        ending
        and not data.kohya_folders
        and not any(name.lower().endswith(ending) for name in (*tree.captions, *tree.others))
    ):
        what = f"caption_extension = '{data.caption_extension}' has no effect: no file ends so"
        raise UserError(what, place, "correct or remove it")
    if data.caption_per_line and not tree.captions and data.metadata is None and data.caption_extension is None:
        raise UserError("caption_per_line has no effect: there are no caption files", place, "remove it")
    if data.metadata is not None:
        return
    if data.caption_column_2 is not None and not tree.metadata:
        what = "caption_column_2 has no effect: there is no metadata file in the folder"
        raise UserError(what, place, f"add a metadata.jsonl with file_name and '{data.caption_column_2}', or remove it")
    for option, _ in () if tree.metadata else columns(data):
        name = option.removesuffix("_column")
        what = f"{name} = 'column', but there is no metadata file in the folder"
        raise UserError(
            what, place, f"add a metadata.jsonl with file_name and '{getattr(data, option)}', or remove {name}"
        )


def clean(value: object) -> tuple[str, ...] | None:
    """Captions without surrounding white space; empty if there is none; None if it is not text."""
    if value is None:
        return ()
    values = value if isinstance(value, list | tuple) else [value]
    stripped = tuple(text.strip() for text in values if isinstance(text, str) and _whole(text))
    if len(stripped) < len(values):
        return None
    return stripped if all(stripped) else ()


def in_json(data: Data, values: Mapping[str, object]) -> object:
    """What a JSON file of one picture says of its caption; None if nothing."""
    return next((values[key] for key in (data.caption_column, *JSON_CAPTIONS) if values.get(key)), None)


def _whole(text: str) -> bool:
    """JSON can hold halves of characters (lone surrogates), which no tokenizer takes."""
    return text.isascii() or not any("\ud800" <= character <= "\udfff" for character in text)


def seconds(
    value: object, first: object, captions: tuple[str, ...], place: str, problems: dict[str, list[str]]
) -> tuple[str, ...]:
    """What the second encoder reads, one for each caption; a picture with no caption of its own needs none."""
    found = clean(value)
    if found is None:
        problems["type"].append(place)
    elif len(found) != len(captions) and (found or clean(first)):
        problems["pairs"].append(place)
    return found or ()


def focus(value: object, place: str, problems: dict[str, list[str]]) -> tuple[float, float] | None:
    """A point from [x, y] or "x, y"; None where nothing is given."""
    if value is None or value == "":
        return None
    parts = value.split(",") if isinstance(value, str) else value
    try:
        x, y = (float(part) for part in parts)  # type: ignore[attr-defined]  # what is not a list is a TypeError
    except (TypeError, ValueError):
        x = y = -1.0
    if 0 <= x <= 1 and 0 <= y <= 1:
        return x, y
    problems["unfocused"].append(f"{value!r} ({place})")
    return None


def kohya(name: str, root: str) -> tuple[int, str] | None:
    """Repeats and words from the innermost folder named like 10_words above a picture, or from the root's name."""
    for part in [*reversed(PurePosixPath(name).parts[:-1]), root]:
        found = KOHYA.fullmatch(part)
        if found:
            return int(found[1]), found[2].strip()
    return None


def named_masks(data: Data, tree: Tree, rows: Mapping[str, Row], problems: dict[str, list[str]]) -> dict[str, Mask]:
    """The mask of each picture that has one: the file beside it, or the one that its metadata row names."""
    if data.mask == "file":
        return _beside(data, tree, problems)
    made = {}
    for name, row in rows.items() if data.mask == "column" else ():
        value = row.extra.get(data.mask_column)
        if value is None or value == "":
            continue
        written = str(value).replace("\\", "/")
        path = posixpath.normpath(posixpath.join(row.folder, written))
        stamp = tree.pictures.get(path) or tree.masks.get(path)
        if stamp is None:
            problems["mask_missing"].append(f"{value} ({row.place})")
        else:
            made[name] = Mask(path, partial(read_file, tree.root / path, path), stamp)
    return made


def _beside(data: Data, tree: Tree, problems: dict[str, list[str]]) -> dict[str, Mask]:
    by_stem: dict[str, list[str]] = defaultdict(list)
    for name in tree.masks:
        by_stem[posixpath.splitext(name)[0].removesuffix(data.mask_suffix)].append(name)
    made, used = {}, set()
    for name in tree.pictures:
        found = by_stem.get(posixpath.splitext(name)[0], [])
        if len(found) > 1:
            problems["mask_twice"].append(f"{name} ({' and '.join(sorted(found))})")
        elif found:
            made[name] = Mask(found[0], partial(read_file, tree.root / found[0], found[0]), tree.masks[found[0]])
            used.add(found[0])
    tree.skipped["masks"] -= len(used)
    return made
