"""Emphasis and cuts of prompts, against rules derived a second time: character by character, window by window."""

import random
from collections.abc import Sequence
from itertools import pairwise

import pytest

from sdxl_trainer import chunking
from sdxl_trainer.chunking import Part

COMMA = 267
ALPHABET = [
    "(",
    ")",
    "[",
    "]",
    ":",
    ":1.2)",
    ":0.5)",
    "\\",
    "\\(",
    "\\)",
    "a",
    "b c",
    " ",
    ", ",
    "BREAK",
    ":.)",
    "é",
    "猫",
]


def fuzzed(count: int, seed: int) -> list[str]:
    draw = random.Random(seed)
    return ["".join(draw.choices(ALPHABET, k=draw.randint(0, 14))) for _ in range(count)]


def characters(parts: Sequence[Part]) -> list[tuple[str, float]]:
    """Every character with its weight."""
    return [(c, round(part.weight, 9)) for part in parts for c in ("|" if part.text is None else part.text)]


PARTNER = {")": ("(", 1.1), "]": ("[", 1 / 1.1)}


def weight_after(c: str, rest: str) -> str:
    """The number of ":1.2)", if that is what a colon begins."""
    number = rest[: rest.find(")")] if c == ":" and ")" in rest else ""
    return number if set(number) <= set("0123456789.+-") and number.strip(".") else ""


def a1111_by_character(text: str) -> list[tuple[str, float]]:
    """A1111's rules as its documentation tells them: each character has the product of the brackets around it, where
    a bracket without its partner reaches to the end (opening) or is text (closing)."""
    plain: list[list] = []  # character, weight
    open_at: list[tuple[str, int]] = []

    def reach(kind: str, factor: float) -> bool:
        for back in range(len(open_at) - 1, -1, -1):
            if open_at[back][0] == kind:
                for entry in plain[open_at.pop(back)[1] :]:
                    entry[1] *= factor
                return True
        return False

    place = 0
    while place < len(text):
        c, rest = text[place], text[place + 1 :]
        number = weight_after(c, rest)
        if c == "\\":
            escaped = rest[:1] if rest[:1] in tuple("()[]\\") else ""
            plain += [[c, 1.0] for c in escaped]
            place += len(escaped)
        elif c in "([":
            open_at.append((c, len(plain)))
        elif number and reach("(", float(number)):
            place += len(number) + 1
        elif not (c in PARTNER and reach(*PARTNER[c])):
            plain.append([c, 1.0])
        place += 1
    for partner in PARTNER.values():
        while reach(*partner):
            pass
    return [(c, round(weight, 9)) for c, weight in plain]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("plain text", [("plain text", 1.0)]),
        ("one (strong) word", [("one ", 1.0), ("strong", 1.1), (" word", 1.0)]),
        ("[weak] (x:0.7)", [("weak", 1 / 1.1), (" ", 1.0), ("x", 0.7)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2.0)]),
        (r"sakura \(naruto\)", [("sakura (naruto)", 1.0)]),
        ("(never closed", [("never closed", 1.1)]),
        ("never opened)", [("never opened)", 1.0)]),
        ("no bracket:1.5)", [("no bracket:1.5)", 1.0)]),
        ("a:b (c:d:1.5)", [("a:b ", 1.0), ("c:d", 1.5)]),
        (r"back\slash \\", [("backslash \\", 1.0)]),
        ("(x:1.2.3)", [("x:1.2.3", 1.1)]),
        ("", [("", 1.0)]),
        ("two BREAK chunks", [("two", 1.0), (None, 1.0), ("chunks", 1.0)]),
        ("(a BREAK b:2)", [("a", 2.0), (None, 2.0), ("b", 2.0)]),
        ("no BREAKFAST", [("no BREAKFAST", 1.0)]),
    ],
)
def test_emphasis_of_a1111(text: str, parts: list[tuple[str | None, float]]) -> None:
    found = chunking.a1111(text)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found if part.text is not None] == pytest.approx(
        [w for t, w in parts if t is not None]
    )


def test_emphasis_of_a1111_on_random_texts() -> None:
    for text in fuzzed(3000, seed=1):
        if "BREAK" in text or ":.)" in text:
            continue
        assert characters(chunking.a1111(text)) == a1111_by_character(text), text


