"""Charts of several lines: what is measured of several kinds, or of several runs, with bands of confidence."""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass

from sdxl_trainer.errors import plural
from sdxl_trainer.report import charts
from sdxl_trainer.report.charts import LIMIT, Axis, Chart, Point, axis, logarithmic, plots, scale_switch, vertical
from sdxl_trainer.report.words import count, safe, short

COLOURS = 6  # as the style has them; more lines begin anew


@dataclass(frozen=True)
class Series:
    """A line of measured points; `width` is half of a confidence interval by step."""

    name: str
    points: Sequence[Point]
    width: dict[int, float] | None = None


def figure(title: str, series: Sequence[Series], from_zero: bool = False, wide: bool = False, log: bool = False) -> str:
    """A chart with a legend, axes, the lines and a read-out; nothing where there are no points. With `log` also on a
    logarithmic axis."""
    shown = [line for line in series if line.points]
    if not shown:
        return ""
    steps = sorted({step for line in shown for step, _ in line.points})
    values = [value for line in shown for _, value in line.points]
    floor = 0.0 if min(values) >= 0 else -math.inf
    values += [
        max(v + s * line.width[t], floor)
        for line in shown
        if line.width
        for t, v in line.points
        for s in (-1, 1)
        if t in line.width
    ]
    x = axis(steps[0], steps[-1], 5, whole=True)
    y, above = vertical(Chart("", title, from_zero), values)
    scales = [y, *(logarithmic([value for line in shown for _, value in line.points]) if log else ())]
    limit = max(2, LIMIT // len(shown))
    thin = {line.name: [line.points[i] for i in charts.kept(line.points, limit)] for line in shown}
    said = "; ".join(f"{line.name} {short(line.points[-1][1])} at step {count(line.points[-1][0])}" for line in shown)
    beyond = f"; {plural(above, 'value lies', 'values lie')} above the frame" if above else ""
    keys = "".join(
        f'<span><span class="key c{i % COLOURS}"></span>{safe(line.name, 60)}</span>' for i, line in enumerate(shown)
    )
    spoken = safe(f"{title}: {said}.")
    drawn = plots(x, scales, lambda scale: _svg(shown, thin, x, scale, spoken))
    return (
        f'<figure class="chart lines{" wide" if wide else ""}" tabindex="0" data-title="{safe(title)}" '
        f'{_hover(shown, thin, x, scales)}><figcaption><b>{safe(title)}</b><span class="legend">{keys}</span>'
        f"{scale_switch(scales)}</figcaption>{drawn}"
        f'<output aria-live="polite">{safe(said + beyond)}</output></figure>'
    )


def _svg(shown: Sequence[Series], thin: dict[str, list[Point]], x: Axis, y: Axis, spoken: str) -> str:
    bands = "".join(_band(line, i, x, y) for i, line in enumerate(shown))
    return charts.svg([(f"c{i % COLOURS}", thin[line.name]) for i, line in enumerate(shown)], x, y, spoken, bands)


def _band(line: Series, number: int, x: Axis, y: Axis) -> str:
    """The confidence interval as an area."""
    if not line.width:
        return ""
    known = [(step, value, line.width[step]) for step, value in line.points if step in line.width]
    if len(known) < 2:
        return ""
    known = [known[i] for i in range(0, len(known), max(1, len(known) // 200))]
    there = [f"{x.place(step):.1f} {1000 - y.place(value + half):.1f}" for step, value, half in known]
    back = [f"{x.place(step):.1f} {1000 - y.place(value - half):.1f}" for step, value, half in reversed(known)]
    return f'<path class="band c{number % COLOURS}" d="M{"L".join([*there, *back])}Z"/>'


def _hover(shown: Sequence[Series], thin: dict[str, list[Point]], x: Axis, scales: Sequence[Axis]) -> str:
    """The numbers that the read-out needs: of each line its value at each step that any line has, or null."""
    steps = sorted({step for points in thin.values() for step, _ in points})
    known = [dict(thin[line.name]) for line in shown]
    data = {
        "x": steps,
        "names": [line.name[:60] for line in shown],
        "values": [[None if s not in own else float(f"{own[s]:.4g}") for s in steps] for own in known],
        "places": [round(x.place(step), 1) for step in steps],
        "heights": [[round(y.place(next(own[s] for own in known if s in own)), 1) for s in steps] for y in scales],
    }
    return f"data-points='{safe(json.dumps(data, separators=(',', ':')), 10**9)}'"
