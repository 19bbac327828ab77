"""What is worth a look in the captions before a training: counted and listed, as plain data."""

import re
import unicodedata
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import PurePath
from typing import Any

from sdxl_trainer import chunking
from sdxl_trainer.chunking import Prompt
from sdxl_trainer.config import Config, Data
from sdxl_trainer.data.captions import Choice, has_trigger, split_tags
from sdxl_trainer.data.pictures import Picture
from sdxl_trainer.errors import plural, sentence
from sdxl_trainer.text import Cut, Tokens

# How many examples of a finding are kept, and how many tags are listed.
EXAMPLES = 5
TAGS = 24
PICTURES = r"\.(?:jpe?g|png|webp|bmp|gif|tiff?|avif|hei[cf])"


@dataclass(frozen=True)
class Finding:
    """A kind of thing that was found: its name, what it is, how often, what to do, and (picture, what exactly). By its
    `level` it "stops" the run, "harms" what is learned, or is worth a "look"."""

    name: str
    what: str
    count: int
    fix: str
    examples: tuple[tuple[str, str], ...]
    level: str = "look"


LEVELS = ("stops", "harms", "look")
# Findings in captions that are taught as they stand; the others may be meant.
HARMFUL = {"characters", "mojibake", "file name", "settings", "markup", "special", "equal", "missing", "overlong"}


@dataclass(frozen=True)
class Captions:
    """The captions of all trained pictures. `tokens` are smallest, median, 95th percentile and largest number of a
    prompt's; `chunks` counts prompts by their number of chunks; `tags` are the most frequent tags, or words where
    captions are sentences."""

    pictures: int
    captions: int
    prompts: int
    tokens: Mapping[str, int]
    chunks: Mapping[int, int]
    tags: tuple[tuple[str, int], ...]
    findings: tuple[Finding, ...]

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


@dataclass(frozen=True)
class Caption:
    """A caption as written, with its picture's name, its data set, and how its emphasis will be read."""

    text: str
    picture: str
    data: Data
    emphasis: str


# (name, what it is, how to mend it, what of a caption shows it)
Check = tuple[str, str, str, Callable[[Caption], str | None]]

# Invisible characters that scripts and emoji need: joiners, marks of direction, tags of flags.
_NEEDED = {*range(0x200C, 0x2010), *range(0x202A, 0x202F), *range(0x2066, 0x206A), *range(0xE0020, 0xE0080)}
_NAMES = re.compile(rf"(?:[\w\-. ()]+{PICTURES}|(?:img|dsc[fn]?|pxl|image|photo|screenshot|picture)[-_ ]?\d+)", re.I)
_SETTINGS = re.compile(r"Negative prompt:|\bSteps: \d+, Sampler:|<(?:lora|lyco|hypernet):[^>]*>")
_MARKUP = re.compile(r"</?[a-z]{1,10}(?:\s[^<>]*)?/?>|&(?:[a-z]{2,8}|#\d+);|https?://\S+", re.I)
# UTF-8 that was read as Latin-1 or Windows-1252.
_MOJIBAKE = re.compile("[ÂÃâ][\x80-\xbf€™œ\u017e\u0161\u201a-\u2122]")
_WEIGHT = re.compile(r"(?<!\\)\([^()]*:[\d.]+\)")
_WILD = re.compile(r"\{[^{}]*\|[^{}]*\}|__[^\W_][\w/-]*?__")


def _invisible(caption: Caption) -> str | None:
    for character in caption.text:
        kind = unicodedata.category(character)
        odd = kind in {"Cc", "Co", "Cn"} and character not in "\n\r\t"
        if odd or character == "\ufffd" or (kind == "Cf" and ord(character) not in _NEEDED):
            return f"U+{ord(character):04X} {unicodedata.name(character, 'without a name')}"
    return None


def _file_name(caption: Caption) -> str | None:
    stem = PurePath(caption.picture).stem
    is_name = _NAMES.fullmatch(caption.text) or caption.text.casefold() == stem.casefold() != ""
    return caption.text if is_name else None


def _found(pattern: re.Pattern[str]) -> Callable[[Caption], str | None]:
    def look(caption: Caption) -> str | None:
        found = pattern.search(caption.text)
        return found[0] if found else None

    return look


