"""What is in a folder of pictures: one walk over it that sorts, counts and refuses to leave the folder."""

import errno
import hashlib
import os
import posixpath
import re
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from sdxl_trainer import files
from sdxl_trainer.data import images
from sdxl_trainer.data.problems import Found, Notes, refuse
from sdxl_trainer.errors import UserError

PICTURES = {".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".avif"}
PICTURES |= {".heic", ".heif"} if images.HEIC else set()
# Pictures of other kinds: cameras' own, and of programs that draw; phones' where they cannot be read.
UNREAD = {".heic", ".heif", ".jxl", ".jp2", ".psd", ".dng", ".cr2", ".cr3", ".nef", ".arw", ".orf", ".raf", ".rw2"}
# In order of preference where several lie beside a picture.
CAPTIONS = (".txt", ".caption")
SIDECARS = (*CAPTIONS, ".json")
METADATA = ("metadata.jsonl", "metadata.csv", "metadata.parquet")
TABLES = {".parquet", ".arrow"}
ARCHIVES = {".zip", ".tar", ".gz", ".tgz", ".7z", ".rar"}
# What operating systems and other trainers leave in folders of pictures.
IGNORED = {"__macosx", "thumbs.db", "desktop.ini", "_latent_cache"}


@dataclass
class Tree:
    """The files of a folder, named by their path relative to `root` with '/' between the parts."""

    root: Path  # without symbolic links
    pictures: dict[str, str] = field(default_factory=dict)  # name -> stamp, in natural order
    masks: dict[str, str] = field(default_factory=dict)  # name -> stamp
    empty: list[str] = field(default_factory=list)  # pictures of zero bytes
    captions: set[str] = field(default_factory=set)
    others: set[str] = field(default_factory=set)  # what is neither picture nor caption, metadata or archive
    metadata: list[str] = field(default_factory=list)
    tables: list[Path] = field(default_factory=list)
    archives: list[str] = field(default_factory=list)
    folders: list[str] = field(default_factory=list)
    skipped: Counter[str] = field(default_factory=Counter)
    told: list[str] = field(default_factory=list)  # what the user is told of it


def natural(name: str) -> list[tuple[list[str | int], str]]:
    """Sort key under which img2 comes before img10, folder by folder."""
    return [(_chunks(part), part) for part in name.split("/")]


def _chunks(part: str) -> list[str | int]:
    return [int(chunk) if index % 2 else chunk for index, chunk in enumerate(re.split("([0-9]+)", part.casefold()))]


def read_file(path: Path | str, name: str) -> bytes:
    """The bytes of a picture. UserError names it if it cannot be read any more."""
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"the picture cannot be read: {error.strerror}", name, "restore the file and make it readable"
        ) from None


def stamp(root: Path) -> str | None:
    """A text that changes with every file below a folder that `scan` meets. Nothing is opened. None where something
    cannot be looked at, or changed so lately that it may change again and have the same time."""
    digest, began, newest = hashlib.sha256(), time.time_ns(), 0
    waiting = [os.path.realpath(root)]
    try:
        while waiting:
            folder = waiting.pop()
            digest.update(os.fsencode(f"{folder}\0"))
            with _opened(folder) as number, os.scandir(number) as entries:
                for entry in entries:
                    name = entry.name
                    if _is_hidden(name):
                        continue
                    link = os.path.realpath(f"{folder}/{name}") if entry.is_symlink() else ""
                    if not link and entry.is_dir():
                        waiting.append(f"{folder}/{name}")
                        continue
                    status = entry.stat()
                    changed = status.st_ctime_ns  # copies and editors may set a file's date, but not this
                    whole = f"{name}\0{link}\0{status.st_size} {status.st_mtime_ns} {changed}\0"
                    digest.update(whole.encode("utf-8", "surrogateescape"))
                    if changed > newest:
                        newest = changed
    except OSError:
        return None
    return digest.hexdigest() if newest < began - files.COARSE else None


