"""What a run says: lines and progress in the terminal, and one JSON object per step in its folder."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_trainer import files
from sdxl_trainer.errors import UserError

_SECONDS_BETWEEN_LINES = 10.0


class Console:
    """Lines on stderr and one progress bar (a line now and then where there is no terminal); silent on other ranks."""

    def __init__(self, main: bool = True) -> None:
        self.main = main
        self._bar: Any = None
        self._task: Any = None
        self._last = 0.0
        self._started = time.monotonic()

    def say(self, text: str) -> None:
        if self.main:
            if self._bar is not None:
                self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)
            else:
                print(text, file=sys.stderr, flush=True)

    def progress(self, done: int, total: int, what: str, detail: str = "") -> None:
        """Show how far something is, with its rate and the time left."""
        if not self.main:
            return
        if done == 0 or self._task is None:
            self._begin(done, total, what)
        if self._bar is not None:
            self._bar.update(self._task, completed=done, detail=detail)
        elif done == total or time.monotonic() - self._last > _SECONDS_BETWEEN_LINES:
            self._last = time.monotonic()
            print(f"{what} {done}/{total}{self._pace(done, total)}  {detail}".rstrip(), file=sys.stderr, flush=True)
        if done >= total:
            self.end()

    def end(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def _begin(self, done: int, total: int, what: str) -> None:
        self.end()
        self._started, self._task, self._first = time.monotonic(), 0, done
        if sys.stderr.isatty():
            from rich.console import Console as RichConsole
            from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeRemainingColumn(),
                TextColumn("{task.fields[detail]}"),
            )
            self._bar = Progress(*columns, console=RichConsole(stderr=True))
            self._bar.start()
            self._task = self._bar.add_task(what, total=total, completed=done, detail="")

    def _pace(self, done: int, total: int) -> str:
        seconds = time.monotonic() - self._started
        if done <= self._first or seconds <= 0:
            return ""
        rate = (done - self._first) / seconds
        return f"  {figure(rate)}/s, {duration((total - done) / rate)} left"


def figure(number: float) -> str:
    """Three figures, or a whole number: 0.0123, 45.6, 3,350."""
    return f"{number:,.0f}" if number >= 999.5 else f"{number:.3g}"


def duration(seconds: float) -> str:
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Metrics:
    """`metrics.jsonl`: one object per optimizer step, each step once and in order, also after an interruption."""

    def __init__(self, path: Path, after: int, main: bool = True) -> None:
        """Continue after step `after`: lines of later steps, and a line cut short, were of an interrupted run.
        Only the main process writes."""
        self._path, self._file = path, None
        if main:
            kept = [row for row in read_metrics(path, after) if row["step"] <= after]
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
            # No buffer: what a full disk refused is not tried again when the file is closed.
            self._file = path.open("ab", buffering=0)

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        if self._file is not None:
            with files.explained(self._path):
                rest = "".join(json.dumps(row) + "\n" for row in rows).encode()
                while rest:
                    rest = rest[self._file.write(rest) :]

    def sync(self) -> None:
        if self._file is not None:
            with files.explained(self._path):
                os.fsync(self._file.fileno())

    def close(self) -> None:
        if self._file is not None:
            self.sync()
            self._file.close()


def read_metrics(path: Path, through: int = 0) -> list[dict[str, Any]]:
    """The rows of a metrics file, up to the first line that is damaged or cut short; that is an error, since rows
    would be lost, if it comes before the row of step `through`."""
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(path.read_bytes().splitlines() if path.is_file() else [], start=1):
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            if (rows[-1]["step"] if rows else 0) < through:
                fix = "correct or remove that line; or move the file elsewhere, if its losses are not needed"
                raise UserError(f"line {number} is damaged", str(path), fix)
            break
        rows.append(row)
    return rows
