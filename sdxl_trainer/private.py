"""Where things lie on this machine, taken out of what others will read: of each path its last name is left."""

import html
import json
import re
import struct
import tomllib
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel

from sdxl_trainer import configfile
from sdxl_trainer.config import Config, section
from sdxl_trainer.errors import UserError

TEXTS = {".toml", ".json", ".jsonl", ".md", ".html", ".txt", ".csv", ".yaml"}
# How a path may stand in a file: as it is, in a shell's quotes, in HTML, in JSON.
_WRITTEN: tuple[Callable[[str], str], ...] = (
    str,
    lambda text: text.replace("'", "'\"'\"'"),
    html.escape,
    lambda text: html.escape(text.replace("'", "'\"'\"'")),
    lambda text: json.dumps(text)[1:-1],
)
_PNG = b"\x89PNG\r\n\x1a\n"


def is_hub_id(path: str) -> bool:
    return re.fullmatch(r"[\w.-]+/[\w.-]+", path) is not None and not Path(path).exists() and path[0] not in ".~"


def last_name(path: str) -> str:
    """What is told of a path: its last name; of the hub's all."""
    return path if is_hub_id(path) else Path(path).expanduser().resolve().name or path


def told(folder: Path) -> Callable[[Path], bytes | None]:
    """What gives a file's content as it is told to others; None where that is as it lies in the folder."""
    config = _config(folder)
    shorten = _shortener([str(folder.absolute()), *_paths(config), *_of_command(folder)])

    def read(path: Path) -> bytes | None:
        content = path.read_bytes() if path.suffix in TEXTS or path.suffix == ".png" else b""
        if path.name == "config.toml" and path.parent == folder and config is not None:
            changed = configfile.dumps(_with_names(config)).encode()
        elif path.suffix == ".png":
            changed = _picture(content, shorten)
        else:
            changed = shorten(content.decode("utf-8", errors="surrogateescape")).encode("utf-8", "surrogateescape")
        return changed if changed != content else None

    return read


def _config(folder: Path) -> Config | None:
    try:
        return configfile.validated(tomllib.loads((folder / "config.toml").read_text("utf-8")), str(folder))
    except (OSError, ValueError, UserError):
        return None


def _paths(node: Any) -> Iterator[str]:
    """The paths in a config."""
    for entry in (one for one in (node if isinstance(node, tuple) else [node]) if isinstance(one, BaseModel)):
        for name, field in type(entry).model_fields.items():
            value = getattr(entry, name)
            if value is not None and section.is_path(field):
                yield str(value)
            yield from _paths(value)


def _with_names(node: Any) -> Any:
    """A config with the last names of its paths."""
    if isinstance(node, tuple):
        return tuple(_with_names(entry) if isinstance(entry, BaseModel) else entry for entry in node)
    changes = {}
    for name, field in type(node).model_fields.items():
        value = getattr(node, name)
        if value is not None and section.is_path(field):
            changes[name] = last_name(value)
        elif isinstance(value, BaseModel | tuple):
            changes[name] = _with_names(value)
    return node.model_copy(update=changes)


def _of_command(folder: Path) -> list[str]:
    """The paths in the command that manifest.json notes."""
    try:
        words = json.loads((folder / "manifest.json").read_text("utf-8"))["command"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    values = [str(word).rpartition("=")[2] for word in words if isinstance(words, list)]
    return [
        value
        for value in values
        if value.startswith(("/", "~", "./", "../")) or ("/" in value and Path(value).exists())
    ]


def _shortener(paths: list[str]) -> Callable[[str], str]:
    names: dict[str, str] = {}
    home = str(Path.home())
    for path in paths:
        name = last_name(path)
        full = str(Path(path).expanduser().absolute())
        for text in {path, full, str(Path(full).resolve()), full.replace(home, "~", 1)}:
            if "/" in text and not is_hub_id(text):
                names |= {written(text): written(name) for written in _WRITTEN}
    known = "|".join(re.escape(text) for text in sorted(names, key=len, reverse=True))
    either = re.compile(rf"(?<![\w.-])(?:{known})(?![\w-])")
    # What else lies in the home folder, whose name is the user's.
    other = re.compile(rf"{re.escape(home)}(?:/[^\s\"'<>&,;:|()\[\]{{}}]*)?") if home != "/" else None

    def shorten(text: str) -> str:
        text = either.sub(lambda found: names[found[0]], text)
        return other.sub(lambda found: Path(found[0]).name if found[0] != home else "~", text) if other else text

    return shorten


def _picture(content: bytes, shorten: Callable[[str], str]) -> bytes:
    """A PNG whose texts are shortened; its pixels stay as they are, byte for byte."""
    if not content.startswith(_PNG):
        return content
    made, at = [_PNG], len(_PNG)
    while at + 12 <= len(content):
        length, kind = struct.unpack(">I4s", content[at : at + 8])
        body = content[at + 8 : at + 8 + length]
        if kind in (b"tEXt", b"iTXt"):
            coding = "utf-8" if kind == b"iTXt" else "latin-1"
            body = shorten(body.decode(coding, "surrogateescape")).encode(coding, "surrogateescape")
        made.append(struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body)))
        at += 12 + length
    return b"".join(made)
