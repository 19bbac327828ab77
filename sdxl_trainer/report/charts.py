"""Line charts as inline SVG with readable axes. Every point drawn is a measured one; thinning keeps the peaks."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from sdxl_trainer.errors import plural
from sdxl_trainer.report.words import count, number, short

LIMIT = 1000  # points of a line: more cannot be told apart on a screen
Point = tuple[int, float]


@dataclass(frozen=True)
class Chart:
    """What to draw of the metrics: a key, its words, and how."""

    key: str
    title: str
    from_zero: bool = True
    smooth: bool = False
    log: bool = False  # also on a logarithmic axis, for the reader to choose


CHARTS = (
    Chart("loss", "Training loss", from_zero=False, smooth=True, log=True),
    Chart("learning_rate", "Learning rate"),
    Chart("grad_norm", "Gradient norm"),
    Chart("samples_per_second", "Pictures per second"),
    Chart("memory_gb", "Memory in GB"),
)


@dataclass(frozen=True)
class Axis:
    """A range and the values that carry a label."""

    low: float
    high: float
    ticks: tuple[float, ...]
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies, from 0 to 1000; what is beyond lies on the edge."""
        if value <= self.low or value >= self.high:
            return 0.0 if value <= self.low else 1000.0
        low, at, high = (math.log(v) if self.log else v for v in (self.low, value, self.high))
        return 1000 * (at - low) / (high - low)


def series(metrics: Sequence[dict[str, Any]], key: str) -> list[Point]:
    """The finite values of one key, by step."""
    found = ((row["step"], number(row.get(key))) for row in metrics)
    return [(step, value) for step, value in found if value is not None]


