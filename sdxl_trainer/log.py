"""What a run says: lines and progress in the terminal, one JSON object per step, and accelerate's trackers."""

import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sdxl_trainer import files

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
            print(f"{what} {done}/{total}{self._pace(done, total)} {detail}".rstrip(), file=sys.stderr, flush=True)
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
        return f"  {rate:.3g}/s, {duration((total - done) / rate)} left"


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
        if main:
            kept = [row for row in read_metrics(path) if row["step"] <= after]
            files.write_text(path, "".join(json.dumps(row) + "\n" for row in kept))
        self._file = (path if main else Path(os.devnull)).open("a", encoding="utf-8")

    def write(self, rows: Sequence[dict[str, Any]]) -> None:
        self._file.writelines(json.dumps(row) + "\n" for row in rows)
        self._file.flush()

    def sync(self) -> None:
        if self._file.name != os.devnull:
            os.fsync(self._file.fileno())

    def close(self) -> None:
        self.sync()
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics file, up to the first line that is cut short."""
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines() if path.is_file() else []:
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
