"""Checkpoints beside the training: what a step needs is a copy in memory, the rest happens while the next steps run.

One is written at a time; it is read back and verified before an older one may go, and only then copied to a mirror.
"""

import os
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import psutil
import torch
from torch import Tensor

from sdxl_trainer import checkpoint, mirror, sharding
from sdxl_trainer.checkpoint import Checkpoint, Contents
from sdxl_trainer.config import Config
from sdxl_trainer.errors import UserError

# Seconds after which a thread that computes hands over to one that waits. Python's own 5 ms are paid by every kernel
# that the training starts while a checkpoint is put together.
SWITCH_SECONDS = 1e-4
# How much lower the writer's priority is. Not the lowest: while a thread that has to wait for a core holds the
# interpreter, the training waits too.
NICE = 10
# Bytes of page-locked memory that are asked for at once, and of which each tensor's part is a multiple. PyTorch rounds
# each request up to a power of two, by which SDXL's fp32 tensors would take 31 % more memory, here 5 %.
SLAB, ALIGNED = 1 << 28, 64
# Share of the free memory that a copy of the run may take; larger ones are written while the training waits.
MEMORY_SHARE = 0.5


class Saver:
    """Writes the checkpoints of one run; other processes than the main one only take part in `save`."""

    def __init__(self, config: Config, output: Path, say: Callable[[str], None], main: bool = True) -> None:
        self._output, self._say, self._main = output, say, main
        self._limit, self._mirror = config.train.checkpoints_limit, config.train.checkpoint_mirror
        self._buffers: dict[str, Tensor] = {}
        self._slab = torch.empty(0, dtype=torch.uint8)  # what is left of the last one
        self._writer, self._uploader = (ThreadPoolExecutor(1, name, _yielding) for name in ("checkpoint", "mirror"))
        self._writing: Future[Checkpoint] | None = None
        self._uploads: dict[Path, Future[None]] = {}
        self._told_memory = False

    def save(self, contents: Contents, before: Callable[[], None] = lambda: None, best: int | None = None) -> None:
        """Take a copy of the contents and begin to write it. Waits until the checkpoint before is whole. `before` is
        done first of all, beside the training too. The checkpoint of the step `best` is kept. UserError if the disk
        has no room, or if the last one failed."""
        self.wait()
        if not self._main:
            contents.kept(self._joined)
            return
        self._refuse_full_disk(contents.bytes)
        sharded = any(sharding.is_sharded(t) for own in contents.tensors.values() for t in own.values())
        if sharded or self._has_memory(contents.bytes):
            contents = contents.kept(self._kept)
            self._writing = self._writer.submit(self._write, contents, before, best)
        else:
            self._done(self._write(contents, before, best))

    def prune(self, last: int, best: int | None) -> None:
        """Leave as many checkpoints up to step `last` as are wanted, and that of the step `best`."""
        if self._limit and self._main:
            kept = [path for path, upload in self._uploads.items() if not upload.done()]
            kept += [self._output / f"{checkpoint.PREFIX}{best}"] if best is not None else []
            checkpoint.prune(self._output, self._limit, last, kept)

    def check(self) -> None:
        """Raise what went wrong with the checkpoint that is being written, as soon as it did."""
        if self._writing is not None and self._writing.done():
            self.wait()

    def wait(self) -> None:
        """Until the last checkpoint is whole and verified; raises what went wrong."""
        writing, self._writing = self._writing, None
        if writing is not None:
            self._done(writing.result())

    def close(self) -> None:
        """Wait for the last checkpoint and its mirror copy."""
        try:
            self.wait()
        finally:
            self._writer.shutdown()
            for path in list(self._uploads):
                self._told(path)
            self._uploader.shutdown()

    def _write(self, contents: Contents, before: Callable[[], None], best: int | None) -> Checkpoint:
        with _fair():
            before()
            made = checkpoint.save(self._output, contents)
            self.prune(made.step, best)
            return made

    def _done(self, made: Checkpoint) -> None:
        """Send a verified checkpoint to the mirror; an older one that still waits is not needed any more."""
        if self._mirror is None:
            return
        for path, upload in list(self._uploads.items()):
            upload.cancel()
            if upload.done():
                self._told(path)
        self._uploads[made.path] = self._uploader.submit(mirror.upload, made.path, self._mirror, self._limit)

    def _told(self, path: Path) -> None:
        """Say how an upload went, once it is over. That one failed stops nothing: the checkpoint is on this disk."""
        upload = self._uploads.pop(path)
        try:
            error = upload.exception()
        except CancelledError:
            error = UserError("the next checkpoint was there before its turn", "", "")
        if error is not None:
            what = error.what if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
            self._say(f"{path.name} is not in {self._mirror}: {what}")

    def _refuse_full_disk(self, needed: int) -> None:
        free = shutil.disk_usage(self._output).free
        if free < needed:
            what = f"a checkpoint takes {needed / 1e9:.2f} GB and the disk has {free / 1e9:.2f} GB free"
            fix = "free some space (older checkpoints stay until a newer one is verified); the same command continues"
            raise UserError(what, str(self._output), fix)

    def _has_memory(self, needed: int) -> bool:
        """Whether a copy of the run fits into memory; buffers of an earlier copy are there already."""
        if self._buffers or needed < MEMORY_SHARE * psutil.virtual_memory().available:
            return True
        if not self._told_memory:
            self._say(f"a copy of the run takes {needed / 1e9:.1f} GB of memory: checkpoints are written without one")
            self._told_memory = True
        return False

    def _kept(self, name: str, tensor: Tensor) -> Tensor:
        """A copy in host memory, which the next checkpoint uses again: fresh memory costs more than the copy."""
        buffer = self._buffers.get(name)
        if buffer is None or buffer.shape != tensor.shape or buffer.dtype != tensor.dtype:
            buffer = self._buffers[name] = self._room(tensor)
        return buffer.copy_(sharding.whole(tensor))

    def _room(self, tensor: Tensor) -> Tensor:
        """Host memory for a tensor, page-locked where a GPU copies into it."""
        if tensor.device.type != "cuda":
            return torch.empty(tensor.shape, dtype=tensor.dtype)
        size = tensor.numel() * tensor.element_size()
        if size > len(self._slab):
            self._slab = torch.empty(max(SLAB, size), dtype=torch.uint8, pin_memory=True)
        room, self._slab = self._slab[:size], self._slab[-(-size // ALIGNED) * ALIGNED :]
        return room.view(tensor.dtype).view(tensor.shape)

    def _joined(self, name: str, tensor: Tensor) -> Tensor:
        """Another process's part in what the main one keeps."""
        return sharding.whole(tensor).new_empty(0) if sharding.is_sharded(tensor) else tensor


def _yielding() -> None:
    """Let this thread have less of the cores than the training. On Linux each thread has a priority of its own."""
    if sys.platform == "linux":
        os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), NICE)


@contextmanager
def _fair() -> Iterator[None]:
    before = sys.getswitchinterval()
    sys.setswitchinterval(SWITCH_SECONDS)
    try:
        yield
    finally:
        sys.setswitchinterval(before)