def comfyui_by_depth(text: str, weight: float = 1.0) -> list[tuple[str, float]]:
    """ComfyUI's rules: cut where the count of brackets rises from and falls back to zero; a piece in brackets has its
    own weight if it ends in a number, else 1.1 times the one around it."""
    protected = text.replace("\\)", "\x01").replace("\\(", "\x02")
    depths, depth = [], 0
    for c in protected:
        depths.append((depth, depth + (c == "(") - (c == ")")))
        depth = depths[-1][1]
    begins = {0} | {i for i, (before, _) in enumerate(depths) if before == 0 and protected[i] == "("}
    begins |= {i + 1 for i, (_, after) in enumerate(depths) if after == 0 and protected[i] == ")"}
    edges = sorted(begins | {len(protected)})
    found: list[tuple[str, float]] = []
    for first, last in pairwise(edges):
        piece = protected[first:last]
        if len(piece) > 1 and piece[0] == "(" and piece[-1] == ")":
            body, inner = piece[1:-1], weight * 1.1
            head, _, number = body.rpartition(":")
            try:
                inner, body = (float(number), head) if head else (inner, body)
            except ValueError:
                pass
            found += comfyui_by_depth(body, inner)
        else:
            found += [(c, round(weight, 9)) for c in piece.replace("\x01", ")").replace("\x02", "(")]
    return [(")" if c == "\x01" else "(" if c == "\x02" else c, w) for c, w in found]


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("(a) [b]", [("a", 1.1), (" [b]", 1.0)]),
        ("((a) b:2)", [("a", 2.2), (" b", 2.0)]),
        ("((a:1.5) b:2)", [("a", 1.5), (" b", 2.0)]),
        (r"sakura \(naruto\)", [("sakura (naruto)", 1.0)]),
        ("(a:b)", [("a:b", 1.1)]),
        ("a) (b)", [("a) (b)", 1.0)]),
        ("(a:inf)", [("a:inf", 1.1)]),
    ],
)
def test_emphasis_of_comfyui(text: str, parts: list[tuple[str, float]]) -> None:
    found = chunking.comfyui(text)
    assert [part.text for part in found] == [text for text, _ in parts]
    assert [part.weight for part in found] == pytest.approx([weight for _, weight in parts])


def test_emphasis_of_comfyui_on_random_texts() -> None:
    for text in fuzzed(3000, seed=2):
        assert characters(chunking.comfyui(text)) == comfyui_by_depth(text), text


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("fine (a:1.2) [b] \\(c", None),
        ("(a", "a '[(]' that is never closed"),
        ("[a", "a '\\[' that is never closed"),
        ("a)", "a '[)]' that was never opened"),
        ("a:1.2)", "a '[)]' that was never opened"),
        ("(a:1.2.3)", "'1.2.3' is not a weight"),
    ],
)
def test_odd_emphasis_is_named(text: str, said: str | None) -> None:
    import re

    found = chunking.unbalanced(text)
    assert found is None if said is None else re.match(said, found or "")


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a [cat:dog:0.5]", "[cat:dog:0.5]"),
        ("[x:3]", "[x:3]"),
        ("[a|b]", "[a|b]"),
        ("[a] (b:1.2)", None),
        ("\\[a|b\\]", None),
    ],
)
def test_prompt_editing_is_found(text: str, found: str | None) -> None:
    assert chunking.editing(text) == found


def tokens(ids: Sequence[int]) -> list[chunking.Token]:
    return [(i, 1.0) for i in ids]


def windows(ids: list[int], room: int) -> list[list[int]]:
    """A1111's cuts, window by window: up to the last comma if at most 20 tokens of a full window, counted from the
    comma itself, would move on, and the next token is no comma."""
    found = []
    while len(ids) > room:
        commas = [i for i, token in enumerate(ids[:room]) if token == COMMA]
        moves = commas and room - commas[-1] <= 20 and ids[room] != COMMA
        cut = commas[-1] + 1 if moves else room
        found.append(ids[:cut])
        ids = ids[cut:]
    return [*found, ids]


@pytest.mark.parametrize("share", [0.0, 0.02, 0.1, 0.5, 1.0])
def test_chunks_end_at_commas_as_in_a1111(share: float) -> None:
    draw = random.Random(3)
    for _ in range(300):
        ids = [COMMA if draw.random() < share else draw.randint(300, 400) for _ in range(draw.randint(0, 260))]
        chunks = chunking.at_commas([tokens(ids)], 75, COMMA)
        assert [[i for i, _ in chunk] for chunk in chunks] == windows(ids, 75)


def test_no_token_is_lost_or_moved_by_any_rule() -> None:
    draw = random.Random(4)
    for cut in chunking.CUTS.values():
        for _ in range(200):
            pieces = [
                None
                if draw.random() < 0.1
                else tokens([draw.choice([COMMA, 300, 301]) for _ in range(draw.randint(0, 60))])
                for _ in range(draw.randint(1, 8))
            ]
            chunks = cut(pieces, 75, COMMA)
            assert [t for chunk in chunks for t in chunk] == [t for piece in pieces for t in piece or []]
            assert all(len(chunk) <= 75 for chunk in chunks)


def test_break_begins_a_chunk_in_every_rule() -> None:
    for cut in chunking.CUTS.values():
        assert [len(c) for c in cut([tokens([300] * 5), None, tokens([301] * 7)], 75, COMMA)] == [5, 7]
        assert [len(c) for c in cut([tokens([300] * 5), None, []], 75, COMMA)] == [5]


def test_short_pieces_are_not_cut_in_two_by_comfyui_and_long_ones_are() -> None:
    pieces = [tokens([300] * 70), tokens([301] * 7), tokens([302] * 80)]
    assert [len(c) for c in chunking.in_groups(pieces, 75, COMMA)] == [70, 75, 12]


def test_numbers_of_chunks_meet_in_twelve() -> None:
    from math import lcm

    assert lcm(*chunking.COUNTS) == 12
    assert [chunking.count(n, "a1111", 12) for n in range(1, 14)] == [1, 2, 3, 4, 6, 6, 12, 12, 12, 12, 12, 12, 12]
    assert [chunking.count(n, "comfyui", 2) for n in (1, 2, 3)] == [1, 2, 2]
    assert {chunking.count(n, "kohya", 3) for n in (1, 2, 3, 4)} == {3}
    assert {chunking.count(n, "cut", 3) for n in (1, 2, 3, 4)} == {1}
