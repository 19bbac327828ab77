"""The words and tables of the page: what was trained from what on what, where the time went, how to do it again."""

import statistics
from collections.abc import Sequence
from datetime import datetime
from typing import Any

from sdxl_trainer.errors import plural
from sdxl_trainer.report import charts, validation
from sdxl_trainer.report.records import Run
from sdxl_trainer.report.use import block, command
from sdxl_trainer.report.words import (
    count,
    duration,
    grid,
    large,
    moment,
    number,
    part,
    safe,
    short,
    table,
    tables,
)


def heading(run: Run, now: datetime) -> str:
    """The name of the run, whether it is done, and one sentence about it."""
    state = "done" if run.done else "stopped" if run.manifest.get("finished") else "not finished"
    chip = f'<span class="chip {"good" if run.done else "open"}">{state}</span>'
    title = f"<h1>{safe(run.name, 120)} {chip}</h1>"
    verdict = "".join(f"<p>{safe(said)}</p>" for said in validation.words(run.validation))
    return f'<header>{title}<p>{_sentence(run)}</p>{verdict}<p class="muted">{_when(run, now)}</p></header>'


def _sentence(run: Run) -> str:
    base = part(run.manifest, "base", "path") or part(run.config, "model", "path")
    learning = number(part(run.manifest, "parameters", "learning"))
    frozen = number(part(run.manifest, "parameters", "frozen"))
    what = f"<b>{safe(_basename(base), 120)}</b> fine-tuned" if base else "Fine-tuned"
    if learning is not None:
        what += f" ({large(learning)}{f' of {large(learning + frozen)}' if frozen else ''} parameters)"
    pictures = number(part(run.manifest, "data", "pictures"))
    sets = [row for row in tables(run.manifest, "data", "sets") if row.get("pictures") != 0]  # those that are trained
    names = [safe(_basename(row.get("path", "?")), 120) for row in sets]
    names = names or [safe(_basename(row.get("path", "?")), 120) for row in tables(run.config, "data")]
    on = [f"<b>{plural(pictures, 'picture')}</b>"] if pictures is not None else []
    on += [f"from {', '.join(names[:3])}{f' and {len(names) - 3} more' if len(names) > 3 else ''}"] if names else []
    what += f" on {' '.join(on)}" if on else ""
    device = part(run.manifest, "hardware", "device")
    what += f", using {safe(device, 120)}" if device else ""
    return f"{what}. {_progress(run)}"


def _basename(path: Any) -> str:
    """The last part of a path: a hub id or a folder without what stands before it."""
    return str(path).rstrip("/\\").replace("\\", "/").rsplit("/", 1)[-1] or str(path)


def _progress(run: Run) -> str:
    seconds = number(run.manifest.get("seconds"))
    took = f" in {duration(seconds)}" if seconds is not None else ""
    at = f"step {count(run.last_step)}" + (f" of {count(run.planned)}" if run.planned is not None else "")
    if run.done:
        return f"Finished after {plural(run.last_step, 'step')}{took}."
    if run.manifest.get("finished"):
        return f"Stopped at {at}{took}."
    return f"Not finished when this page was written: at {at}."


def _when(run: Run, now: datetime) -> str:
    times = [("started", run.manifest.get("started")), ("ended", run.manifest.get("finished"))]
    said = [f"{word} {moment(value)}" for word, value in times if moment(value)]
    return " · ".join([*said, f"page written {now:%Y-%m-%d %H:%M}"])


def figures(run: Run) -> str:
    """The few numbers that people look for first."""
    cards: list[tuple[str, str, str]] = []
    if run.metrics or run.samples:
        epoch = number(run.metrics[-1].get("epoch")) if run.metrics else None
        beside = [f"of {count(run.planned)}"] if run.planned is not None and run.planned != run.last_step else []
        beside += [f"epoch {count(epoch)}"] if epoch is not None else []
        cards.append(("Steps", count(run.last_step), ", ".join(beside)))
    seconds = number(run.manifest.get("seconds"))
    if seconds is not None:
        cards.append(("Time", duration(seconds), ""))
    speeds = [value for _, value in charts.series(run.metrics, "samples_per_second")]
    if speeds:
        batch = number(part(run.config, "train", "batch_size"))
        seen = f", {count(run.last_step * batch)} seen" if batch is not None else ""
        cards.append(("Pictures per second", short(statistics.median(speeds)), f"median{seen}"))
    losses = charts.smoothed(charts.series(run.metrics, "loss"))
    if losses:
        cards.append(
            ("Smoothed loss", short(losses[-1][1]), f"over about {plural(charts.window(len(losses)), 'step')}")
        )
    return tiles(cards)


def tiles(rows: Sequence[tuple[str, str, str]]) -> str:
    """Numbers with a name above and a remark below each."""
    if not rows:
        return ""
    each = (f"<div><dt>{name}</dt><dd>{value}<small>{beside}</small></dd></div>" for name, value, beside in rows)
    return f'<dl class="figures">{"".join(each)}</dl>'


