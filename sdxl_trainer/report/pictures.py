"""The pictures that a run drew: per prompt a table of seeds over steps, and a divider between first and later."""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from sdxl_trainer.data import images
from sdxl_trainer.errors import plural, shortened
from sdxl_trainer.report.records import Sample
from sdxl_trainer.report.words import clipped, count, safe, spread

SIDES = (512, 384, 256, 128)  # longer sides to try, in pixels, until all pictures fit
BUDGET = 4_500_000  # bytes of all pictures as text: the page must stay mailable
MOST, MOST_ROWS, MOST_STEPS = 60, 20, 10
Row = tuple[str, str, str]  # prompt, seed, weights


@dataclass(frozen=True)
class Gallery:
    """Which pictures the page shows: rows of one prompt, seed and kind of weights; columns of steps."""

    rows: tuple[Row, ...]
    steps: tuple[int, ...]
    cells: dict[tuple[Row, int], Sample]


@dataclass(frozen=True)
class Picture:
    """A picture as it stands in the page."""

    url: str
    width: int
    height: int


def write(samples: Sequence[Sample], notices: list[str]) -> str:
    """The body of the section of pictures; what is left out or unreadable goes to `notices`."""
    gallery = chosen(samples)
    if not gallery.cells:
        return ""
    pictures = embedded([sample.file for sample in gallery.cells.values()], notices)
    cells = {place: sample for place, sample in gallery.cells.items() if sample.file in pictures}
    shown = Gallery(gallery.rows, tuple(step for step in gallery.steps if any(s == step for _, s in cells)), cells)
    if not cells:
        return ""
    prompts = list(dict.fromkeys(row[0] for row in shown.rows))
    cards = "".join(_card(shown, pictures, i, prompt) for i, prompt in enumerate(prompts))
    return f"{_note(samples, shown)}{_slider(shown.steps)}{cards}"


