"""accelerate's trackers: losses, pictures and tables, each tracker on a thread of its own, so that none can hurt a run.

What a tracker raises, or how long it hangs, is its own affair: the run is told once and goes on, and metrics.jsonl has
everything. Where a tracker cannot hold pictures or tables it gets none.
"""

import os
import queue
import threading
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sdxl_trainer.config import Log
from sdxl_trainer.errors import UserError, closest, plural
from sdxl_trainer.files import write_text

PATIENCE = 30.0  # seconds that the end of a run waits for what is still to be sent
WAITING = 2000  # calls that may wait for a slow tracker; what comes then is left out, and counted


def refuse(log: Log) -> None:
    """Refuse trackers that do not exist or are not installed."""
    if not log.trackers:
        return
    from accelerate.tracking import get_available_trackers
    from accelerate.utils import LoggerType

    known = [str(kind.value) for kind in LoggerType if kind != LoggerType.ALL]
    available = [str(getattr(kind, "value", kind)) for kind in get_available_trackers()]
    for tracker in log.trackers:
        if tracker not in known:
            raise UserError(f"there is no tracker '{tracker}'", "log.trackers", closest(tracker, known))
        if tracker not in available:
            what = f"the tracker '{tracker}' is not installed"
            raise UserError(what, "log.trackers", f"pip install {tracker}, or remove it from log.trackers")


class Caught:
    """Keeps what is raised inside, whatever it is: trackers are other people's code and other people's servers."""

    error: Exception | None = None

    def __enter__(self) -> "Caught":
        return self

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> bool:
        self.error = error if isinstance(error, Exception) else None
        return self.error is not None


@dataclass
class Worker:
    """One tracker and its thread. `failures` counts calls that it refused, `left` those that it was too slow for; what
    belongs to steps before `first` it has already."""

    name: str
    say: Callable[[str], None]
    tracker: Any = None
    failures: int = 0
    left: int = 0
    first: int = 0
    calls: "queue.Queue[Callable[[], None] | None]" = field(default_factory=lambda: queue.Queue(WAITING))
    done: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        # A daemon: the program can end while a tracker hangs.
        threading.Thread(target=self._work, name=f"tracker {self.name}", daemon=True).start()

    def put(self, call: Callable[[], None]) -> None:
        try:
            self.calls.put_nowait(call)
        except queue.Full:
            self.left += 1

    def _work(self) -> None:
        while (call := self.calls.get()) is not None:
            with Caught() as caught:
                call()
            if caught.error is not None:
                self._failed(caught.error)
        self.done.set()

    def _failed(self, error: Exception) -> None:
        self.failures += 1
        if self.failures == 1:
            first = str(error).strip().splitlines()[0][:200] if str(error).strip() else ""
            what = f"{type(error).__name__}{f': {first}' if first else ''}"
            self.say(f"the tracker {self.name} failed ({what}); the run goes on, metrics.jsonl has everything")

    def close(self, until: float) -> None:
        """Wait for the thread to finish what it has; tell what it could not."""
        try:
            self.calls.put(None, timeout=max(0.0, until - time.monotonic()))
        except queue.Full:
            self.left += 1
        finished = self.done.wait(max(0.0, until - time.monotonic()))
        lost = self.failures + self.left + (0 if finished else self.calls.qsize())
        if lost or not finished:
            self.say(
                f"the tracker {self.name} lacks {plural(lost, 'record')}{'' if finished else ': it does not answer'}"
            )


