"""What a message advises, as changes of a config: the buttons beside it. Only what would mend it is offered."""

import copy
import json
import re
import tomllib
from collections.abc import Iterator, Mapping
from typing import Any

from sdxl_trainer import configfile
from sdxl_trainer.errors import UserError
from sdxl_trainer.studio import settings

Changes = dict[str, Any]  # option to its new value; None: its default
_KEY = r"[a-z_]\w*(?:\.\w+)*"
_VALUE = r'"[^"]*"|\[[^\]]*\]|true|false|-?\d[\d.]*(?:[eE][-+]?\d+)?'
_SET = re.compile(rf"(?<![\w.])({_KEY}) = ({_VALUE})(?= *(?:[,;(:]|and |$))")
_REMOVED = re.compile(rf"\bremove ({_KEY})")
_NEAREST = re.compile(r"did you mean '(.+?)'\?")
_ONE_OF = re.compile(r"(?:: |^use )(\S+) or (\S+)$")


def offered(tree: Mapping[str, Any], what: str, fix: str) -> list[dict[str, Any]]:
    """The changes of a config's plain data that a message's fix names, in words and as values."""
    before = _problem(tree)
    found: list[Changes] = []
    for changes in _named(tree, what, fix):
        changed = copy.deepcopy(dict(tree))
        try:
            for key, value in changes.items():
                configfile.put(changed, key, value)
        except UserError:
            continue
        after = _problem(changed)
        if changed != tree and (after is None or before not in {None, after}) and changes not in found:
            found.append(changes)
    return [{"words": _words(changes), "changes": changes} for changes in found]


def _problem(tree: Mapping[str, Any]) -> str | None:
    try:
        configfile.validated(dict(tree), "")
    except UserError as error:
        return re.sub(r" \(\d+ more problems? after this one\)$", "", error.what)
    return None


def _words(changes: Changes) -> str:
    said = [f"{k} = {json.dumps(v, ensure_ascii=False)}" for k, v in changes.items() if v is not None]
    gone = [f"Remove {key}" for key, value in changes.items() if value is None]
    return f"Set {' and '.join(said)}" if said else " and ".join(gone)


def _named(tree: Mapping[str, Any], what: str, fix: str) -> Iterator[Changes]:
    """Each change that a fix seems to speak of. Parts that are joined by "or" or ";" are changes of their own."""
    about = re.match(rf"(?:unknown key ')?({_KEY})", what)
    nearest, one_of = _NEAREST.search(fix), _ONE_OF.search(fix)
    if about and what.startswith("unknown key") and nearest:
        section = about[1].rpartition(".")[0]
        meant = f"{section}.{nearest[1]}" if section else nearest[1]
        if _value(tree, meant) is None:
            yield {about[1]: None, meant: _value(tree, about[1])}
    elif about and nearest:
        yield {about[1]: nearest[1]}
    elif about and one_of:
        yield from ({about[1]: _read(text)} for text in one_of.groups())
    for part in re.split(r"; |, or | or ", fix):
        changes = {place: _read(value) for key, value in _SET.findall(part) if (place := _place(tree, key, what))}
        removed = _REMOVED.findall(part) or ([part.strip()] if re.fullmatch(_KEY, part.strip()) else [])
        changes |= {place: None for key in removed if (place := _place(tree, key, what))}
        if changes:
            yield changes


def _read(text: str) -> Any:
    try:
        return tomllib.loads(f"v = {text}")["v"]
    except tomllib.TOMLDecodeError:
        return text


def _value(tree: Any, key: str) -> Any:
    for part in key.split("."):
        tree = tree[int(part)] if isinstance(tree, list) else tree.get(part) if isinstance(tree, Mapping) else None
    return tree


def _place(tree: Mapping[str, Any], key: str, what: str) -> str | None:
    """Where an option stands that a message may name without its section, or without the number of its entry."""
    known = [(field["section"], field["name"]) for field in settings.fields()]
    section, _, name = key.rpartition(".")
    if not section:
        near = [path.rpartition(".")[0] for path in re.findall(_KEY, what) if "." in path]
        sections = [place for place in near if (place.split(".")[0], name) in known]
        section = (sections or [place for place, other in known if other == name] or [""])[0]
    if (section.split(".")[0], name) not in known:
        return None
    if section in settings.LISTS:
        if len(tree.get(section) or ()) != 1:
            return None
        section += ".0"
    return f"{section}.{name}" if section else name
