"""What stands between a long run and the things that end one: memory, spikes of the loss, processes that hang."""

import itertools
import os
import re
import statistics
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch

from sdxl_trainer.config import STEP_APART, Config
from sdxl_trainer.errors import UserError

# A loss is a spike from this many robust standard deviations above the median of the losses before it.
SPIKE, WINDOW, ENOUGH = 8.0, 200, 20
# What PyTorch says, and of GPUs' libraries for products, which ask for memory of their own.
_NO_MEMORY = re.compile(r"out of memory|can't allocate memory|not enough memory|_ALLOC_FAILED", re.IGNORECASE)
# What the libraries by which processes talk say when another one is gone (gloo, NCCL).
_GONE = re.compile(r"closed by peer|reset by peer|broken pipe|remote process (exited|has)", re.IGNORECASE)
_EXIT = 75  # EX_TEMPFAIL: launchers that restart may


@contextmanager
def memory_explained(config: Config) -> Iterator[None]:
    """Turn running out of memory into three settings that would help, each with what it costs."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:  # PyTorch's own error of GPUs is a RuntimeError
        if not isinstance(error, MemoryError) and not _NO_MEMORY.search(str(error)):
            raise
        said = re.search(r"[Tt]ried to allocate ([\d.]+ \w+)|you tried to allocate (\d+ bytes)", str(error))
        wanted = f" (it wanted {said[1] or said[2]} more)" if said else ""
        fix = "; ".join(remedies(config)[:3])
        raise UserError(f"the memory is not enough{wanted}", "train", f"{fix}; the same command continues") from error


@contextmanager
def others_explained() -> Iterator[None]:
    """Say in words that another process of the run is gone, and end so that a launcher may start all anew."""
    try:
        yield
    except RuntimeError as error:
        if not (torch.distributed.is_initialized() and _GONE.search(str(error))):
            raise
        where = f"process {torch.distributed.get_rank()} of {torch.distributed.get_world_size()}"
        fix = "see what it said last; the same command continues from the last checkpoint"
        print(UserError("another process of this run has ended", where, fix), file=sys.stderr)
        raise SystemExit(_EXIT) from None


def may_fuse(config: Config) -> bool:
    """Whether the backward pass may take the steps of what learns, where each is of one pass."""
    learns = not (config.adapter or config.token) and all(rule.until == 1 for rule in config.learn)
    return learns and config.optimizer.name in STEP_APART


def remedies(config: Config) -> list[str]:
    """Settings that lower the memory which this config takes, the cheapest first, with what each costs."""
    train, found = config.train, list[str]()
    if (train.micro_batch or train.batch_size) > 1 and not train.fused_backward:
        half = max(1, (train.micro_batch or train.batch_size) // 2)
        found.append(f"train.micro_batch = {half} (same result, somewhat slower)")
    if train.gradient_checkpointing != 1:
        found.append("train.gradient_checkpointing = true (same result, a forward pass more in each step)")
    if (train.micro_batch or train.batch_size) == train.batch_size and may_fuse(config) and not train.fused_backward:
        found.append("train.fused_backward = true (on one GPU, same result, two passes for each step)")
    if config.adapter is None and config.optimizer.name in {"adamw", "schedulefree", "prodigy", "came", "lion"}:
        found.append('optimizer.name = "adafactor" (no first moments: another course of the training)')
    if (config.adapter or config.token) and train.frozen in {"auto", "fp32", "bf16", "fp16"}:
        found.append('train.frozen = "int8" (the base at half the memory of 16 bits, slightly less exact)')
    if config.ema.enabled:
        found.append("ema.enabled = false (no averaged weights)")
    if config.adapter is None:
        found.append("an [adapter] (LoRA: learns less, in a fraction of the memory)")
    if not train.shard:
        found.append("train.shard = true on several GPUs (same result, more traffic between them)")
    found.append("a lower data.resolution (less detail)")
    return found


@dataclass
class Spikes:
    """Losses that stand out from those before them."""

    recent: deque[float] = field(default_factory=lambda: deque(maxlen=WINDOW))

    def height(self, loss: float) -> float | None:
        """How many times the usual loss this is, if it is a spike; the loss is among the usual ones from now on."""
        spike = None
        if len(self.recent) >= ENOUGH and loss > (usual := statistics.median(self.recent)):
            spread = 1.4826 * statistics.median(abs(other - usual) for other in self.recent)
            if loss > usual + SPIKE * max(spread, 0.01 * usual):
                spike = loss / usual
        self.recent.append(loss)
        return spike


class Pulse:
    """Finds processes that hang. Each tells the others, through the store by which they met, which step it has begun
    and, again and again, that it is there; one that waits for `patience` seconds in the same step looks who is silent
    or behind, names them, and ends, so that a launcher may start all of them anew."""

    def __init__(
        self, accelerator: Any, patience: float, say: Callable[[str], None] | None = None, tick: float = 1.0
    ) -> None:
        self._rank, self._count = accelerator.process_index, accelerator.num_processes
        self._patience, self._say, self._tick = patience, say or _on_stderr, tick
        self._step, self._since, self._end = -1, time.monotonic(), threading.Event()
        self._seen = [(-1, -1)] * self._count  # of each process the step, and how often it has told
        self._threads = [threading.Thread(target=part, daemon=True) for part in (self._exchange, self._watch)]

    def begin(self) -> None:
        for thread in self._threads if self._count > 1 else []:
            thread.start()

    def beat(self, step: int) -> None:
        """This process has begun a step, or something else that takes long."""
        self._step, self._since = step, time.monotonic()

    def close(self) -> None:
        self._end.set()
        for thread in self._threads if self._count > 1 else []:
            thread.join(10 * self._tick)

    def _exchange(self) -> None:
        """Tell and read; the store may be waited for without end, and may be gone with the process that kept it."""
        store: Any = torch.distributed.distributed_c10d._get_default_store()
        pulse = torch.distributed.PrefixStore("pulse", store)
        keys = [str(number) for number in range(self._count)]
        for told in itertools.count():
            try:
                pulse.set(keys[self._rank], f"{self._step} {told}")
                said = [pulse.get(key).decode() if pulse.check([key]) else "-1 -1" for key in keys]
            except RuntimeError:
                return
            self._seen = [(int(step), int(times)) for step, times in map(str.split, said)]
            if self._end.wait(self._tick):
                return

    def _watch(self) -> None:
        while not self._end.wait(self._tick):
            if time.monotonic() - self._since > self._patience:
                before = self._seen
                if self._end.wait(max(5 * self._tick, 0.5)) or time.monotonic() - self._since <= self._patience:
                    continue
                steps = [step for step, _ in self._seen]
                alike = [then == now for then, now in zip(before, self._seen, strict=True)]
                # If this process reaches the store no more, the first one, which may keep it, does not answer.
                silent = [0] if alike[self._rank] else [number for number, same in enumerate(alike) if same]
                self._say(told(steps, self._rank, self._patience, silent))
                os._exit(_EXIT)


def _on_stderr(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


def told(steps: list[int], rank: int, patience: float, silent: Sequence[int] = ()) -> str:
    """Who hangs: those who are silent, or by the steps that all have begun."""
    last = max(steps)
    behind = [f"process {n} (in step {step + 1})" for n, step in enumerate(steps) if step < last]
    if silent:
        who = f"{', '.join(f'process {n}' for n in silent)} does not answer"
    else:
        who = f"{', '.join(behind)} did not begin step {last + 1}" if behind else f"all are in step {last + 1}"
    return f"error: process {rank} waited for {patience:g} s: {who}"