def notes(notices: Sequence[str]) -> str:
    if not notices:
        return ""
    return f'<aside aria-label="Remarks"><ul>{"".join(f"<li>{safe(notice)}</li>" for notice in notices)}</ul></aside>'


def data(run: Run) -> str:
    """One row per data set, with every plain value that was recorded about it."""
    sets = tables(run.manifest, "data", "sets")
    plain = [{k: v for k, v in row.items() if isinstance(v, str | int | float)} for row in sets]
    first = ["path", "pictures", "resolution"]
    names = [name for name in first if any(name in row for row in plain)]
    names += list(dict.fromkeys(k for row in plain for k in row if k not in first))[:7]
    rows = [[_cell(row.get(name)) for name in names] for row in plain]
    numeric = [i for i, name in enumerate(names) if all(number(row.get(name, 0)) is not None for row in plain)]
    totals = [(word, number(part(run.manifest, "data", word))) for word in ("pictures", "captions")]
    said = [plural(value, word[:-1]) for word, value in totals if value is not None]
    total = f"<p>{' with '.join(said)}.</p>" if said else ""
    listed = grid("Data sets", [safe(name.replace("_", " "), 60) for name in names], rows, numeric) if rows else ""
    return total + listed + _ledger(run)


def _ledger(run: Run) -> str:
    """What became of the pictures: sizes, what is cut off, what was left out and why."""
    told = part(run.manifest, "data", "ledger")
    pairs = [row for row in told if isinstance(row, list) and len(row) == 2] if isinstance(told, list) else []
    if not pairs:
        return ""
    table = grid("What became of the pictures", ["of what", "what"], [[safe(a, 200), safe(b)] for a, b in pairs[:200]])
    return f"<p>What became of them:</p>{table}"


def _cell(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return count(value) if value is None or number(value) is not None else safe(value)


def learned(run: Run) -> str:
    """The rules over parameter names and what each of them sets to learning."""
    parameters = table(run.manifest, "parameters")
    learning, frozen = number(parameters.get("learning")), number(parameters.get("frozen"))
    text = ""
    if learning is not None and frozen is not None and learning + frozen > 0:
        share = 100 * learning / (learning + frozen)
        text = (
            f"{plural(learning, 'parameter')} learned, {count(frozen)} stayed as they were ({short(share)} % learned)."
        )
    rows = [
        [
            f"<code>{safe(rule.get('match', ''))}</code>",
            count(rule.get("tensors")),
            count(rule.get("parameters")),
            short(rate) if (rate := number(rule.get("learning_rate"))) is not None else "–",
        ]
        for rule in tables(parameters, "rules")
    ]
    headings = ["names that match", "tensors", "parameters", "learning rate"]
    return (f"<p>{text}</p>" if text else "") + (grid("Rules", headings, rows, (1, 2, 3)) if rows else "")


def timings(run: Run) -> str:
    """Where the time went, the longest first, with what no phase accounts for."""
    known = ((name, number(value)) for name, value in table(run.manifest, "timings").items())
    phases = sorted(((str(n), s) for n, s in known if s is not None and s >= 0), key=lambda phase: -phase[1])
    if not phases:
        return ""
    total = max(number(run.manifest.get("seconds")) or 0.0, sum(seconds for _, seconds in phases))
    rest = total - sum(seconds for _, seconds in phases)
    if rest > 0.005 * total:
        phases.append(("training steps and all else", rest))
    rows = []
    for name, seconds in phases:
        share = 100 * seconds / total if total else 0.0
        bar = f'<span class="bar" style="width:{share:.1f}%"></span>'
        rows.append([safe(name.replace("_", " "), 60), duration(seconds), f"{share:.1f} %", bar])
    return grid("Time by phase", ["phase", "time", "share", '<span class="hidden">share as a bar</span>'], rows, (1, 2))


def origin(run: Run) -> str:
    """Command, config, hardware, versions and hashes: what it takes to do it again."""
    ran = command(run)
    parts = [f"<p>The command:</p>{block('Command of the run', ran)}" if ran else ""]
    if run.config_text:
        text = block("Config of the run", run.config_text.strip())
        parts.append(f"<details><summary>Config with every option (config.toml)</summary>{text}</details>")
    facts = list(table(run.manifest, "hardware").items())
    hardware = [[safe(str(name).replace("_", " "), 60), _cell(value)] for name, value in facts]
    versions = [[safe(name, 60), safe(value, 120)] for name, value in table(run.manifest, "versions").items()]
    hashes = [
        [safe(name, 60), f"<code>{safe(value, 80)}</code>"]
        for name, value in table(run.manifest, "base", "hashes").items()
    ]
    base = part(run.manifest, "base", "path")
    named = f" of {safe(base, 200)}" if base else ""
    for title, rows in (("Hardware", hardware), ("Versions", versions), (f"SHA-256{named}", hashes)):
        if rows:
            parts.append(f"<details><summary>{title}</summary>{grid(title, ['name', 'value'], rows)}</details>")
    return "".join(parts)
