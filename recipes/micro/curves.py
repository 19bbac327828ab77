"""Draw curves of a log as a small PNG.

    python recipes/micro/curves.py LOG.jsonl OUT.png --x step --y psnr [--log] [--smooth 1]

Rows of LOG without `x` or one of the `y` are skipped; a dot in a name leads into an object (`accuracy.shape`).
"""

import argparse
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT, MARGIN = 560, 300, 44
INK, GRID = (40, 40, 40), (222, 222, 222)
LINES = ((36, 84, 206), (214, 38, 44), (44, 158, 72), (250, 132, 20), (130, 58, 168), (72, 202, 214))
Point = tuple[float, float]


def value(row: dict[str, Any], name: str) -> float | None:
    """What a row says of a name with dots, if it does."""
    found: Any = row
    for part in name.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return float(found)


def series(rows: Sequence[dict[str, Any]], x: str, y: str, smooth: int) -> list[Point]:
    """The points of one curve: means of `smooth` rows after each other."""
    pairs = [(value(row, x), value(row, y)) for row in rows]
    known = [(a, b) for a, b in pairs if a is not None and b is not None]
    groups = [known[i : i + smooth] for i in range(0, len(known), smooth)]
    return [(group[-1][0], sum(b for _, b in group) / len(group)) for group in groups]


def draw(curves: dict[str, list[Point]], x: str, logarithmic: bool) -> Image.Image:
    """The picture: four lines across with their values, a colour for each curve."""
    scale = math.log10 if logarithmic else float
    xs = [a for points in curves.values() for a, _ in points]
    ys = [scale(b) for points in curves.values() for _, b in points]
    left, right, low, high = min(xs), max(xs), min(ys), max(ys)
    page = Image.new("RGB", (WIDTH, HEIGHT), "white")
    pen, font = ImageDraw.Draw(page), ImageFont.load_default(11)

    def place(a: float, b: float) -> Point:
        across = (a - left) / ((right - left) or 1) * (WIDTH - 2 * MARGIN) + MARGIN
        return across, HEIGHT - MARGIN - (b - low) / ((high - low) or 1) * (HEIGHT - 2 * MARGIN)

    for part in range(5):
        level = low + part / 4 * (high - low)
        pen.line([place(left, level), place(right, level)], fill=GRID)
        pen.text((4, place(left, level)[1] - 6), f"{10**level if logarithmic else level:.3g}", fill=INK, font=font)
    for number, (name, points) in enumerate(curves.items()):
        colour = LINES[number % len(LINES)]
        pen.line([place(a, scale(b)) for a, b in points], fill=colour, width=2)
        pen.text((MARGIN + 92 * number, 12), name.split(".")[-1], fill=colour, font=font)
    pen.text((MARGIN, HEIGHT - MARGIN + 8), f"{left:g}", fill=INK, font=font)
    pen.text((WIDTH - MARGIN, HEIGHT - MARGIN + 8), f"{right:g}", fill=INK, font=font, anchor="ra")
    pen.text((WIDTH / 2, HEIGHT - MARGIN + 8), x, fill=INK, font=font, anchor="ma")
    return page


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw curves of a log as a small PNG.")
    parser.add_argument("log_file", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--x", default="step")
    parser.add_argument("--y", nargs="+", required=True)
    parser.add_argument("--log", action="store_true", help="logarithmic values")
    parser.add_argument("--smooth", type=int, default=1)
    arguments = parser.parse_args()
    rows = [json.loads(line) for line in arguments.log_file.read_text(encoding="utf-8").splitlines()]
    curves = {y: series(rows, arguments.x, y, arguments.smooth) for y in arguments.y}
    draw(curves, arguments.x, arguments.log).quantize(64).save(arguments.out, optimize=True)


if __name__ == "__main__":
    main()
