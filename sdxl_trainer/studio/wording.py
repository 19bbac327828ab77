"""Changes to many captions at once: plain functions from one caption to another."""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping

from sdxl_trainer.data.captions import has_trigger, split_tags
from sdxl_trainer.errors import UserError, closest

Change = Callable[[str], str]


def prefixed(words: str) -> Change:
    """Put words first, where a caption does not hold them."""
    return lambda text: text if has_trigger(text, words) else f"{words}, {text}" if text else words


def suffixed(words: str) -> Change:
    """Put words last, where a caption does not hold them."""
    return lambda text: text if has_trigger(text, words) else f"{text}, {words}" if text else words


def replaced(find: str, by: str) -> Change:
    """Every place of a text, letter by letter."""
    return lambda text: text.replace(find, by)


def without_tag(tag: str) -> Change:
    """Leave a tag out, whatever its capitals."""
    wanted = tag.strip().casefold()

    def change(text: str) -> str:
        tags = split_tags(text, ",")
        kept = [t for t in tags if t.casefold() != wanted]
        return text if len(kept) == len(tags) else ", ".join(kept)

    return change


# What the page names, and the fields that each needs.
CHANGES: dict[str, tuple[Callable[..., Change], tuple[str, ...]]] = {
    "prefix": (prefixed, ("words",)),
    "suffix": (suffixed, ("words",)),
    "replace": (replaced, ("find", "by")),
    "remove": (without_tag, ("words",)),
}


def changed(captions: Mapping[str, str], kind: object, fields: Mapping[str, object]) -> dict[str, str]:
    """The captions that a change makes different. UserError for a change that is unknown or lacks its words."""
    if kind not in CHANGES:
        raise UserError(f"there is no change '{kind}'", "captions", closest(str(kind), CHANGES))
    make, names = CHANGES[str(kind)]
    given = [str(fields.get(name) or "") for name in names]
    if not given[0].strip():
        raise UserError("no words are given", "captions", "write the words")
    change = make(*(text.strip() if name == "words" else text for name, text in zip(names, given, strict=True)))
    return {name: new for name, old in captions.items() if (new := change(old).strip()) != old}


def frequent(captions: Iterable[str], limit: int = 60) -> list[tuple[str, int]]:
    """The most frequent tags, each counted once a caption."""
    counts: Counter[str] = Counter()
    for text in captions:
        counts.update(list(dict.fromkeys(split_tags(text, ","))))
    return counts.most_common(limit)
