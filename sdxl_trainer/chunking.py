"""Prompts to chunks of token ids: emphasis as the user interfaces read it, and where a long prompt is cut.

Nothing but strings and lists here; the encoders are in `text.py`. A chunk holds at most `room` tokens (75), to which
`text.py` adds the two special ones. Read from the interfaces' own code: AUTOMATIC1111 1.10 (`modules/prompt_parser.py`,
`modules/sd_hijack_clip.py`), ComfyUI (`comfy/sd1_clip.py`), sd-scripts (`library/strategy_base.py`).
"""

import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

# A token's id and its weight.
Token = tuple[int, float]
# The tokens of a piece of text that has one weight; None is a forced cut (BREAK).
Piece = list[Token] | None

# A comma so many tokens before a chunk's end is where it ends (A1111's "prompt word wrap length limit").
COMMA_REACH = 20
# Texts of fewer tokens are not cut in two by ComfyUI, if a chunk can hold them.
WHOLE = 8


@dataclass(frozen=True)
class Prompt:
    """What the text encoders read. `second` is for the second one, where that is another text; with `emphasis`
    weights such as (word:1.2) are read from both."""

    text: str
    second: str | None = None
    emphasis: bool = False

    @property
    def texts(self) -> tuple[str, str]:
        return self.text, self.text if self.second is None else self.second


@dataclass(frozen=True)
class Part:
    """A piece of a prompt's text and its weight; `text` None is a forced cut."""

    text: str | None
    weight: float = 1.0


_MARK = re.compile(r"\\(?P<escaped>[][()\\]?)|:(?P<weight>[-+]?[\d.]+)\)|(?P<bracket>[][()])|(?P<plain>:|[^][()\\:]+)")
_BREAK = re.compile(r"\s*\bBREAK\b\s*")
_EDITING = re.compile(r"\[[^][]*:[^][]*:\s*[0-9.]+\s*\]|\[[^][:]*:\s*[0-9.]+\s*\]|\[[^][]*\|[^][]*\]")
_UP, _DOWN = 1.1, 1 / 1.1


def a1111(text: str) -> list[Part]:
    r"""Parts by A1111's rules: (x) is 1.1, [x] 1/1.1, (x:1.3) 1.3 times what is around it; \( \) \[ \] \\ are the
    characters themselves, BREAK begins a new chunk. A bracket that is never closed counts up to the end, one that
    was never opened is text, and so is a weight that is not a number.

    Other than there BREAK also works within brackets, where A1111 makes a word of it with a negative weight.
    """
    parts: list[tuple[str | None, float]] = []
    opened: dict[str, list[int]] = {"(": [], "[": []}

    def close(bracket: str, factor: float) -> None:
        first = opened[bracket].pop()
        parts[first:] = [(piece, weight * factor) for piece, weight in parts[first:]]

    for mark in _MARK.finditer(text):
        found, bracket = mark[0], mark["bracket"]
        factor = _number(mark["weight"])
        if found.startswith("\\"):
            parts.append((mark["escaped"], 1.0))
        elif bracket in opened:
            opened[bracket].append(len(parts))
        elif factor is not None and opened["("]:
            close("(", factor)
        elif bracket == ")" and opened["("]:
            close("(", _UP)
        elif bracket == "]" and opened["["]:
            close("[", _DOWN)
        else:
            first, *others = _BREAK.split(found)
            parts.append((first, 1.0))
            for other in others:
                parts += [(None, 1.0), (other, 1.0)]
            if mark["weight"] is not None and factor is None and opened["("]:
                parts[-1] = (found[:-1], 1.0)  # ":1.2.3)" is text, but for the bracket
                close("(", _UP)
    for bracket, factor in (("(", _UP), ("[", _DOWN)):
        for first in opened[bracket]:
            parts[first:] = [(piece, weight * factor) for piece, weight in parts[first:]]
    return _merged(Part(piece, weight) for piece, weight in parts)


def comfyui(text: str) -> list[Part]:
    r"""Parts by ComfyUI's rules: (x) is 1.1 times what is around it, (x:1.3) is 1.3 whatever is around it; \( and \)
    are the characters themselves; square brackets are text."""
    hidden = text.replace("\\)", "\0\1").replace("\\(", "\0\2")
    found = [Part(piece.replace("\0\1", ")").replace("\0\2", "("), weight) for piece, weight in _nested(hidden, 1.0)]
    return found or [Part("")]


def _nested(text: str, weight: float) -> Iterator[tuple[str, float]]:
    for group in _groups(text):
        if len(group) < 2 or not (group.startswith("(") and group.endswith(")")):
            yield group, weight
            continue
        inner, colon, number = group[1:-1].rpartition(":")
        given = _number(number) if colon and inner else None
        if given is None:
            yield from _nested(group[1:-1], weight * _UP)
        else:
            yield from _nested(inner, given)


