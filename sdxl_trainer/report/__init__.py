"""One self-contained page about a run: `write(run_dir)`. No network, no library in the page, only what the run left."""

from datetime import datetime
from pathlib import Path

from sdxl_trainer import files
from sdxl_trainer.errors import shortened
from sdxl_trainer.report import charts, pictures, records, sections, use, validation
from sdxl_trainer.report.frame import document
from sdxl_trainer.report.words import number, safe, section


def write(run_dir: Path) -> Path:
    """Write `report.html` into a run's folder and return its path. Any part that the run lacks is left out."""
    target = run_dir / "report.html"
    text = page(records.read(run_dir), datetime.now().astimezone())
    # A lone surrogate, which JSON can hold, is not text that a file can hold.
    files.write_text(target, text.encode("utf-8", errors="replace").decode("utf-8"))
    return target


def page(run: records.Run, now: datetime) -> str:
    """The whole page."""
    return document(f"{safe(run.name, 120)} · training report", body(run, now))


def body(run: records.Run, now: datetime) -> str:
    """The sections, in the order in which people ask: how does it look, how did it go, what is it, how do I use it."""
    notices = [*run.notices, *not_finite(run)]
    drawn = pictures.write(run.samples, notices)
    drawings = curves(run)
    return (
        f"<main>{sections.heading(run, now)}{sections.figures(run)}{sections.notes(notices)}"
        + section("Pictures", "pictures", drawn)
        + section("Curves", "curves", f'<div class="charts">{drawings}</div>' if drawings else "")
        + section("How to use it", "use", use.section_body(run, use.command(run)))
        + section("Data", "data", sections.data(run))
        + section("What learned", "learned", sections.learned(run))
        + section("Where the time went", "timings", sections.timings(run))
        + section("How to do it again", "again", sections.origin(run))
        + "</main>"
    )


def curves(run: records.Run) -> str:
    """All charts: the training loss, then what the validation says, then the rest."""
    drawn = [charts.figure(chart, run.metrics) for chart in charts.CHARTS]
    drawn.insert(1, validation.figures(run.validation))
    return "".join(drawn)


def not_finite(run: records.Run) -> list[str]:
    """A sentence if losses were not numbers: the curve cannot show them."""
    steps = [
        str(row["step"]) for row in run.metrics if isinstance(row.get("loss"), float) and number(row["loss"]) is None
    ]
    return [f"The loss was not a finite number at step {shortened(steps, 5)}."] if steps else []
