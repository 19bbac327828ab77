"""One self-contained page about a run: `write(run_dir)`. No network, no library in the page, only what the run left."""

import base64
import hashlib
from datetime import datetime
from pathlib import Path

from sdxl_trainer import files
from sdxl_trainer.errors import shortened
from sdxl_trainer.report import charts, pictures, records, sections
from sdxl_trainer.report.words import number, safe, section

ASSETS = Path(__file__).parent


def write(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder and return its path. Any part that the run lacks is left out."""
    target = run_dir / "report.html"
    text = page(records.read(run_dir), datetime.now().astimezone())
    # A lone surrogate, which JSON can hold, is not text that a file can hold.
    files.write_text(target, text.encode("utf-8", errors="replace").decode("utf-8"))
    return target


def page(run: records.Run, now: datetime) -> str:
    """The whole page. Its policy lets nothing load and no script run but the one whose hash it names."""
    style = (ASSETS / "page.css").read_text(encoding="utf-8")
    script = (ASSETS / "page.js").read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    name = safe(run.name, 120)
    return (
        '<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        '<meta name="color-scheme" content="light dark"><link rel="icon" href="data:,">'
        f"<title>{name} · training report</title><style>{style}</style></head>\n"
        f"<body>{body(run, now)}<script>{script}</script></body></html>\n"
    )


def body(run: records.Run, now: datetime) -> str:
    """The sections, in the order in which people ask: how does it look, how did it go, what is it, how do I use it."""
    notices = [*run.notices, *not_finite(run)]
    drawn = pictures.write(run.samples, notices)
    curves = "".join(charts.figure(chart, run.metrics) for chart in charts.CHARTS)
    return (
        f"<main>{sections.heading(run, now)}{sections.figures(run)}{sections.notes(notices)}"
        + section("Pictures", "pictures", drawn)
        + section("Curves", "curves", f'<div class="charts">{curves}</div>' if curves else "")
        + section("How to use it", "use", sections.use(run))
        + section("Data", "data", sections.data(run))
        + section("What learned", "learned", sections.learned(run))
        + section("Where the time went", "timings", sections.timings(run))
        + section("How to do it again", "again", sections.origin(run))
        + "</main>"
    )


def not_finite(run: records.Run) -> list[str]:
    """A sentence if losses were not numbers: the curve cannot show them."""
    steps = [
        str(row["step"]) for row in run.metrics if isinstance(row.get("loss"), float) and number(row["loss"]) is None
    ]
    return [f"The loss was not a finite number at step {shortened(steps, 5)}."] if steps else []
