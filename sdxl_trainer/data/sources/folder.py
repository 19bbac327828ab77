"""Records of a folder of pictures: captions from metadata files, or from text files beside the pictures."""

import logging
import os
import posixpath
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from difflib import get_close_matches
from functools import partial
from pathlib import Path

from sdxl_trainer.config import Data
from sdxl_trainer.data import images
from sdxl_trainer.data.problems import Notes, Problem, refuse, total
from sdxl_trainer.data.records import Mask, Record
from sdxl_trainer.data.sources import beside, extras, metadata
from sdxl_trainer.data.sources.tree import PICTURES, UNREAD, Tree, natural, read_file
from sdxl_trainer.errors import UserError, plural, shortened

# Sub-folders that may lie beside the one of the wanted split. Any other name there may be a subject's.
SPLITS = {"train", "training", "validation", "valid", "val", "dev", "test", "testing", "eval", "evaluation"}
log = logging.getLogger("sdxl_trainer")
# What is wrong with the captions of a folder: what is said of the names that are listed, and how to fix it.
PROBLEMS = {
    "outside": ("metadata rows name files outside of the folder", "move the pictures into the folder"),
    "unnamed": ("metadata rows have no file_name", "give the picture's path, relative to the metadata file"),
    "foreign": (
        "metadata rows name files that are not pictures of a known kind",
        f"convert the pictures; known are {' '.join(sorted(PICTURES))}",
    ),
    "missing": ("metadata rows name pictures that do not exist", "correct file_name, or remove the rows"),
    "several": ("metadata rows name more than one picture", "write the pictures' names with their endings"),
    "twice": ("pictures are named by more than one metadata row", "keep one row for each; captions may be a list"),
    "type": ("captions are not text", "write each caption as a string or a list of strings"),
    "empty": ("captions are empty", "write them, or give 'caption' for all pictures that have none"),
    "unlisted": (
        "pictures are named by no metadata row",
        "add a row for each, take them out of the folder, or give 'caption' for all pictures that have none",
    ),
    "uncaptioned": (
        "pictures have no caption",
        "write a .txt file beside each, add a metadata.jsonl, or give 'caption' for all pictures that have none"
        " (kohya_folders = true: the words of folders named 10_words)",
    ),
    "zero": ("pictures are empty (zero bytes)", "restore the files, or take them out of the folder"),
}
PROBLEMS |= beside.PROBLEMS | extras.PROBLEMS


def records(data: Data, tree: Tree, split: str, place: str, notes: Notes | None = None) -> list[Record]:
    """The pictures of a folder in natural order of their names. UserError lists everything that is wrong; with `notes`
    it is noted, and the pictures are left out."""
    if not tree.pictures:
        raise _no_pictures(tree, place)
    extras.refuse_without_files(data, tree, place)
    names = _in_split(tree, split, place)
    problems: dict[str, list[str]] = defaultdict(list)
    empty = set(tree.empty)
    tables = metadata.tables(tree, data, place)
    listed = _listed(data, tree, place, tables, problems)
    masks = extras.named_masks(data, tree, listed, problems)
    used = {mask.name for mask in masks.values()}
    governed = [folder for _, _, folder in tables]
    found = []
    for name in names:
        if name in used:
            continue
        before = total(problems)
        if name in empty:
            problems["zero"].append(name)
        folder = _kohya(data, tree, name, problems)
        fallback = data.caption if folder is None else folder[1]
        if name in listed:
            row = listed[name]
            captions = _listed_captions(fallback, row.caption, f"{name} ({row.place})", problems)
        elif any(_below(name, base) for base in governed) and fallback is None:
            problems["unlisted"].append(name)
            continue
        else:
            captions = beside.captions(data, fallback, tree, name, problems)
        record = Record(name, captions, partial(read_file, tree.root / name, name), tree.pictures[name])
        record = _with_extras(data, record, listed.get(name), masks.get(name), folder, problems)
        if total(problems) == before:
            found.append(record)
    refuse(problems, _hinted(tree, problems), place, notes)
    skipped, unread = _tell(data, tree, found, place, set(listed))
    if notes is not None:
        notes.skipped[place].update(skipped)
        what = "pictures seem to have captions that are not read"
        notes.harmful += [Problem("unread captions", what, files.fix(), files.seen, place) for files in unread]
        notes.unusable[place] += len(set(names) - used) - len(found)
    return found