def _repeated(caption: Caption) -> str | None:
    tags = [tag.casefold() for tag in split_tags(caption.text, caption.data.tag_separator)]
    double = [tag for tag, count in Counter(tags).items() if count > 1]
    return ", ".join(double) if len(tags) > 2 and double else None


def _brackets(caption: Caption) -> str | None:
    return chunking.unbalanced(caption.text) if caption.emphasis.startswith("a1111") else None


def _editing(caption: Caption) -> str | None:
    return chunking.editing(caption.text) if caption.emphasis.startswith("a1111") else None


def _unless(option: Callable[[Caption], object], look: Callable[[Caption], str | None]) -> Callable:
    return lambda caption: None if option(caption) else look(caption)


def _unkept(caption: Caption) -> str | None:
    mark = caption.data.keep_separator
    return caption.text if mark and mark not in caption.text else None


def _untriggered(caption: Caption) -> str | None:
    trigger = caption.data.trigger
    return caption.text if trigger and not has_trigger(caption.text.replace("[trigger]", trigger), trigger) else None


def _braces(caption: Caption) -> str | None:
    text = caption.text.replace("{{", "").replace("}}", "")
    odd = text.count("{") != text.count("}") and caption.data.wildcards
    return caption.text if odd else None


CHECKS: tuple[Check, ...] = (
    ("characters", "hold invisible or damaged characters", "remove them; the encoders read them as words", _invisible),
    ("mojibake", "were read in a wrong encoding", "save the captions as UTF-8 once more", _found(_MOJIBAKE)),
    ("file name", "are file names", "write what the picture shows", _file_name),
    ("settings", "hold settings of a generator", "keep the prompt alone", _found(_SETTINGS)),
    ("markup", "hold markup or links", "remove them", _found(_MARKUP)),
    ("special", "hold a special token", "remove it", _found(re.compile(r"<\|(?:start|end)oftext\|>"))),
    ("repeated", "name a tag twice", "keep each tag once", _repeated),
    (
        "lines",
        "have several lines, which are read as one",
        "set caption_per_line = true if each line is a caption",
        _unless(lambda c: c.data.caption_per_line, lambda c: c.text if "\n" in c.text else None),
    ),
    (
        "weights",
        "hold weights such as (word:1.2), which are read as text",
        "set emphasis = true and text.emphasis, or remove them",
        _unless(lambda c: c.emphasis != "off", _found(_WEIGHT)),
    ),
    ("brackets", "have brackets without a partner", "close them, or write \\( and \\[ for characters", _brackets),
    ("editing", "hold prompt editing, which is read as emphasis", "write one of the two texts", _editing),
    (
        "wildcards",
        "hold {a|b} or __name__, which are read as text",
        "set wildcards = true, or remove them",
        _unless(lambda c: c.data.wildcards, _found(_WILD)),
    ),
    ("braces", "have braces without a partner, which are text", "close them, or write {{ and }}", _braces),
    (
        "separator",
        "hold |||, which is read as text",
        'set keep_separator = "|||", or remove it',
        _unless(lambda c: c.data.keep_separator, _found(re.compile(r"\|\|\|"))),
    ),
    ("nothing kept", "lack the keep_separator: all of their tags are free", "add it where tags shall stay", _unkept),
    ("no trigger", "do not hold the trigger: it is put first", "nothing, if that is meant", _untriggered),
)


def captions(
    config: Config,
    pictures: Sequence[Picture],
    choices: Sequence[Choice],
    read: Mapping[Prompt, Tokens],
    cut: Sequence[Cut],
) -> Captions:
    """What the captions of the trained pictures are like. `read` are the tokens of all prompts, `cut` is cut off."""
    # A picture may be there several times, in several resolutions.
    once = {
        (id(picture.data), picture.name, text): Caption(
            text, picture.name, picture.data, config.text.emphasis if picture.data.emphasis else "off"
        )
        for picture in pictures
        for text in (*picture.captions, *picture.record.seconds)
    }
    written = list(once.values())
    prompts = list(dict.fromkeys(prompt for choice in choices for prompt in choice.prompts()))
    counts = sorted(read[prompt].count for prompt in prompts)
    found = [finding for check in CHECKS if (finding := _checked(check, written))]
    return Captions(
        len({caption.picture for caption in written}),
        len({caption.text for caption in written}),
        len(prompts),
        {name: counts[int(share * (len(counts) - 1))] for name, share in SHARES.items()},
        dict(sorted(Counter(len(read[prompt].ids) for prompt in prompts).items())),
        tuple(frequent(written)),
        tuple(_levelled(f) for f in (*_alike(pictures), *_overlong(pictures, choices, cut), *found)),
    )


