"""Values as words and HTML: everything that comes from a run is escaped here, once."""

import html
import math
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

LONGEST = 1000  # characters of a text shown in running prose or a table cell


def number(value: Any) -> float | None:
    """A finite number that arithmetic can bear, or nothing."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    return value if -1e300 < value < 1e300 else None


def part(tree: Any, *keys: str) -> Any:
    """The value at a path of keys, or nothing where a step of the path is missing."""
    for key in keys:
        tree = tree.get(key) if isinstance(tree, dict) else None
    return tree


def table(tree: Any, *keys: str) -> dict[str, Any]:
    """The table at a path of keys; empty where there is none."""
    found = part(tree, *keys)
    return found if isinstance(found, dict) else {}


def tables(tree: Any, *keys: str) -> list[dict[str, Any]]:
    """The tables of the list at a path of keys."""
    found = part(tree, *keys)
    return [row for row in found if isinstance(row, dict)] if isinstance(found, list) else []


def clipped(text: str, limit: int = LONGEST) -> str:
    """The text, or its beginning and its length where it is too long to show."""
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def safe(value: Any, limit: int = LONGEST) -> str:
    """Text as HTML, for content and for quoted attributes."""
    return html.escape(clipped(str(value), limit))


def count(value: Any) -> str:
    """A number with its thousands separated; a dash where there is none."""
    known = number(value)
    return "–" if known is None else f"{known:,.0f}" if float(known).is_integer() else short(known)


def short(value: float) -> str:
    """A number with four significant digits: 0.1234, 1e-6, 2.5e-5, 12,340."""
    if value == 0:
        return "0"
    if abs(value) < 1e-3 or abs(value) >= 1e7:
        digits, exponent = f"{value:.3e}".split("e")
        return f"{float(digits):g}e{int(exponent)}"
    return f"{float(f'{value:.4g}'):,.10g}"


def large(value: float) -> str:
    """A count in millions or billions where it is that large."""
    for size, name in ((1e9, "B"), (1e6, "M")):
        if abs(value) >= size:
            return f"{value / size:.3g} {name}"
    return count(value)


def duration(seconds: float) -> str:
    """Seconds as people say them, in at most two units."""
    if seconds < 60:
        return f"{short(round(seconds, 2))} s"
    whole = round(seconds)
    for name, size, smaller, unit in (("d", 86400, "h", 3600), ("h", 3600, "min", 60), ("min", 60, "s", 1)):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // unit} {smaller}"
    return f"{whole} s"


def moment(value: Any) -> str | None:
    """An ISO time as date and minute, in the zone in which it was written."""
    try:
        return f"{datetime.fromisoformat(value):%Y-%m-%d %H:%M}"
    except (TypeError, ValueError):
        return None


def spread(values: Sequence[Any], limit: int) -> list[Any]:
    """At most `limit` of the values, evenly spaced, with the first and the last."""
    if len(values) <= limit:
        return list(values)
    if limit < 2:
        return [values[-1]]
    return [values[math.floor(i * (len(values) - 1) / (limit - 1) + 0.5)] for i in range(limit)]


def grid(label: str, headings: Sequence[str], rows: Iterable[Sequence[str]], numeric: Iterable[int] = ()) -> str:
    """A table of ready HTML cells; the columns in `numeric` are set flush right."""
    right = set(numeric)
    mark = [' class="number"' if i in right else "" for i in range(len(headings))]
    head = "".join(f'<th scope="col"{mark[i]}>{heading}</th>' for i, heading in enumerate(headings))
    body = "".join(
        "<tr>" + "".join(f"<td{mark[i]}>{cell}</td>" for i, cell in enumerate(row)) + "</tr>" for row in rows
    )
    return (
        f'<div class="scroll" tabindex="0" role="region" aria-label="{label}"><table><thead><tr>{head}</tr></thead>'
        f"<tbody>{body}</tbody></table></div>"
    )


def section(title: str, name: str, body: str) -> str:
    """A part of the page under its heading; nothing where the body is empty."""
    return f'<section aria-labelledby="{name}"><h2 id="{name}">{title}</h2>{body}</section>' if body else ""