class Trackers:
    """The trackers of a run, in its main process; elsewhere, and where there are none, it does nothing."""

    def __init__(
        self, names: Sequence[str], project: str, folder: Path, say: Callable[[str], None], main: bool
    ) -> None:
        self.workers = [Worker(name, say) for name in (names if main else ())]
        self.project, self.folder = project, folder

    def start(self, options: dict[str, Any], continues: bool = False) -> None:
        """Begin; `options` are the run's, on one level. A run that continues is the same one there, where that goes."""
        for worker in self.workers:
            worker.put(lambda worker=worker: self._begin(worker, options, continues))  # type: ignore[misc]
            worker.start()

    def _begin(self, worker: Worker, options: dict[str, Any], continues: bool) -> None:
        from accelerate.tracking import LOGGER_TYPE_TO_CLASS

        kind = LOGGER_TYPE_TO_CLASS[worker.name]
        told = {"logging_dir": str(self.folder)} if kind.requires_logging_directory else {}
        if worker.name == "wandb":
            told |= _same_run(self.folder, continues)
        tracker = kind(self.project, **told)
        tracker.start()
        if worker.name == "wandb" and continues:
            worker.first = getattr(tracker.run, "step", 0)
        worker.tracker = tracker
        tracker.store_init_configuration(options)

    def scalars(self, row: dict[str, Any], step: int) -> None:
        """Numbers of a step; a table in a row becomes numbers named <key>/<inner>."""
        flat = dict(_flat(row))
        self._each(lambda worker: worker.tracker.log(flat, step=step), step)

    def pictures(self, title: str, files: Sequence[Path], step: int) -> None:
        """Pictures of one prompt, to the trackers that can hold them."""
        self._each(lambda worker: PICTURES[worker.name](worker.tracker, title, files, step), step, PICTURES)

    def table(self, title: str, columns: Sequence[str], rows: Sequence[Sequence[Any]], step: int) -> None:
        """A table, to the trackers that can hold one."""
        self._each(lambda worker: TABLES[worker.name](worker.tracker, title, list(columns), rows, step), step, TABLES)

    def _each(self, call: Callable[[Worker], Any], step: int, known: dict[str, Any] | None = None) -> None:
        for worker in self.workers:
            if known is None or worker.name in known:
                worker.put(lambda worker=worker: _with(worker, call, step))  # type: ignore[misc]

    def close(self, patience: float = PATIENCE) -> None:
        """Finish the trackers, or leave those that do not answer. Closing again does nothing."""
        until = time.monotonic() + patience
        for worker in self.workers:
            worker.put(lambda worker=worker: _with(worker, lambda own: own.tracker.finish()))  # type: ignore[misc]
        for worker in self.workers:
            worker.close(until)
        self.workers = []


def _with(worker: Worker, call: Callable[[Worker], Any], step: int | None = None) -> None:
    if worker.tracker is None:
        worker.left += 1  # it could not begin: that was told
    elif step is None or step >= worker.first:
        call(worker)


def _same_run(folder: Path, continues: bool) -> dict[str, Any]:
    """How W&B calls a run, and finds it again when it continues: it is one there too, however often it is interrupted.
    The environment's WANDB_NAME and WANDB_RUN_ID win; a run that is kept offline cannot be found again."""
    place, told = folder / "wandb-run", {}
    if not continues or not place.is_file():
        write_text(place, uuid.uuid4().hex[:16])
    if "WANDB_NAME" not in os.environ:
        told["name"] = folder.resolve().parent.name
    online = os.environ.get("WANDB_MODE", "online") in {"online", "shared"}
    if online and not {"WANDB_RUN_ID", "WANDB_RESUME"} & os.environ.keys():
        told |= {"id": place.read_text(encoding="utf-8"), "resume": "allow"}
    return told


def _flat(row: dict[str, Any]) -> list[tuple[str, Any]]:
    pairs = []
    for key, value in row.items():
        inner = [(f"{key}/{name}", v) for name, v in value.items()] if isinstance(value, dict) else [(key, value)]
        pairs += [(name, v) for name, v in inner if v is not None]
    return pairs


def _arrays(files: Sequence[Path]) -> list[Any]:
    import numpy as np
    from PIL import Image

    found = []
    for file in files:
        with Image.open(file) as image:
            found.append(np.asarray(image.convert("RGB")))
    return found