def _kohya(data: Data, tree: Tree, name: str, problems: dict[str, list[str]]) -> tuple[int, str] | None:
    """Repeats and words of the folder that a picture lies in, if folders say that."""
    if not data.kohya_folders:
        return None
    folder = extras.kohya(name, tree.root.name)
    if folder is None:
        problems["outside_kohya"].append(name)
    elif folder[0] == 0:
        problems["never"].append(name)
    return folder


def _with_extras(
    data: Data,
    record: Record,
    row: metadata.Row | None,
    mask: Mask | None,
    folder: tuple[int, str] | None,
    problems: dict[str, list[str]],
) -> Record:
    """The record with its mask, focus, repeats and captions for the second encoder."""
    if data.mask == "alpha":
        mask = Mask(record.name, record.read, record.stamp)
    elif data.mask != "none" and mask is None:
        problems["unmasked"].append(record.name)
    point = None
    if data.focus == "column" and row is not None:
        point = extras.focus(row.extra.get(data.focus_column), row.place, problems)
    seconds: tuple[str, ...] = ()
    if row is not None and data.caption_column_2 is not None:
        place = f"{record.name} ({row.place})"
        seconds = extras.seconds(row.extra.get(data.caption_column_2), row.caption, record.captions, place, problems)
    return replace(record, mask=mask, focus=point, repeats=folder[0] if folder else 1, seconds=seconds)


def _no_pictures(tree: Tree, place: str) -> UserError:
    if tree.archives:
        return UserError(
            f"no pictures in the folder, but archives: {shortened(tree.archives)}", place, "unpack them there"
        )
    counts = Counter({kind: count for kind, count in tree.skipped.items() if count})
    counts.update({"captions": len(tree.captions), "metadata": len(tree.metadata), "sub-folders": len(tree.folders)})
    seen = ", ".join(f"{count} {kind}" for kind, count in sorted(counts.items()) if count) or "nothing"
    return UserError(
        f"no pictures in the folder or below, no dataset written by save_to_disk, no parquet files; found: {seen}",
        place,
        _to_convert(tree.skipped).removeprefix("; ")
        or f"give a folder with pictures ({' '.join(sorted(PICTURES))}), a dataset folder or the id of a hub dataset",
    )


def _to_convert(skipped: Iterable[str]) -> str:
    """What to do with pictures of kinds that are not read."""
    kinds = sorted(UNREAD.intersection(skipped))
    heic = f", or for .heic {images.GET_HEIC}" if {".heic", ".heif"}.intersection(kinds) else ""
    return f"; convert {' and '.join(kinds)} to JPEG or PNG to train on them{heic}" if kinds else ""


def _in_split(tree: Tree, split: str, place: str) -> list[str]:
    """The names of the pictures in a split: of the sub-folder with that name, or of the whole folder."""
    tops = Counter(name.split("/", 1)[0] if "/" in name else "" for name in tree.pictures)
    if split in tops:
        mixed = sorted(set(tops) - SPLITS - {split})
        if mixed:
            where = shortened([top or "the folder itself" for top in mixed])
            raise UserError(
                f"sub-folder '{split}' may be a split or a subject: there are pictures beside it, in {where}",
                place,
                f"give the path of the sub-folder; or move all training pictures into '{split}'; or rename '{split}'",
            )
        tree.skipped["in other splits"] += sum(tops.values()) - tops[split]
        return [name for name in tree.pictures if name.startswith(f"{split}/")]
    if split in tree.folders:
        raise UserError(f"no pictures in sub-folder '{split}'", place, "put the pictures of the split there")
    if split != "train":
        seen = shortened(sorted(top for top in tops if top)) or "none"
        raise UserError(
            f"no split '{split}' in the folder: it would be a sub-folder of that name",
            place,
            f"put the pictures of the split there; sub-folders with pictures: {seen}",
        )
    return list(tree.pictures)


def _hinted(tree: Tree, problems: dict[str, list[str]]) -> dict[str, tuple[str, str]]:
    """PROBLEMS, with what may hold the captions of pictures that have none."""
    what, fix = PROBLEMS["uncaptioned"]
    found = [files.fix() for files in beside.overlooked(tree, problems["uncaptioned"])[:3]]
    return PROBLEMS | {"uncaptioned": (what, "; or ".join((*found, fix)))}


