"""The parts of a run: what is fixed, what changes from step to step, how it starts and how it is stopped."""

import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor

from sdxl_trainer.base import Base
from sdxl_trainer.config import Config
from sdxl_trainer.data.loader import Samples
from sdxl_trainer.data.plan import Plan
from sdxl_trainer.dtypes import DTYPES
from sdxl_trainer.ema import Ema
from sdxl_trainer.errors import Interrupted
from sdxl_trainer.guards import Pulse, Spikes
from sdxl_trainer.log import Console, Metrics
from sdxl_trainer.model import SDXL, LatentScale
from sdxl_trainer.objective import Objective
from sdxl_trainer.parameters import Group
from sdxl_trainer.prior import Prior
from sdxl_trainer.saver import Saver
from sdxl_trainer.trackers import Trackers
from sdxl_trainer.validate import Validator

if TYPE_CHECKING:
    from accelerate import Accelerator


@dataclass(frozen=True)
class Start:
    """Where to begin. `continue`: at the newest checkpoint, if there is one. `new`: refuse a folder that holds a
    run. `restart`: from the base, replacing files of an older run. `checkpoint`: at a named one, or `latest`.
    With `at_least_one_step` a run that is already at its end takes one more."""

    mode: Literal["continue", "new", "restart", "checkpoint"] = "continue"
    checkpoint: str | None = None
    at_least_one_step: bool = False


CONTINUE = Start()


@dataclass(frozen=True)
class Run:
    """What does not change from step to step."""

    config: Config
    accelerator: "Accelerator"
    sdxl: SDXL
    model: Any  # `sdxl` as accelerate wrapped it
    optimizer: Any
    groups: list[Group]
    objective: Objective
    scale: LatentScale
    dtype: torch.dtype
    steps: int
    prior: Prior | None = None  # where samples are to stay what the base predicts

    @property
    def precision(self) -> str:
        """What it computes in: fp32, fp16 or bf16. Under autocast `dtype` is that of the inputs alone."""
        asked: str = self.accelerator.mixed_precision
        return next(name for name, kind in DTYPES.items() if kind == self.dtype) if asked == "no" else asked


@dataclass(frozen=True)
class Unread:
    """A step whose loss still lies on the device."""

    row: dict[str, Any]
    loss: Tensor
    norm: Tensor
    names: list[str]
    each: Tensor  # [n] losses of this process's n samples, by name


@dataclass
class State:
    """What changes: `step` counts optimizer steps. `broken` turns true on the device when a loss or gradient is
    not finite, and stays so; from then on no step touches the weights."""

    step: int
    ema: Ema | None
    broken: Tensor
    skipped: int = 0  # steps whose loss or gradient was not finite
    each: list[Tensor] = field(default_factory=list)  # losses [B] of the micro-batches of the step
    unread: list[Unread] = field(default_factory=list)
    spikes: Spikes = field(default_factory=Spikes)
    measures: list[tuple[int, float]] = field(default_factory=list)  # validation losses by step

    @property
    def best(self) -> int | None:
        """The step after which the validation loss was lowest; the base before the first step does not count."""
        taken = [(loss, step) for step, loss in self.measures if step > 0]
        return min(taken)[1] if taken else None


class Watch:
    """Where the time goes: seconds per phase, and laps that leave the phases out."""

    def __init__(self) -> None:
        self.phases: dict[str, float] = {}
        self.report_after = 0.0  # when the page about the run may be written again
        self.began = self._lap = time.monotonic()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        try:
            yield
        finally:
            spent = time.monotonic() - began
            self.phases[name] = self.phases.get(name, 0.0) + spent
            self._lap += spent

    def lap(self) -> float:
        now = time.monotonic()
        spent, self._lap = now - self._lap, now
        return max(spent, 1e-9)


@dataclass(frozen=True)
class Job:
    """A run with its state and everything around it."""

    run: Run
    state: State
    base: Base
    samples: Samples
    measured: dict[str, Samples]  # pictures whose loss is measured, `held_out` before `trained`
    order: Plan
    validator: Validator
    scheduler: dict[str, Any]
    metrics: Metrics
    validation: Metrics  # the measures of the validation loss
    trackers: Trackers
    saver: Saver
    pulse: Pulse
    console: Console
    watch: Watch
    output: Path
    data_hash: str

    @property
    def to_keep(self) -> int | None:
        """The step whose checkpoint is kept whatever the limit."""
        return self.state.best if self.run.config.validation.keep_best else None

    def sync(self) -> None:
        """Put the metrics so far on the disk: they have to be there before the checkpoint that follows on them."""
        self.metrics.sync()
        self.validation.sync()


@dataclass
class Stop:
    """The signal that asked to stop, 0 for none. `gently`: it is only noted, for the loop to save first."""

    signal: int = 0
    gently: bool = False

    def note(self, number: int, frame: Any) -> None:
        if not self.gently or (self.signal and number == signal.SIGINT):
            raise Interrupted(number)
        self.signal = number


@contextmanager
def stopping() -> Iterator[Stop]:
    """SIGINT and SIGTERM stop the run; a second SIGINT stops it without saving."""
    stop = Stop()
    old = {number: signal.signal(number, stop.note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stop
    finally:
        for number, handler in old.items():
            signal.signal(number, handler)
