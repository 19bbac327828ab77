"""From a picture's captions to what the text encoders read: the caption options of [[data]].

Options that draw something (shuffled tags, tags left out, wildcards) make a declared number of variants of each
caption, which follow from the caption's text alone: they can be cached, and a caption that changes changes no other's.
Which variant a step trains on is drawn in the step.
"""

import hashlib
import json
import re
from bisect import bisect_right
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from typing import Any

from sdxl_trainer import keyed
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Data
from sdxl_trainer.data.records import Record
from sdxl_trainer.errors import UserError, closest, plural

# Variants of a caption where an option draws something and caption_variants is not given.
VARIANTS = 8
PLACEHOLDER = "[trigger]"
# The largest number below 1: nothing is left out by it, and what is sorted by it stays where it was.
LAST = 1 - 2**-53
# How deep lines of wildcard files may name other files.
DEPTH = 10

# Gives the next number in [0, 1) of a variant.
Decide = Callable[[], float]


@dataclass(frozen=True)
class Choice:
    """What a sample's text is drawn from: captions with cumulative odds, and variants of each, all equally likely.
    The empty one is a caption that is left out."""

    odds: tuple[float, ...]
    variants: tuple[tuple[Prompt, ...], ...]

    @property
    def only(self) -> Prompt | None:
        """The prompt, where there is no other."""
        return self.variants[0][0] if len(self.variants) == len(self.variants[0]) == 1 else None

    def pick(self, caption: float, variant: float) -> Prompt:
        """The prompt for two numbers drawn from [0, 1)."""
        chosen = self.variants[min(bisect_right(self.odds, caption), len(self.odds) - 1)]
        return chosen[int(variant * len(chosen))]

    def prompts(self) -> list[Prompt]:
        return [prompt for variants in self.variants for prompt in variants]


class Choices(Sequence[Choice]):
    """One for each (number of its data set, record), made when it is asked for. UserError, at once: what captions lack
    for the options to work."""

    def __init__(self, sets: Sequence[Data], records: Sequence[tuple[int, Record]]) -> None:
        self.sets, self.records = sets, records
        self._made = lru_cache(maxsize=4096)(partial(_choice, sets))
        self._of = lru_cache(maxsize=4096)(self._find)
        for index, data in enumerate(sets):
            _refuse_unused(data, (record for number, record in records if number == index), f"data.{index}")
        if any(data.wildcards or data.caption_weights for data in sets):
            for _ in self:
                pass

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, index: Any) -> Any:
        return self._of(index)

    def _find(self, index: int) -> Choice:
        number, record = self.records[index]
        return self._made(number, record.captions, record.seconds, record.name)


def _choice(
    sets: Sequence[Data], number: int, captions: tuple[str, ...], seconds: tuple[str, ...], name: str
) -> Choice:
    data, key, count = sets[number], f"data.{number}", len(captions)
    weights = data.caption_weights[:count] or (1.0,) * count
    if len(weights) < count or not sum(weights):
        what = f"the picture has {plural(count, 'caption')}, their weights are {list(data.caption_weights)}"
        fix = "give as many weights as a picture has captions at most, so that one caption can be drawn"
        raise UserError(what, f"{name}, {key}.caption_weights", fix)
    odds = tuple(part / sum(weights) for part in accumulate(weights))
    others = seconds or (None,) * count
    made = tuple(_variants(data, text, other, key) for text, other in zip(captions, others, strict=True))
    return Choice(odds, made)


def plain(sets: Sequence[Data], records: Sequence[tuple[int, Record]]) -> list[Choice]:
    """The first caption of each (number of its data set, record), with all tags in their order: what is measured by."""
    made = []
    for index, record in records:
        second = record.seconds[0] if record.seconds else None
        prompt = _prompt(sets[index], record.captions[0], second, lambda: LAST, f"data.{index}")
        made.append(Choice((1.0,), ((prompt,),)))
    return made


def draws(data: Data) -> bool:
    """Whether an option makes variants of a caption."""
    return data.shuffle_tags or data.tag_dropout > 0 or data.wildcards