def window(amount: int) -> int:
    """Over how many steps the loss is smoothed: a twentieth of the run."""
    return min(max(amount // 20, 5), 1000)


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential average over about `window` steps, corrected for its start (it begins at the first value)."""
    keep = 1 - 1 / window(len(points))
    total, weight, out = 0.0, 0.0, []
    for step, value in points:
        total, weight = keep * total + value, keep * weight + 1
        out.append((step, total / weight))
    return out


def kept(points: Sequence[Point], limit: int = LIMIT) -> list[int]:
    """Which points to draw: all, or of each equal stretch the smallest and the largest, and both ends."""
    if len(points) <= limit:
        return list(range(len(points)))
    stretches = limit // 2
    chosen = {0, len(points) - 1}
    for i in range(stretches):
        stretch = range(i * len(points) // stretches, (i + 1) * len(points) // stretches)
        chosen |= {min(stretch, key=lambda j: points[j][1]), max(stretch, key=lambda j: points[j][1])}
    return sorted(chosen)


def axis(low: float, high: float, ticks: int, whole: bool = False) -> Axis:
    """Round steps of 1, 2 or 5 that cover a range; a whole axis keeps its ends and has whole ticks."""
    if high - low <= 1e-9 * max(abs(low), abs(high)) + 1e-290:
        half = 0.5 if whole or low == 0 else abs(low) / 2
        low, high = low - half, low + half
    rough = (high - low) / ticks
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * f for f in (1, 2, 5, 10) if size * f >= rough * 0.999)
    if whole:
        step = max(step, 1.0)
        first, last = math.ceil(low / step), math.floor(high / step)
    else:
        first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
        low, high = first * step, last * step
    return Axis(low, high, tuple(i * step for i in range(first, last + 1)))


def vertical(chart: Chart, values: Sequence[float]) -> tuple[Axis, int]:
    """The axis of the values and how many lie above it: a few peaks must not flatten everything else."""
    ordered = sorted(values)
    top = ordered[min(len(ordered) - 1, math.ceil(len(ordered) * 0.99) - 1)]
    bottom = ordered[0]
    if chart.from_zero and bottom >= 0:
        bottom = 0.0
    high = ordered[-1] if ordered[-1] <= 2 * top else top
    scale = axis(bottom, high, 4)
    return scale, sum(value > scale.high * (1 + 1e-9) for value in values)


def logarithmic(values: Sequence[float]) -> tuple[Axis, ...]:
    """A logarithmic axis from the least to the largest value; none where they are not all above zero, or all alike."""
    low, high = min(values), max(values)
    if low <= 0 or high < 1.01 * low:
        return ()
    decades = [10.0**power for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    marks = [factor * decade for decade in decades for factor in (1, 2, 5)]
    inside = sum(low <= mark <= high for mark in marks)
    if inside < 3:
        marks = list(axis(low, high, 4).ticks)
    elif inside > 9:
        marks = decades[:: math.ceil(len(decades) / 7)]
    return (Axis(low, high, tuple(mark for mark in marks if low <= mark <= high), log=True),)


def plots(x: Axis, scales: Sequence[Axis], drawn: Callable[[Axis], str]) -> str:
    """The same lines on each axis of values; the script of the page shows one of them."""
    return "".join(
        f'<div class="plot{" logarithmic" if y.log else ""}">{labels(x, y)}{drawn(y)}<i class="cross"></i></div>'
        for y in scales
    )


def scale_switch(scales: Sequence[Axis]) -> str:
    """The button that changes the axis of values, where there is a choice."""
    made = '<button type="button" class="scale scripted" aria-pressed="false">log axis</button>'
    return made if len(scales) > 1 else ""


def figure(chart: Chart, metrics: Sequence[dict[str, Any]]) -> str:
    """A chart with title, axes, line(s) and a read-out; nothing where the run has no such numbers."""
    points = series(metrics, chart.key)
    if not points:
        return ""
    if chart.key == "learning_rate" and any("learning_rates" in row for row in metrics):
        chart = replace(chart, title="Learning rate of the first rule")
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    x = axis(steps[0], steps[-1], 5, whole=True)
    y, above = vertical(chart, values)
    scales = [y, *(logarithmic(values) if chart.log else ())]
    chosen = kept(points)
    lines = [("raw" if chart.smooth else "line", [points[i] for i in chosen])]
    readout = [f"{chart.title} {short(values[-1])} at step {count(steps[-1])}"]
    if chart.smooth:
        line = smoothed(points)
        lines.append(("line", [line[i] for i in chosen]))
        readout = [f"smoothed {short(line[-1][1])} at step {count(steps[-1])}"]
    if above:
        peak = max(points, key=lambda point: point[1])
        beyond = plural(above, "value lies", "values lie")
        readout.append(f"{beyond} above the frame, the highest {short(peak[1])} at step {count(peak[0])}")
    spoken = (
        f"{chart.title} over {plural(len(points), 'step')}: first {short(values[0])}, last {short(values[-1])}, "
        f"lowest {short(min(values))}, highest {short(max(values))}."
    )
    return (
        f'<figure class="chart {chart.key}" tabindex="0" data-title="{chart.title}" {_hover(lines, x, scales)}>'
        f"<figcaption><b>{chart.title}</b>{_legend(chart, len(points))}{scale_switch(scales)}</figcaption>"
        f"{plots(x, scales, lambda scale: svg(lines, x, scale, spoken))}"
        f'<output aria-live="polite">{"; ".join(readout)}</output></figure>'
    )


def _legend(chart: Chart, amount: int) -> str:
    if not chart.smooth:
        return ""
    return (
        '<span class="legend"><span class="key raw"></span>each step <span class="key line"></span>smoothed over '
        f"about {plural(window(amount), 'step')}</span>"
    )


def labels(x: Axis, y: Axis) -> str:
    """The values beside the axes."""
    across = "".join(
        f'<span class="x" aria-hidden="true" style="left:{x.place(tick) / 10:.2f}%">{count(tick)}</span>'
        for tick in x.ticks
    )
    up = "".join(
        f'<span class="y" aria-hidden="true" style="bottom:{y.place(tick) / 10:.2f}%">{short(tick)}</span>'
        for tick in y.ticks
    )
    return across + up


def svg(lines: Sequence[tuple[str, Sequence[Point]]], x: Axis, y: Axis, spoken: str, below: str = "") -> str:
    """Lines (class, points) over a grid; `below` lies between them and it."""
    grid = "".join(
        f'<line class="grid" x1="0" x2="1000" y1="{1000 - y.place(tick):.1f}" y2="{1000 - y.place(tick):.1f}"/>'
        for tick in y.ticks
    )
    paths = "".join(f'<path class="{name}" d="{_path(points, x, y)}"/>' for name, points in lines)
    head = f'<svg viewBox="0 0 1000 1000" preserveAspectRatio="none" role="img" aria-label="{spoken}">'
    return f"{head}{grid}{below}{paths}</svg>"


def _path(points: Sequence[Point], x: Axis, y: Axis) -> str:
    places = [f"{x.place(step):.1f} {1000 - y.place(value):.1f}" for step, value in points]
    # A line of one point has no length and would not be drawn; back to itself it makes a round dot.
    return "M" + "L".join(places if len(places) > 1 else places * 2)


def _hover(lines: Sequence[tuple[str, Sequence[Point]]], x: Axis, scales: Sequence[Axis]) -> str:
    """The numbers that the read-out needs, as attributes."""
    data = {
        "x": [step for step, _ in lines[0][1]],
        "values": [[float(f"{value:.4g}") for _, value in points] for _, points in lines],
        "places": [round(x.place(step), 1) for step, _ in lines[0][1]],
        "heights": [[round(scale.place(v), 1) for _, v in lines[-1][1]] for scale in scales],
    }
    return f"data-points='{json.dumps(data, separators=(',', ':'))}'"
