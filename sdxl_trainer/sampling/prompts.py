"""Files of prompts: one a line with kohya's options, JSON Lines, or TOML."""

import json
import tomllib
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError, closest
from sdxl_trainer.sampling.request import ALIASES, SETTINGS, settings

# Options of kohya's lines; those that are written out are settings of ours.
KOHYA = {
    "w": "width",
    "h": "height",
    "d": "seed",
    "s": "steps",
    "l": "guidance",
    "n": "negative",
    "ss": "sampler",
    "t": "strength",
    "c": "prompt_2",
    "am": "lora",
}


def read(path: Path) -> list[dict[str, Any]]:
    """The pictures that a file asks for: each the settings that it gives, a prompt among them."""
    readers = {".txt": _lines, ".jsonl": _json_lines, ".json": _json_lines, ".toml": _toml}
    if path.suffix not in readers:
        what = f"'{path.name}' is no file of prompts"
        raise UserError(what, "--prompts", "give a .txt, .jsonl or .toml file")
    try:
        text = path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("the file is not UTF-8 text", str(path), "save it as UTF-8") from None
    except OSError as error:
        raise UserError(f"the file cannot be read: {error.strerror}", str(path), "give a file of prompts") from None
    found = readers[path.suffix](text, str(path))
    for row, where in found:
        if not row.get("prompt"):
            raise UserError("there is no prompt", where, "give one")
    if not found:
        raise UserError("the file holds no prompt", str(path), "write one prompt on each line")
    return [row for row, _ in found]


Rows = list[tuple[dict[str, Any], str]]


def _lines(text: str, where: str) -> Rows:
    return [
        (line(found, f"{where}, line {number}"), f"{where}, line {number}")
        for number, found in enumerate(text.splitlines(), start=1)
        if found.strip() and not found.lstrip().startswith("#")
    ]


def line(text: str, where: str) -> dict[str, Any]:
    """A prompt with options after it: `a cat --w 832 --s 30 --n blurry --sampler Euler a`."""
    prompt, *options = text.split(" --")
    found: dict[str, Any] = {"prompt": prompt.strip()}
    for option in options:
        name, _, given = option.strip().partition(" ")
        key = KOHYA.get(name.lower(), name.replace("-", "_"))
        if key not in SETTINGS and key not in ALIASES and key != "lora":
            fix = closest(name, [*KOHYA, *SETTINGS])
            raise UserError(f"there is no option --{name}", where, fix)
        found |= settings({key: given.strip()}, where)
    return found


def _json_lines(text: str, where: str) -> Rows:
    """One object a line, or a list of them."""
    try:
        whole = json.loads(text) if text.lstrip().startswith("[") else None
        rows = whole if whole is not None else [json.loads(row) for row in text.splitlines() if row.strip()]
    except ValueError as error:
        raise UserError(f"not valid JSON: {error}", where, "write one object on each line") from None
    return _checked(rows, where)


def _toml(text: str, where: str) -> Rows:
    """[prompt] has what holds for all, [[prompt.subset]] each picture; or [[prompt]] each."""
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"not valid TOML: {error}", where, "correct the line; strings need quotes") from None
    given = tree.get("prompt")
    if isinstance(given, list):
        return _checked(given, where)
    if not isinstance(given, dict):
        raise UserError("there is no [[prompt]]", where, "write a [[prompt]] for each picture")
    shared = {key: value for key, value in given.items() if key != "subset"}
    return _checked([{**shared, **row} for row in given.get("subset", [{}])], where)


def _checked(rows: list[Any], where: str) -> Rows:
    found: Rows = []
    for number, row in enumerate(rows, start=1):
        place = f"{where}, prompt {number}"
        if not isinstance(row, dict):
            raise UserError("this is not an object", place, 'write {"prompt": "..."}')
        found.append((settings(row, place), place))
    return found