def _variants(data: Data, text: str, second: str | None, key: str) -> tuple[Prompt, ...]:
    if not draws(data):
        return (_prompt(data, text, second, lambda: 0.0, key),)
    count = data.caption_variants or VARIANTS
    digest = hashlib.sha256(json.dumps([text, second]).encode()).digest()
    generator = keyed.generator(0, "variants", sample=int.from_bytes(digest[:8], "big"))
    rows: list[Sequence[float]] = []

    def decider(variant: int) -> Decide:
        """A Latin hypercube: over the variants each decision falls once into each of `count` equal intervals, so that
        a few variants already have the shares that were asked for."""
        numbers = iter(range(1 << 30))

        def decide() -> float:
            row = next(numbers)
            if row == len(rows):
                rows.append(((generator.permutation(count) + generator.random()) / count).tolist())
            return rows[row][variant]

        return decide

    return tuple(_prompt(data, text, second, decider(variant), key) for variant in range(count))


def _prompt(data: Data, text: str, second: str | None, decide: Decide, key: str) -> Prompt:
    worded = _worded(data, text, decide, key)
    return Prompt(worded, None if second is None else _worded(data, second, decide, key), data.emphasis)


def _worded(data: Data, text: str, decide: Decide, key: str) -> str:
    """A variant of one text: trigger, wildcards, tags, prefix and suffix."""
    text, added = _triggered(data, text)
    prefix, suffix = data.caption_prefix, data.caption_suffix
    if data.wildcards:
        prefix, text, suffix = (expand(part, decide, data.wildcards_dir, key) for part in (prefix, text, suffix))
    if data.shuffle_tags or data.tag_dropout:
        text = _tags(data, text, added, decide)
    return " ".join(part for part in (prefix.strip(), text, suffix.strip()) if part)


def _triggered(data: Data, text: str) -> tuple[str, bool]:
    """The text with the trigger in the place of [trigger], else as its first tag if it was nowhere; and whether."""
    if data.trigger is None:
        return text, False
    if PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, data.trigger), False
    if has_trigger(text, data.trigger):
        return text, False
    return _joined([data.trigger, text], data.tag_separator), True


def has_trigger(text: str, trigger: str) -> bool:
    """Whether a text holds the trigger as a word of its own."""
    return re.search(rf"(?<!\w){re.escape(trigger)}(?!\w)", text, re.IGNORECASE) is not None


def _tags(data: Data, text: str, added: bool, decide: Decide) -> str:
    """The tags in a new order or without some; those that are kept stay where they are."""

    def split(part: str) -> list[str]:
        return split_tags(part, data.tag_separator, data.emphasis)

    head, tail, free = [], [], []
    if data.keep_separator and data.keep_separator in text:
        first, middle, *last = (split(part) for part in text.split(data.keep_separator, 2))
        head, free, tail = first, middle, last[0] if last else []
    else:
        tags = split(text)
        kept = data.keep_tags + added
        head, free = tags[:kept], tags[kept:]
    if data.shuffle_tags:
        places = [decide() for _ in free]
        free = [free[i] for i in sorted(range(len(free)), key=places.__getitem__)]
    if data.tag_dropout:
        out = [decide() < data.tag_dropout and not _holds(data, tag) for tag in free]
        free = [tag for tag, left_out in zip(free, out, strict=True) if not left_out]
    return _joined([*head, *free, *tail], data.tag_separator)


def _holds(data: Data, tag: str) -> bool:
    return data.trigger is not None and has_trigger(tag, data.trigger)


def split_tags(text: str, separator: str, emphasis: bool = False) -> list[str]:
    """The tags of a text; with emphasis separators within brackets do not count."""
    if not emphasis:
        return [tag for part in text.split(separator) if (tag := part.strip())]
    tags, depth, start = [], 0, 0
    for mark in re.finditer(rf"\\.|[(\[]|[)\]]|{re.escape(separator)}", text):
        if mark[0] in "([":
            depth += 1
        elif mark[0] in ")]":
            depth = max(0, depth - 1)
        elif mark[0] == separator and not depth:
            tags.append(text[start : mark.start()])
            start = mark.end()
    return [tag for part in [*tags, text[start:]] if (tag := part.strip())]


def _joined(tags: Iterable[str], separator: str) -> str:
    return (separator if separator.isspace() else separator.strip() + " ").join(tags)


_WILD = re.compile(r"\{\{|\}\}|[{|}]|__[^\W_](?:[\w/-]*?[^\W_])?__|[^{}|_]+|_")
_UNKNOWN = re.compile(r"\s*(?:[^|{}$]*\$\$|[0-9.]+::)")


