"""Reading what other trainers are configured with: TOML, JSON, YAML, command lines in shell scripts. Nothing is run."""

import json
import re
import shlex
import tomllib
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trainer.errors import UserError

LARGEST = 4_000_000  # bytes; configs are small
_ASSIGNED = re.compile(r"^\s*(?:export\s+|set\s+)?([A-Za-z_]\w*)=(.*)$")
_VARIABLE = re.compile(r"\$\{?([A-Za-z_]\w*)\}?|%([A-Za-z_]\w*)%")


@dataclass(frozen=True)
class Command:
    """A training command of a shell script: the script's name, its flags, those of the launcher before it."""

    script: str
    flags: dict[str, Any]
    launcher: dict[str, Any] = field(default_factory=dict)
    words: tuple[str, ...] = ()


def text(path: Path) -> str:
    try:
        if path.stat().st_size > LARGEST:
            raise UserError("the file is too large for a config", str(path), "give the config, not a model")
        return path.read_text(encoding="utf-8-sig")
    except UnicodeDecodeError:
        raise UserError("not UTF-8 text", str(path), "give a config file, saved as UTF-8") from None
    except OSError as error:
        what = f"the file cannot be read: {error.strerror}"
        raise UserError(what, str(path), "check the path and its rights") from None


def tree(path: Path) -> dict[str, Any]:
    """The data of a TOML, JSON or YAML file. UserError if it is damaged or not a table."""
    content = text(path)
    try:
        found = _PARSERS[path.suffix.lower()](content)
    except (ValueError, RecursionError) as error:
        said = str(error).splitlines()[0]
        raise UserError(f"the file cannot be read as {path.suffix[1:]}: {said}", str(path), "correct it") from None
    if not isinstance(found, dict) and not isinstance(found, list):
        raise UserError("the file holds no options", str(path), "give the config of a training")
    return found if isinstance(found, dict) else {"": found}


def _yaml(content: str) -> Any:
    import yaml

    try:
        return yaml.safe_load(content)
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from None


_PARSERS: dict[str, Any] = {
    ".toml": tomllib.loads,
    ".json": json.loads,
    ".yaml": _yaml,
    ".yml": _yaml,
}
STRUCTURED = tuple(_PARSERS)


def command(path: Path) -> Command:
    """The first command of a shell script that runs a Python file with flags. Variables that the script sets are filled
    in; nothing is run."""
    content = re.sub(r"[\\^]\r?\n", " ", text(path))
    known: dict[str, str] = {}
    for line in content.splitlines():
        assigned = _ASSIGNED.match(line)
        if assigned:
            known[assigned[1]] = _filled(assigned[2].strip().strip("\"'"), known)
            continue
        try:
            words = shlex.split(_filled(line, known), comments=True)
        except ValueError as error:
            if ".py" not in line:
                continue
            raise UserError(f"the command cannot be read: {error}", str(path), "close its quotes") from None
        script = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
        if script is not None and any(word.startswith("--") for word in words[script:]):
            after = words[script + 1 :]
            return Command(Path(words[script]).name, flags(after), flags(words[:script]), tuple(after))
    raise UserError("there is no training command (…something.py --flags) in it", str(path), "give the script or file")


def flags(words: list[str]) -> dict[str, Any]:
    """`--name value`, `--name=value`, `--name` alone (true), and several values as a list."""
    found: dict[str, Any] = {}
    name = None
    for word in words:
        if word.startswith("--") and len(word) > 2:
            name, equals, value = word[2:].partition("=")
            name = name.replace("-", "_")
            found[name] = value if equals else True
        elif name is not None:
            old = found[name]
            found[name] = word if old is True else [*(old if isinstance(old, list) else [old]), word]
    return found


def _filled(line: str, known: dict[str, str]) -> str:
    return _VARIABLE.sub(lambda match: known.get(match[1] or match[2], match[0]), line)