def _groups(text: str) -> Iterator[str]:
    """The text cut before each outermost opening and after each outermost closing bracket. After a closing bracket
    too many the next opening one closes the account: ComfyUI counts alike."""
    depth, start = 0, 0
    for place, character in enumerate(text):
        if character == "(":
            if depth == 0 and place > start:
                yield text[start:place]
                start = place
            depth += 1
        elif character == ")":
            depth -= 1
            if depth == 0:
                yield text[start : place + 1]
                start = place + 1
    if start < len(text):
        yield text[start:]


def _number(text: str | None) -> float | None:
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def _merged(parts: Iterator[Part]) -> list[Part]:
    """Neighbours of one weight as one part: their text is tokenized together."""
    merged: list[Part] = []
    for part in parts:
        last = merged[-1] if merged else Part(None)
        if part.text is not None and last.text is not None and part.weight == last.weight:
            merged[-1] = Part(last.text + part.text, last.weight)
        else:
            merged.append(part)
    return merged or [Part("")]


def plain(text: str) -> list[Part]:
    return [Part(text)]


# How emphasis is read, by text.emphasis.
EMPHASIS: dict[str, Callable[[str], list[Part]]] = {
    "off": plain,
    "a1111": a1111,
    "a1111_no_norm": a1111,
    "comfyui": comfyui,
}


def unbalanced(text: str) -> str | None:
    """What is odd about a text's emphasis in A1111's reading, as part of a sentence; None if nothing is."""
    depth = {"(": 0, "[": 0}
    for mark in _MARK.finditer(text):
        if mark["weight"] is not None and _number(mark["weight"]) is None:
            return f"'{mark['weight']}' is not a weight: it is text"
        bracket = ")" if mark["weight"] is not None else mark["bracket"]
        if bracket in depth:
            depth[bracket] += 1
        elif bracket:
            opening = "(" if bracket == ")" else "["
            if not depth[opening]:
                return f"a '{bracket}' that was never opened is text"
            depth[opening] -= 1
    left = [bracket for bracket, count in depth.items() if count]
    return f"a '{left[0]}' that is never closed counts up to the end" if left else None


def editing(text: str) -> str | None:
    """The first instruction that changes a prompt while a picture is drawn, [from:to:0.5] or [a|b], if any."""
    found = _EDITING.search(re.sub(r"\\.", "  ", text))
    return text[found.start() : found.end()] if found else None


def at_commas(pieces: Sequence[Piece], room: int, comma: int) -> list[list[Token]]:
    """Chunks by A1111's rule: a full chunk ends after its last comma if that is among its last tokens."""
    chunks: list[list[Token]] = []
    chunk: list[Token] = []

    def end(length: int) -> None:
        nonlocal chunk
        chunks.append(chunk[:length])
        chunk = chunk[length:]

    last = None  # how many tokens the chunk has up to and with its last comma
    for piece in pieces:
        if piece is None:
            end(len(chunk))
            last = None
            continue
        for token in piece:
            if len(chunk) == room:
                near = last is not None and room - last < COMMA_REACH
                end(last if last is not None and near and token[0] != comma else room)
                last = None
            chunk.append(token)
            last = len(chunk) if token[0] == comma else last
    return [*chunks, chunk] if chunk or not chunks else chunks


def in_groups(pieces: Sequence[Piece], room: int, comma: int) -> list[list[Token]]:
    """Chunks by ComfyUI's rule: a short piece goes into the next chunk where it does not fit, a long one is cut."""
    chunks: list[list[Token]] = [[]]
    for piece in pieces:
        if piece is None:
            chunks.append([])
            continue
        short, left = len(piece) < WHOLE, piece
        while left:
            space = room - len(chunks[-1])
            if len(left) <= space:
                chunks[-1] += left
                break
            if not short:
                chunks[-1] += left[:space]
                left = left[space:]
            chunks.append([])
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


def in_order(pieces: Sequence[Piece], room: int, comma: int) -> list[list[Token]]:
    """Full chunks, one after the other (sd-scripts; the first of them is what a cut prompt keeps)."""
    chunks: list[list[Token]] = [[]]
    for piece in pieces:
        if piece is None:
            chunks.append([])
        for token in piece or ():
            if len(chunks[-1]) == room:
                chunks.append([])
            chunks[-1].append(token)
    return chunks if chunks[-1] or len(chunks) == 1 else chunks[:-1]


# Where a long prompt is cut, by text.long_captions.
CUTS: dict[str, Callable[[Sequence[Piece], int, int], list[list[Token]]]] = {
    "a1111": at_commas,
    "comfyui": in_groups,
    "kohya": in_order,
    "cut": in_order,
}
# Numbers of chunks that the embeddings of a prompt may have; others are filled up with empty chunks. Prompts of
# different numbers share a batch by repetition, so that the numbers' least common multiple must stay small.
COUNTS = (1, 2, 3, 4, 6, 12)


def count(chunks: int, kind: str, limit: int) -> int:
    """How many chunks a prompt gets that needs so many: kohya's always `limit`, others the next of `COUNTS`."""
    if kind == "kohya":
        return limit
    kept = min(chunks, 1 if kind == "cut" else limit)
    return next(allowed for allowed in COUNTS if allowed >= kept)