def chosen(samples: Sequence[Sample]) -> Gallery:
    """A spread of steps, with the first and the last, and the first seeds of every prompt before further ones."""
    cells = {((s.prompt, s.seed, s.weights), s.step): s for s in samples}
    seeds = {seed: i for i, seed in enumerate(dict.fromkeys(s.seed for s in samples))}
    by_prompt: dict[str, list[Row]] = {}
    for row in sorted({row for row, _ in cells}, key=lambda row: (seeds[row[1]], row[2] != "raw", row[2])):
        by_prompt.setdefault(row[0], []).append(row)
    order = {prompt: i for i, prompt in enumerate(dict.fromkeys(s.prompt for s in samples))}
    turns = sorted(
        ((turn, order[row[0]], row) for rows in by_prompt.values() for turn, row in enumerate(rows)),
        key=lambda item: item[:2],
    )
    rows = sorted(
        (row for _, _, row in turns[:MOST_ROWS]), key=lambda row: (order[row[0]], by_prompt[row[0]].index(row))
    )
    steps = sorted({step for row, step in cells if row in set(rows)})
    kept = spread(steps, max(2, min(MOST_STEPS, MOST // max(1, len(rows)))))
    return Gallery(
        tuple(rows), tuple(kept), {(row, s): cells[row, s] for row in rows for s in kept if (row, s) in cells}
    )


def embedded(files: Sequence[Path], notices: list[str]) -> dict[Path, Picture]:
    """The files as data URLs, all at the largest size at which they fit the budget together."""
    small: dict[Path, Image.Image] = {}
    broken: list[str] = []
    for file in files:
        try:
            small[file] = _opened(file)
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError, Image.DecompressionBombWarning):
            broken.append(clipped(file.name, 80))
    if broken:
        notices.append(f"Not shown, because they are not readable as pictures: {shortened(broken, 3)}.")
    pictures: dict[Path, Picture] = {}
    for side in SIDES:
        pictures = {file: _encoded(image, side) for file, image in small.items()}
        # A file that stands in the page several times counts several times.
        if sum(len(pictures[file].url) for file in files if file in pictures) <= BUDGET:
            break
    return pictures


def _opened(file: Path) -> Image.Image:
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        with Image.open(file) as image:
            image.draft("RGB", (2 * SIDES[0], 2 * SIDES[0]))
            image.thumbnail((SIDES[0], SIDES[0]), Image.Resampling.LANCZOS, reducing_gap=2.0)
            return image.convert("RGB")


def _encoded(image: Image.Image, side: int) -> Picture:
    image = image.copy()
    image.thumbnail((side, side), Image.Resampling.LANCZOS)
    # Small pictures are shown enlarged, where halved colour resolution would be seen.
    sampling = 0 if max(image.size) <= 256 else 2
    return Picture(images.data_url(image, quality=85, optimize=True, subsampling=sampling), *image.size)


def _note(samples: Sequence[Sample], shown: Gallery) -> str:
    steps = len({sample.step for sample in samples})
    rows = len({(sample.prompt, sample.seed, sample.weights) for sample in samples})
    some = []
    if len(shown.steps) < steps:
        some.append(f"{len(shown.steps)} of {plural(steps, 'step')}")
    if len(shown.rows) < rows:
        some.append(f"{len(shown.rows)} of {plural(rows, 'series', 'series')}")
    left = f" Shown: {' and '.join(some)}; all {plural(len(samples), 'picture')} are in samples/." if some else ""
    same = "Each row starts from the same noise, so what changes is what was learned." if len(shown.steps) > 1 else ""
    return f'<p class="muted">{same}{left}</p>' if same or left else ""


def _slider(steps: Sequence[int]) -> str:
    """Moves all comparisons through the steps; of no use without script, so hidden until the script shows it."""
    if len(steps) < 2:
        return ""
    last = len(steps) - 1
    return (
        f'<div class="steps scripted"><label for="steps">Compare step {count(steps[0])} with</label>'
        f'<output for="steps">step {count(steps[-1])}</output>'
        f'<input type="range" id="steps" min="0" max="{last}" value="{last}"></div>'
    )


def _card(shown: Gallery, pictures: dict[Path, Picture], number: int, prompt: str) -> str:
    rows = [row for row in shown.rows if row[0] == prompt]
    steps = [step for step in shown.steps if any((row, step) in shown.cells for row in rows)]
    if not steps:
        return ""
    name = f"prompt-{number}"
    stage = _stage(name) if len(steps) > 1 else ""
    strip = _list(shown, pictures, rows[0], steps) if len(rows) == 1 else _table(shown, pictures, rows, steps)
    return (
        f'<article class="prompt" aria-labelledby="{name}"><h3 id="{name}">{safe(prompt, 400) or "(no prompt)"}</h3>'
        f'<div class="pair">{stage}{strip}</div></article>'
    )


def _list(shown: Gallery, pictures: dict[Path, Picture], row: Row, steps: Sequence[int]) -> str:
    """The only row of a prompt, free to wrap."""
    cells = (f"<li>{_pick(shown, pictures, row, step)}<small>step {count(step)}</small></li>" for step in steps)
    return f'<div><p class="muted">{_words(row)}</p><ol class="row">{"".join(cells)}</ol></div>'


def _table(shown: Gallery, pictures: dict[Path, Picture], rows: Sequence[Row], steps: Sequence[int]) -> str:
    """Several rows of a prompt with their steps below one another."""
    head = "".join(f'<th scope="col">step {count(step)}</th>' for step in steps)
    body = "".join(
        f'<tr class="row"><th scope="row">{_words(row)}</th>'
        + "".join(f"<td>{_pick(shown, pictures, row, step)}</td>" for step in steps)
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll strip" tabindex="0" role="region" aria-label="Pictures by step"><table>'
        f"<thead><tr><td></td>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def _words(row: Row) -> str:
    _, seed, weights = row
    kind = "EMA" if weights == "ema" else safe(weights, 40)
    return f"seed&nbsp;{safe(seed) or '–'}<small> {kind} weights</small>"


def _pick(shown: Gallery, pictures: dict[Path, Picture], row: Row, step: int) -> str:
    """A picture of the strip as a button, or a dash where the run drew none."""
    if (row, step) not in shown.cells:
        return '<span class="muted">–</span>'
    picture = pictures[shown.cells[row, step].file]
    alt = safe(spoken(step, row))
    return (
        f'<button type="button" class="pick" data-step="{step}"><img src="{picture.url}" alt="{alt}" '
        f'width="{picture.width}" height="{picture.height}"></button>'
    )


def spoken(step: int, row: Row) -> str:
    """A picture in words: no two of a run have the same, unless only the ends of their long prompts differ."""
    prompt, seed, weights = row
    return f"step {step}, seed {seed or '?'}, {weights} weights: {clipped(prompt, 120)}"


def _stage(name: str) -> str:
    """The place where two pictures of a row lie over one another; the script fills it from the table."""
    return (
        '<div class="stage scripted"><div class="wipe"><img class="before" alt=""><img class="after" alt="">'
        '<span class="tag before"></span><span class="tag after"></span></div>'
        f'<label class="hidden" for="{name}-wipe">Divider between before and after</label>'
        f'<input type="range" id="{name}-wipe" min="0" max="100" value="50"></div>'
    )
