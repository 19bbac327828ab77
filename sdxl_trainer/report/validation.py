"""The validation loss of a run: its lines, and what it says in words."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sdxl_trainer.intervals import half_width
from sdxl_trainer.report.lines import Series, figure
from sdxl_trainer.report.words import count, number, short

# Sets of pictures and kinds of weights, the telling ones first.
KINDS = {
    ("held_out", "ema"): "held-out pictures, averaged weights",
    ("held_out", "raw"): "held-out pictures",
    ("trained", "ema"): "trained pictures, averaged weights",
    ("trained", "raw"): "trained pictures",
    ("uncaptioned", "ema"): "held-out pictures without captions, averaged weights",
    ("uncaptioned", "raw"): "held-out pictures without captions",
}


@dataclass(frozen=True)
class Measure:
    """A line of validation.jsonl that can be used."""

    step: int
    loss: float
    interval: float | None
    timesteps: list[int]
    by_timestep: list[float]
    pictures: list[float]


def measures(rows: Sequence[dict[str, Any]]) -> dict[tuple[str, str], list[Measure]]:
    """By set of pictures and kind of weights, in the order of steps; rows that make no sense are left out."""
    found: dict[tuple[str, str], dict[int, Measure]] = {}
    for row in rows:
        kind, loss = (str(row.get("set")), str(row.get("weights"))), number(row.get("loss"))
        if kind in KINDS and loss is not None:
            lists = [_numbers(row.get(key)) for key in ("timesteps", "by_timestep", "pictures")]
            measure = Measure(row["step"], loss, number(row.get("interval")), [int(t) for t in lists[0]], *lists[1:])
            found.setdefault(kind, {})[row["step"]] = measure
    return {kind: [found[kind][step] for step in sorted(found[kind])] for kind in KINDS if kind in found}


def _numbers(values: Any) -> list[float]:
    known = [number(value) for value in values] if isinstance(values, list) else []
    return [] if None in known else [value for value in known if value is not None]


def figures(rows: Sequence[dict[str, Any]]) -> str:
    """Charts: the loss of each set and kind of weights, that of the first by part of the schedule, and by how much
    captions lower it, where that was measured."""
    known = measures(rows)
    if not known:
        return ""
    lines = list[Series]()
    for kind, own in known.items():
        if kind[0] == "uncaptioned":
            continue
        width = {m.step: m.interval for m in own if m.interval is not None} if len(lines) == 0 else None
        lines.append(Series(KINDS[kind], [(m.step, m.loss) for m in own], width))
    first = next(iter(known.values()))
    parts = first[-1].timesteps
    whole = [m for m in first if m.timesteps == parts and len(m.by_timestep) == len(parts)]
    by_part = [Series(f"t ≈ {part}", [(m.step, m.by_timestep[i]) for m in whole]) for i, part in enumerate(parts)]
    gains = [Series(KINDS["held_out", kind], points) for kind in ("ema", "raw") if (points := gained(known, kind))]
    charts = [("Validation loss", lines, False), ("Validation loss by timestep", by_part, True)]
    losses = "".join(figure(title, s, from_zero=parts, wide=not parts, log=True) for title, s, parts in charts)
    return losses + figure("Loss that captions save, %", gains)


def gained(known: dict[tuple[str, str], list[Measure]], weights: str) -> list[tuple[int, float]]:
    """(step, by how many percent captions lower the loss of held-out pictures)."""
    without = {m.step: m.loss for m in known.get(("uncaptioned", weights), [])}
    told = known.get(("held_out", weights), [])
    return [(m.step, 100 * (1 - m.loss / without[m.step])) for m in told if without.get(m.step)]


def change(before: Measure, after: Measure) -> tuple[float, float] | None:
    """The (geometric) mean change of the pictures' losses in percent and half of its 95 % confidence interval; None if
    they are not the same pictures. Pictures differ from each other far more than a picture from itself: paired, little
    shows."""
    pairs = list(zip(before.pictures, after.pictures, strict=False))
    if len(before.pictures) != len(after.pictures) or len(pairs) < 2 or min(map(min, pairs)) <= 0:
        return None
    changes = [math.log(b) - math.log(a) for a, b in pairs]
    factor = math.exp(min(700.0, statistics.fmean(changes)))
    return 100 * (factor - 1), 100 * factor * half_width(changes)


def words(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Whether the model got better on pictures that it does not train on, in a sentence or two."""
    known = measures(rows)
    kind = next((kind for kind in known if kind[0] == "held_out"), None)
    if kind is None or len(known[kind]) < 2:
        return []
    own = known[kind]
    lowest = min(own, key=lambda m: m.loss)
    said = [_moved(own[0], lowest if lowest.step else own[-1])]
    if lowest.step != own[-1].step and lowest.step:
        rise = change(lowest, own[-1])
        if rise and rise[0] > rise[1]:
            since = count(lowest.step)
            said.append(
                f"Since step {since} it has risen by {rise[0]:.1f} ± {rise[1]:.1f} %: the model learns its "
                f"pictures by heart, and the checkpoint nearest to step {since} is likely the better one."
            )
    if gains := gained(known, kind[1]):
        (first, before), (_, now) = gains[0], gains[-1]
        said.append(f"Captions lower this loss by {now:.1f} %; at step {count(first)} they did by {before:.1f} %.")
    return said


def _moved(before: Measure, after: Measure) -> str:
    start, end = (
        f"{short(before.loss)} at step {count(before.step)}",
        f"{short(after.loss)} at step {count(after.step)}",
    )
    moved = change(before, after)
    if moved is None:
        return f"On held-out pictures the loss went from {start} to {end}."
    size, half = moved
    told = f"{'+' if size > 0 else '−'}{abs(size):.1f} ± {half:.1f} %, picture by picture"
    if abs(size) <= half:
        return f"On held-out pictures the loss has not clearly changed: from {start} to {end} ({told})."
    return f"On held-out pictures the loss {'fell' if size < 0 else 'rose'} from {start} to {end} ({told})."