def _levelled(finding: Finding) -> Finding:
    return replace(finding, level="harms") if finding.name in HARMFUL else finding


SHARES = {"smallest": 0.0, "median": 0.5, "95 %": 0.95, "largest": 1.0}


def _checked(check: Check, written: Sequence[Caption]) -> Finding | None:
    name, what, fix, look = check
    shown = [(caption.picture, seen) for caption in written if (seen := look(caption)) is not None]
    return Finding(name, what, len(shown), fix, tuple(shown[:EXAMPLES])) if shown else None


def _alike(pictures: Sequence[Picture]) -> list[Finding]:
    """Pictures that share the caption for all, and sets in which every caption is the same."""
    found = []
    sets: dict[int, list[Picture]] = defaultdict(list)
    for picture in pictures:
        sets[id(picture.data)].append(picture)
    for members in sets.values():
        data, names = members[0].data, {p.name: p.captions for p in members}
        if data.caption_only or data.regularisation:
            continue  # one caption is what was asked for
        fallback = [name for name, texts in names.items() if data.caption and texts == (data.caption.strip(),)]
        if fallback:
            shown = tuple((name, data.caption or "") for name in fallback[:EXAMPLES])
            fix = "write captions for what shall not belong to the subject"
            found.append(Finding("missing", "are the one for all pictures", len(fallback), fix, shown))
        elif len(names) > 1 and len(set(names.values())) == 1:
            shown = tuple((name, " / ".join(texts)) for name, texts in list(names.items())[:EXAMPLES])
            fix = "write what differs between the pictures, or everything in them becomes part of these words"
            found.append(Finding("equal", "are all the same", len(names), fix, shown))
    return found


def _overlong(pictures: Sequence[Picture], choices: Sequence[Choice], cut: Sequence[Cut]) -> list[Finding]:
    lost = {item.prompt: item for item in cut}
    shown: list[tuple[str, str]] = []
    for picture, choice in zip(pictures, choices, strict=True):
        mine = [] if picture.name in dict(shown) else [lost[prompt] for prompt in choice.prompts() if prompt in lost]
        if mine:
            worst = max(mine, key=lambda item: item.tokens)
            shown.append((picture.name, f"{sentence(worst.tokens, 'tokens are cut off')}: {worst.text}"))
    fix = "shorten them, or raise text.max_chunks"
    return [Finding("overlong", "are cut off", len(shown), fix, tuple(shown[:EXAMPLES]))] if shown else []


def frequent(written: Sequence[Caption]) -> list[tuple[str, int]]:
    """The most frequent tags; words of three letters and more where captions are sentences."""
    tags = [split_tags(caption.text, caption.data.tag_separator) for caption in written]
    flat = [tag for row in tags for tag in row]
    if flat and sum(len(tag.split()) for tag in flat) / len(flat) > 4:
        flat = [word for tag in flat for word in re.findall(r"\w{3,}", tag.casefold())]
    return Counter(flat).most_common(TAGS)


def lines(found: Captions) -> list[tuple[str, str]]:
    """Lines of a report: (what it is about, text)."""
    rows = [
        ("captions", f"{found.captions} distinct, {found.prompts} with their variants"),
        ("tokens", ", ".join(f"{name} {count}" for name, count in found.tokens.items())),
        ("chunks", ", ".join(f"{plural(count, 'prompt')} of {number}" for number, count in found.chunks.items())),
        ("most frequent", ", ".join(f"{tag[:30]} ({count})" for tag, count in found.tags[:12]) or "nothing"),
    ]
    for finding in found.findings:
        shown = "; ".join(f"{picture}: {' '.join(seen.split())[:60]!r}" for picture, seen in finding.examples[:2])
        rows.append((finding.name, f"{sentence(finding.count, f'captions {finding.what}')} ({shown}): {finding.fix}"))
    return rows
