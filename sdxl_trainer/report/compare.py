"""Several runs side by side: what differs in their settings, their curves over one another, their last pictures."""

import json
import os
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.configfile import flat
from sdxl_trainer.errors import UserError
from sdxl_trainer.report import charts, lines, pictures, records, sections, validation
from sdxl_trainer.report.frame import document
from sdxl_trainer.report.records import Run
from sdxl_trainer.report.words import count, duration, grid, number, safe, section, short

MOST = 12  # runs: more cannot be told apart
_IGNORED = ("output_dir", "cache.", "hub.", "log.", "export.name")


def write(folders: Sequence[Path], target: Path) -> Path:
    """Write a page about several runs and return its path."""
    if len(folders) > MOST:
        raise UserError(f"{len(folders)} runs are too many for a page", "sdxl report", f"give at most {MOST}")
    runs = [records.read(folder) for folder in folders]
    text = page(runs, names(runs), datetime.now().astimezone())
    with files.explained(target.parent):
        target.parent.mkdir(parents=True, exist_ok=True)
    files.write_text(target, text.encode("utf-8", errors="replace").decode("utf-8"))
    return target


def names(runs: Sequence[Run]) -> list[str]:
    """What to call the runs: their folders, with as much of the path before as tells them apart."""
    paths = [run.folder.resolve() for run in runs]
    if len(set(paths)) < len(paths):
        raise UserError("a run is given twice", "sdxl report", "give different folders")
    shared = Path(os.path.commonpath(paths))
    short = [path.name for path in paths]
    return short if len(set(short)) == len(short) else [str(path.relative_to(shared)) for path in paths]


def page(runs: Sequence[Run], called: Sequence[str], now: datetime) -> str:
    """The whole page."""
    notices = [f"{name}: {notice}" for name, run in zip(called, runs, strict=True) for notice in run.notices]
    shown = _pictures(runs, called, notices)
    curves = "".join(_curves(runs, called))
    title = f"<h1>{len(runs)} runs compared</h1>"
    listed = ", ".join(f"<b>{safe(name, 120)}</b>" for name in called)
    body = (
        f'<main><header>{title}<p>{listed}</p><p class="muted">page written {now:%Y-%m-%d %H:%M}</p></header>'
        + sections.notes(notices)
        + section("Results", "results", _results(runs, called))
        + section("What differs in their settings", "settings", _differences(runs, called))
        + section("Curves", "curves", f'<div class="charts">{curves}</div>' if curves else "")
        + section("Their last pictures", "pictures", shown)
        + "</main>"
    )
    return document(f"{len(runs)} runs compared · training report", body)


def _results(runs: Sequence[Run], called: Sequence[str]) -> str:
    rows = []
    for name, run in zip(called, runs, strict=True):
        losses = charts.smoothed(charts.series(run.metrics, "loss"))
        seconds = number(run.manifest.get("seconds"))
        lowest, last = _measured(run)
        state = "done" if run.done else "not finished"
        times = duration(seconds) if seconds is not None else "–"
        loss = short(losses[-1][1]) if losses else "–"
        rows.append([safe(name, 120), state, count(run.last_step), times, loss, lowest, last])
    heads = ["run", "state", "steps", "time", "smoothed loss", "lowest validation loss", "last validation loss"]
    return grid("Results", heads, rows, (2, 3, 4, 5, 6))


def _measured(run: Run) -> tuple[str, str]:
    """The lowest and the last validation loss, with their intervals."""
    known = validation.measures(run.validation)
    if not known:
        return "–", "–"
    own = next(iter(known.values()))
    lowest, last = min(own, key=lambda m: m.loss), own[-1]

    def said(measure: validation.Measure) -> str:
        wide = f" ± {short(measure.interval)}" if measure.interval is not None else ""
        return f"{short(measure.loss)}{wide}<small> step {count(measure.step)}</small>"

    return said(lowest), said(last)


def _differences(runs: Sequence[Run], called: Sequence[str]) -> str:
    """One row for each option that is not the same in all of them."""
    each = [flat(run.config) for run in runs]
    options = [name for name in dict.fromkeys(name for own in each for name in own) if not name.startswith(_IGNORED)]
    missing = object()
    differing = [name for name in options if len({repr(own.get(name, missing)) for own in each}) > 1]
    rows = [[f"<code>{safe(name, 120)}</code>", *(_value(own.get(name)) for own in each)] for name in differing]
    if not rows:
        return "<p>Nothing: their settings are the same.</p>"
    return grid("Settings that differ", ["option", *(safe(name, 120) for name in called)], rows)


def _value(value: Any) -> str:
    """As a config file says it, words without their quotes."""
    told = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)
    return "–" if value is None else safe(told, 300)


def _curves(runs: Sequence[Run], called: Sequence[str]) -> list[str]:
    """Each chart with a line for each run."""
    pairs = list(zip(called, runs, strict=True))
    made = []
    for chart in charts.CHARTS:
        drawn = [(name, charts.series(run.metrics, chart.key)) for name, run in pairs]
        if chart.smooth:
            drawn = [(name, charts.smoothed(points)) for name, points in drawn]
        title = f"{chart.title}, smoothed" if chart.smooth else chart.title
        shown = [lines.Series(name, points) for name, points in drawn]
        made.append(lines.figure(title, shown, chart.from_zero, wide=chart.smooth, log=chart.log))
    measured = []
    for name, run in pairs:
        own = next(iter(validation.measures(run.validation).values()), [])
        measured.append(lines.Series(name, [(m.step, m.loss) for m in own]))
    made.insert(1, lines.figure("Validation loss", measured, wide=True, log=True))
    return made


def _pictures(runs: Sequence[Run], called: Sequence[str], notices: list[str]) -> str:
    """Of every prompt and seed that several runs drew, the last picture of each."""
    last: dict[tuple[str, str], dict[str, records.Sample]] = {}
    for name, run in zip(called, runs, strict=True):
        for sample in run.samples:  # in the order of steps
            last.setdefault((sample.prompt, sample.seed), {})[name] = sample
    shared = [(key, own) for key, own in last.items() if len(own) > 1][: max(1, pictures.MOST // len(runs))]
    embedded = pictures.embedded([sample.file for _, own in shared for sample in own.values()], notices)
    cards = []
    for (prompt, seed), own in shared:
        cells = []
        for name, sample in own.items():
            if sample.file in embedded:
                found = embedded[sample.file]
                alt = safe(f"{name}, step {sample.step}: {prompt[:120]}")
                told = f"{safe(name, 80)}<br>step {count(sample.step)}"
                image = f'<img src="{found.url}" alt="{alt}" width="{found.width}" height="{found.height}">'
                cells.append(f"<li>{image}<small>{told}</small></li>")
        if cells:
            heading = f"{safe(prompt, 400) or '(no prompt)'}<small> seed {safe(seed) or '–'}</small>"
            cards.append(f'<article class="prompt"><h3>{heading}</h3><ol class="cells">{"".join(cells)}</ol></article>')
    return "".join(cards)