def expand(text: str, decide: Decide, folder: str | None, key: str, depth: int = 0) -> str:
    """The text with one option of each {a|b|c}, and a line of name.txt for each __name__; {{ and }} are braces."""
    groups: list[list[str]] = [[""]]
    for mark in _WILD.findall(text):
        if mark == "{":
            groups.append([""])
        elif mark == "|" and len(groups) > 1:
            groups[-1].append("")
        elif mark[0] == "}" and len(groups) > len(mark):
            for _ in mark:
                options = groups.pop()
                groups[-1][-1] += _option(options, decide, key)
        elif mark in {"{{", "}}"}:
            groups[-1][-1] += mark[0]
        elif len(mark) > 4 and mark.startswith("__"):
            lines = _file(mark.strip("_"), folder, key, depth)
            line = lines[int(decide() * len(lines))]
            groups[-1][-1] += expand(line, decide, folder, key, depth + 1)
        else:
            groups[-1][-1] += mark
    while len(groups) > 1:
        options = groups.pop()
        groups[-1][-1] += "{" + "|".join(options)
    return groups[0][0]


def _option(options: list[str], decide: Decide, key: str) -> str:
    if _UNKNOWN.match(options[0]):
        what = f"the wildcard '{{{'|'.join(options)}}}' asks for more than one of its options: that is not known here"
        raise UserError(what, f"{key}.wildcards", "write {a|b|c}, each option as often as it shall weigh")
    return options[int(decide() * len(options))]


def _file(name: str, folder: str | None, key: str, depth: int) -> tuple[str, ...]:
    if folder is None:
        what = f"a caption names the wildcard file '{name}' (__{name}__), and wildcards_dir is not given"
        raise UserError(
            what, f"{key}.wildcards", "set wildcards_dir to the folder with the files; or wildcards = false"
        )
    if depth == DEPTH:
        raise UserError(f"wildcard files name each other without end: __{name}__", folder, "break the circle")
    return wildcard_file(Path(folder).expanduser(), name)


def wildcard_file(folder: Path, name: str) -> tuple[str, ...]:
    """The lines of name.txt, without empty ones and comments (#)."""
    path = folder / f"{name}.txt"
    if not path.is_file() or not path.resolve().is_relative_to(folder.resolve()):
        there = [str(p.relative_to(folder).with_suffix("")) for p in folder.rglob("*.txt")]
        fix = f"add it, or correct __{name}__; {closest(name, there)}" if there else "add it, or correct wildcards_dir"
        raise UserError(f"the wildcard file '{name}.txt' is missing", str(folder), fix)
    status = path.stat()
    return _lines(path, status.st_mtime_ns, status.st_size)


@lru_cache(maxsize=1024)
def _lines(path: Path, changed: int, size: int) -> tuple[str, ...]:
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (UnicodeDecodeError, OSError) as error:
        raise UserError(f"the wildcard file cannot be read: {error}", str(path), "save it as UTF-8 text") from None
    options = tuple(line.strip() for line in lines if line.strip() and not line.lstrip().startswith("#"))
    if not options:
        raise UserError("the wildcard file has no options", str(path), "write one option per line")
    return options


def _refuse_unused(data: Data, records: Iterable[Record], key: str) -> None:
    """Options that could do something, but find nothing in any caption (law 7)."""
    several = len(data.caption_weights) > 1
    if not (data.keep_separator or data.wildcards or several):
        return
    whole = data.caption_prefix + data.caption_suffix
    separated, wild, many = False, any(mark in whole for mark in ("{", "__")), False
    for record in records:
        texts = (*record.captions, *record.seconds)
        separated |= any((data.keep_separator or "") in text for text in texts)
        wild |= any(mark in text for text in texts for mark in ("{", "__"))
        many |= len(record.captions) > 1
    if data.keep_separator and not separated:
        what = f"{key}.keep_separator = '{data.keep_separator}' has no effect: no caption holds it"
        raise UserError(what, data.path, "correct it, or use keep_tags to keep each caption's first tags")
    if data.wildcards and not wild:
        what = f"{key}.wildcards has no effect: no caption holds {{a|b}} or __name__"
        raise UserError(what, data.path, "remove it")
    if several and not many:
        what = f"{key}.caption_weights has no effect: no picture has more than one caption"
        raise UserError(what, data.path, "remove it")


def wildcards(sets: Sequence[Data]) -> list[str]:
    """What the wildcard files say, as a hash of each folder: part of what decides the captions."""
    found = []
    for data in sets:
        digest = hashlib.sha256()
        folder = Path(data.wildcards_dir).expanduser() if data.wildcards_dir else None
        for path in sorted(folder.rglob("*.txt")) if folder else ():
            digest.update(f"{path.relative_to(folder or path)}\0{path.stat().st_size}\0".encode())
            digest.update(path.read_bytes())
        found.append(digest.hexdigest())
    return found
