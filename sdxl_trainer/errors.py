"""The one error a user is meant to see."""

import json
import re
from collections.abc import Iterable
from difflib import get_close_matches
from typing import Any


class UserError(Exception):
    """Something the user can fix: what is wrong, where, and how to fix it. Shown as three lines, exit 2."""

    def __init__(self, what: str, where: str, fix: str) -> None:
        super().__init__(what, where, fix)
        self.what, self.where, self.fix = what, where, fix

    def __str__(self) -> str:
        what, where, fix = (_one_line(text) for text in (self.what, self.where, self.fix))
        return f"error: {what}\n   at: {where}\n  fix: {fix}"

    def _render_traceback_(self) -> list[str]:
        """What notebooks show in the place of a traceback."""
        return str(self).splitlines()


class Interrupted(Exception):
    """A signal stopped the run."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.number = number


def closest(name: str, allowed: Iterable[str]) -> str:
    """A sentence part naming the nearest allowed name, or all of them if none is near."""
    allowed = sorted(allowed)
    near = get_close_matches(name, allowed, n=1, cutoff=0.5)
    return f"did you mean '{near[0]}'?" if near else f"allowed: {', '.join(allowed)}"


def shortened(names: Iterable[str], limit: int = 10) -> str:
    """The first names of a list and how many more there are."""
    names = list(names)
    more = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(names[:limit]) + more


def shown(value: Any, limit: int = 60) -> str:
    """A value as JSON, no longer than so many characters."""
    text = json.dumps(value, ensure_ascii=False, default=str)
    return text if len(text) <= limit else text[: limit - 3] + "..."


def plural(amount: float, one: str, many: str | None = None) -> str:
    """`1 picture`, `2 pictures`, `1,234 pictures`."""
    return f"{amount:,.0f} {one if amount == 1 else many or one + 's'}"


_VERBS = {"are": "is", "were": "was", "have": "has", "do": "does", "cannot": "cannot"}
_SENTENCE = re.compile(rf"(\w[\w ]*?)s\b(.*?) ({'|'.join(_VERBS)}|hold|lack|lead|lie|look|lose|name)\b(.*)")


def sentence(amount: int, what: str) -> str:
    """How many `pictures have no mask`, as a sentence; of one it is `1 picture has no mask`."""
    found = _SENTENCE.fullmatch(what) if amount == 1 else None
    if found is None:
        return f"{amount:,} {what}"
    one, more, verb, rest = found.groups()
    return f"1 {one}{more} {_VERBS.get(verb, f'{verb}s')}{rest}"


def _one_line(text: str) -> str:
    """Messages of libraries, captions and file names may hold line breaks."""
    return " ".join(part.strip() for part in str(text).splitlines() if part.strip())
