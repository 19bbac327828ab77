"""Grids: one setting from left to right, another from top to bottom, and their picture."""

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from sdxl_trainer.errors import UserError, closest
from sdxl_trainer.sampling.request import ALIASES, LISTS, SETTINGS, settings

if TYPE_CHECKING:
    from PIL.Image import Image

# Axes that are no plain settings: another model; the first value searched in the prompt and replaced by each.
SPECIAL = ("prompt", "replace", "model", "lora")
LINES = 4  # of a value beside the pictures, at most


@dataclass(frozen=True)
class Axis:
    """A setting and its values; `labels` are as they were written."""

    name: str
    labels: tuple[str, ...]

    def applied(self, index: int, given: dict[str, Any]) -> dict[str, Any]:
        """Settings with the axis's value of that number."""
        label, where = self.labels[index], f"axis '{self.name}'"
        if self.name == "replace":
            searched = self.labels[0]
            changed = {k: v.replace(searched, label) for k, v in given.items() if k in {"prompt", "prompt_2"} and v}
            if not any(searched in str(given.get(key) or "") for key in ("prompt", "prompt_2")):
                what = f"'{searched}' is not in the prompt '{str(given['prompt'])[:40]}'"
                raise UserError(what, where, "the first value of replace is the one to search for")
            return given | changed
        if self.name in {"model", "prompt"}:
            return given | {self.name: label}
        if self.name == "lora":
            return given | {"loras": () if label in {"", "none"} else tuple(label.split("+"))}
        return given | settings({self.name: label}, where)


def axis(text: str | None, where: str) -> Axis | None:
    """An axis from `guidance=3,5,7`; values with commas in quotes."""
    if text is None:
        return None
    name, equals, values = text.partition("=")
    name = ALIASES.get(name.strip().replace("-", "_"), name.strip().replace("-", "_"))
    name = LISTS.get(name, name)
    if not equals or (name not in SETTINGS and name not in SPECIAL):
        known = closest(name, [*SETTINGS, *SPECIAL])
        raise UserError(f"'{text}' is not an axis", where, f"write setting=value,value,...; {known}")
    labels = tuple(label.strip() for label in next(csv.reader([values], skipinitialspace=True), []))
    if len(labels) < 2:
        raise UserError(f"'{text}' has fewer than two values", where, "write setting=value,value,...")
    return Axis(name, labels)


def sheet(pictures: Sequence[Sequence["Image"]], x: Axis | None, y: Axis | None) -> "Image":
    """All pictures of a grid on one sheet, rows of pictures [y][x], with the values beside them."""
    from PIL import Image, ImageDraw

    width = max(picture.width for row in pictures for picture in row)
    height = max(picture.height for row in pictures for picture in row)
    gap, font = max(4, width // 64), _font(max(12, min(width, height) // 16))
    line = font.getbbox("Ag")[3] + 4
    tops = [_wrapped(f"{x.name}: {label}", font, width) for label in x.labels] if x else []
    top = line * max((len(lines) for lines in tops), default=0) + (gap if tops else 0)
    sides = [_wrapped(f"{y.name}: {label}", font, max(width // 2, 96)) for label in y.labels] if y else []
    left = round(max((font.getlength(text) for lines in sides for text in lines), default=0)) + (gap if sides else 0)
    size = (left + len(pictures[0]) * (width + gap) + gap, top + len(pictures) * (height + gap) + gap)
    made = Image.new("RGB", size, "white")
    pen = ImageDraw.Draw(made)
    for column, lines in enumerate(tops):
        for number, text in enumerate(lines):
            place = left + gap + column * (width + gap) + (width - font.getlength(text)) / 2
            pen.text((place, gap / 2 + number * line), text, "black", font)
    for row, lines in enumerate(sides):
        middle = top + gap + row * (height + gap) + (height - line * len(lines)) / 2
        for number, text in enumerate(lines):
            pen.text((left - font.getlength(text), middle + number * line), text, "black", font)
    for row, own in enumerate(pictures):
        for column, picture in enumerate(own):
            made.paste(picture, (left + gap + column * (width + gap), top + gap + row * (height + gap)))
    return made


def _font(size: int) -> Any:
    from PIL import ImageFont

    return ImageFont.load_default(size)


def _wrapped(text: str, font: Any, width: int) -> list[str]:
    """A text in at most `LINES` lines of that width in pixels; the last one ends in dots where there is more."""
    lines, rest = list[str](), text
    while rest and len(lines) < LINES:
        size = next((n for n in range(len(rest), 1, -1) if font.getlength(rest[:n]) <= width), 1)
        space = rest.rfind(" ", 0, size + 1)
        size = space if len(rest) > size and space > 0 else size
        lines.append(rest[:size].strip())
        rest = rest[size:].strip()
    if rest:
        lines[-1] = lines[-1][:-1] + "…"
    return lines or [""]