def _tensorboard(tracker: Any, title: str, files: Sequence[Path], step: int) -> None:
    import numpy as np

    arrays = _arrays(files)
    if len({array.shape for array in arrays}) == 1:
        tracker.log_images({title: np.stack(arrays)}, step=step, dataformats="NHWC")
        return
    for number, array in enumerate(arrays):
        tracker.log_images({f"{title} {number}": array[None]}, step=step, dataformats="NHWC")


def _several(tracker: Any, title: str, files: Sequence[Path], step: int) -> None:
    tracker.log_images({title: _arrays(files)}, step=step)


def _one_by_one(tracker: Any, title: str, files: Sequence[Path], step: int) -> None:
    for number, array in enumerate(_arrays(files)):
        tracker.log_images({f"{title} {number}": array}, step=step)


def _trackio(tracker: Any, title: str, files: Sequence[Path], step: int) -> None:
    import trackio

    told = {f"{title} {number}": trackio.Image(str(file), caption=title) for number, file in enumerate(files)}
    tracker.run.log(told, step=step)


def _comet(tracker: Any, title: str, files: Sequence[Path], step: int) -> None:
    for number, file in enumerate(files):
        tracker.writer.log_image(str(file), name=f"{title} {number}", step=step)


def _mlflow(tracker: Any, title: str, files: Sequence[Path], step: int) -> None:
    import mlflow

    for number, array in enumerate(_arrays(files)):
        mlflow.log_image(array, key=_plain(f"{title} {number}"), step=step)


def _dvclive(tracker: Any, title: str, files: Sequence[Path], step: int) -> None:
    tracker.live.step = step
    for number, array in enumerate(_arrays(files)):
        tracker.live.log_image(f"{_plain(f'{title} {number}')}.png", array)


def _plain(text: str) -> str:
    """A prompt as the name of a file."""
    return "".join(mark if mark.isalnum() else "-" for mark in text)[:80]


# How each tracker takes pictures: (tracker, title, files, step).
PICTURES: dict[str, Callable[[Any, str, Sequence[Path], int], None]] = {
    "tensorboard": _tensorboard,
    "wandb": _several,
    "swanlab": _several,
    "aim": _one_by_one,
    "clearml": _one_by_one,
    "trackio": _trackio,
    "comet_ml": _comet,
    "mlflow": _mlflow,
    "dvclive": _dvclive,
}


def _markdown(tracker: Any, title: str, columns: list[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    lines = ["| " + " | ".join(map(str, row)) + " |" for row in (columns, ["---"] * len(columns), *rows)]
    tracker.writer.add_text(title, "\n".join(lines), global_step=step)


def _log_table(tracker: Any, title: str, columns: list[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    tracker.log_table(title, columns=columns, data=[list(row) for row in rows], step=step)


def _trackio_table(tracker: Any, title: str, columns: list[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    import pandas
    import trackio

    tracker.run.log({title: trackio.Table(dataframe=pandas.DataFrame(rows, columns=columns))}, step=step)


def _comet_table(tracker: Any, title: str, columns: list[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    tracker.writer.log_table(f"{_plain(title)}-{step}.csv", [list(row) for row in rows], headers=columns)


def _mlflow_table(tracker: Any, title: str, columns: list[str], rows: Sequence[Sequence[Any]], step: int) -> None:
    import mlflow

    data = {column: [row[i] for row in rows] for i, column in enumerate(columns)}
    mlflow.log_table({"step": [step] * len(rows), **data}, artifact_file=f"{_plain(title)}.json")


# How each tracker takes a table: (tracker, title, columns, rows, step).
TABLES: dict[str, Callable[[Any, str, list[str], Sequence[Sequence[Any]], int], None]] = {
    "tensorboard": _markdown,
    "wandb": _log_table,
    "clearml": _log_table,
    "trackio": _trackio_table,
    "comet_ml": _comet_table,
    "mlflow": _mlflow_table,
}