def _listed(
    data: Data, tree: Tree, place: str, tables: Sequence[tuple[str, Path, str]], problems: dict[str, list[str]]
) -> dict[str, metadata.Row]:
    """The metadata row of each picture that one names."""
    listed: dict[str, metadata.Row] = {}
    stems: dict[str, list[str]] = defaultdict(list)
    for name in tree.pictures if data.metadata else ():
        stems[posixpath.splitext(name)[0]].append(name)
    for row in metadata.rows(tree, data, place, tables, extras.columns(data)):
        if row.file_name is None:
            problems["unnamed"].append(row.place)
            continue
        name, trouble = _resolved(tree, row)
        if trouble and row.bare and name in stems:
            (name, *more), trouble = stems[name], None
            if more:
                problems["several"].append(f"{row.file_name} ({row.place})")
                continue
        if trouble:
            problems[trouble].append(_with_hint(tree, row, trouble))
        elif name in listed:
            problems["twice"].append(f"{name} ({listed[name].place} and {row.place})")
        else:
            listed[name] = row
    return listed


def _resolved(tree: Tree, row: metadata.Row) -> tuple[str, str | None]:
    """The name under which the tree knows a row's picture, and what is wrong with it if it does not."""
    written = row.file_name or ""
    if not _can_be_a_name(written):
        return written, "missing"
    for candidate in (written, written.replace("\\", "/")):
        if posixpath.isabs(candidate) and not Path(candidate).resolve().is_relative_to(tree.root):
            return written, "outside"
        if candidate[1:3] in {":\\", ":/"}:
            return written, "outside"
        if posixpath.isabs(candidate):
            candidate = os.path.relpath(candidate, tree.root / row.folder).replace(os.sep, "/")
        name = posixpath.normpath(posixpath.join(row.folder, candidate))
        if name in tree.pictures:
            return name, None
    # Not met on the walk: hidden, of a foreign kind, below a linked folder, outside of the folder, or nowhere.
    real = os.path.realpath(tree.root / name)
    inside = os.path.relpath(real, tree.root).replace(os.sep, "/")
    if name.startswith("../") or name == ".." or inside.startswith("../"):
        return name, "outside"
    if inside in tree.pictures:
        return inside, None
    return name, "foreign" if os.path.lexists(real) else "missing"


def _can_be_a_name(text: str) -> bool:
    try:
        return b"\0" not in os.fsencode(text)
    except UnicodeEncodeError:  # half of a character, as JSON can hold it
        return False


def _with_hint(tree: Tree, row: metadata.Row, trouble: str) -> str:
    near: list[str] = []
    if trouble == "missing" and len(tree.pictures) <= 10_000:
        near = get_close_matches(str(row.file_name), tree.pictures, n=1, cutoff=0.8)
    return f"{row.file_name} ({row.place}{f'; there is {near[0]}' if near else ''})"


def _listed_captions(
    fallback: str | None, value: object, description: str, problems: dict[str, list[str]]
) -> tuple[str, ...]:
    captions = extras.clean(value)
    if captions:
        return captions
    if captions is not None and fallback is not None:
        return (fallback.strip(),)
    problems["type" if captions is None else "empty"].append(description)
    return ()


def _below(name: str, folder: str) -> bool:
    return not folder or name.startswith(f"{folder}/")


def _tell(
    data: Data, tree: Tree, found: list[Record], place: str, listed: set[str]
) -> tuple[dict[str, int], list[beside.Overlooked]]:
    """Lines for the user: how many pictures, where their captions are from, and what was left out, which is also
    given; and what seems to hold captions and is not read, given too."""
    read = beside.used(data, tree, (record.name for record in found if record.name not in listed))
    skipped = Counter(tree.skipped)
    skipped.subtract(posixpath.splitext(name)[1].lower() for name in read & tree.others)
    skipped["caption files not used"] = len(tree.captions - read)
    left = {kind: skipped[kind] for kind in sorted(skipped, key=natural) if skipped[kind]}
    counted = ", ".join(f"{kind} {count}" for kind, count in left.items())
    rows = sum(record.name in listed for record in found)
    if counted:  # what is left out is said; the rest is in the report
        whole = f"{plural(len(found), 'picture')}, {rows} captioned by metadata"
        tree.told.append(f"{place}: {whole}; skipped: {counted}{_to_convert(left)}")
    if not data.kohya_folders and any(extras.kohya(record.name, tree.root.name) for record in found):
        what = "folders named like 10_words are plain folders here; kohya_folders = true reads repeats"
        tree.told.append(f"{place}: {what}")
    own = {posixpath.splitext(name)[0] for name in read}
    alone = [r.name for r in found if r.name not in listed and not {r.name, posixpath.splitext(r.name)[0]} & own]
    unread = [] if data.caption_only else beside.overlooked(tree, alone)[:3]
    tree.told += [f"{place}: captions that are not read: {files.fix()}" for files in unread]
    for line in tree.told:
        log.warning("%s", line)
    return left, unread