@contextmanager
def _opened(folder: str) -> Iterator[int]:
    """An open folder: by their names in one the system finds files faster than by whole paths."""
    number = os.open(folder, os.O_RDONLY)
    try:
        yield number
    finally:
        os.close(number)


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name.casefold() in IGNORED


def scan(root: Path, place: str, mask_suffix: str, notes: Notes | None = None) -> Tree:
    """Everything below a folder; a picture whose stem ends in `mask_suffix` is a mask. UserError names links that lead
    out of it or in circles, and unreadable folders; with `notes` they are noted and left out."""
    tree = Tree(root.resolve())
    problems: Found = {"outside": [], "circle": [], "broken": [], "unreadable": []}
    waiting = [""]
    while waiting:
        prefix = waiting.pop()
        try:
            entries = list(os.scandir(tree.root / prefix))
        except OSError as error:
            problems["unreadable"].append(f"{prefix or '.'} ({error.strerror})")
            continue
        for entry in entries:
            name = prefix + entry.name
            if _is_hidden(entry.name):
                tree.skipped["hidden"] += 1
            elif entry.is_symlink() and (trouble := _link(tree, name)):
                problems.setdefault(trouble, []).append(name)
            elif entry.is_dir():
                tree.folders.append(name)
                waiting.append(name + "/")
            else:
                _sort_in(tree, name, entry, mask_suffix)
    tree.skipped["links to folders inside"] += len(problems.pop("inside", []))
    for names in problems.values():
        names.sort(key=natural)
    refuse(problems, REFUSED, place, notes)
    if notes is not None:
        notes.skipped[place].update({f"links: {kind}": len(names) for kind, names in problems.items() if names})
    tree.pictures = dict(sorted(tree.pictures.items(), key=lambda item: natural(item[0])))
    for names in (tree.folders, tree.metadata, tree.archives):
        names.sort(key=natural)
    tree.tables.sort()
    return tree


def _link(tree: Tree, name: str) -> str | None:
    """What is wrong with a symbolic link; "inside" for a folder that is met at its own place; None: a file inside."""
    path = tree.root / name
    suffix = path.suffix.lower()
    matters = path.is_dir() or suffix in PICTURES or suffix in SIDECARS or path.name.lower() in METADATA
    if not matters:
        return None
    try:
        path.stat()
    except OSError as error:
        return "circle" if error.errno == errno.ELOOP else "broken"
    real = path.resolve()
    if not real.is_relative_to(tree.root):
        return "outside"
    if real.is_dir():
        return "circle" if path.is_relative_to(real) else "inside"
    return None


def _sort_in(tree: Tree, name: str, entry: os.DirEntry[str], mask_suffix: str) -> None:
    stem, suffix = posixpath.splitext(entry.name)
    suffix = suffix.lower()
    if not entry.is_file():
        tree.skipped["neither file nor folder"] += 1
    elif suffix in PICTURES:
        status = entry.stat()
        real = os.path.realpath(entry.path) if entry.is_symlink() else entry.path
        is_mask = stem.endswith(mask_suffix)
        (tree.masks if is_mask else tree.pictures)[name] = f"{real}:{status.st_size}:{status.st_mtime_ns}"
        if is_mask:
            tree.skipped["masks"] += 1
        elif status.st_size == 0:
            tree.empty.append(name)
    elif entry.name.lower() in METADATA:
        tree.metadata.append(name)
    elif suffix in CAPTIONS:
        tree.captions.add(name)
    else:
        if suffix in TABLES:
            tree.tables.append(tree.root / name)
        elif suffix in ARCHIVES:
            tree.archives.append(name)
        else:
            tree.others.add(name)
        tree.skipped[suffix or "no extension"] += 1


REFUSED = {
    "outside": ("links lead out of the folder", "copy the files into the folder in place of the links"),
    "circle": ("links lead in a circle", "remove the links"),
    "broken": ("links lead nowhere", "remove the links, or restore the files"),
    "unreadable": ("folders cannot be read", "make them readable (chmod u+rx)"),
}
