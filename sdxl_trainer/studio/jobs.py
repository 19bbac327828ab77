"""Commands that the studio runs: each a process of its own, which outlives the page and the server.

A job is a file, `<state>/jobs/<id>.json`, with its output beside it. Trainings wait for one another; other commands
are done one after the other beside them. What a job does is the command line in its record.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import psutil

import sdxl_trainer
from sdxl_trainer import files
from sdxl_trainer.errors import UserError

LANES = {"train": "training"}  # every other kind of command runs in the lane "tools"
ENDED = ("done", "stopped", "failed", "lost")
TAIL = 64_000  # bytes of a job's output that are looked at
# Exit statuses of what was told to stop: after saving, before it could, and at once.
STOPPED = {130, 143, -signal.SIGINT, -signal.SIGTERM, -signal.SIGKILL}
# How the last line of a command's output begins.
WORDS = {"done:": "done", "for other programs:": "done", "interrupted;": "stopped", "  fix:": "failed"}
KEPT = 200  # jobs whose records are kept


@dataclass(frozen=True)
class Job:
    """A command. `state`: queued, running, done, stopped (it saved and can go on), failed, or lost (it ended while no
    studio was there to see how). `place` orders the queue; `pid` and `born` name the process, even after a restart."""

    id: str
    kind: str
    name: str
    arguments: tuple[str, ...]
    state: str = "queued"
    place: float = 0.0
    pid: int | None = None
    born: float | None = None
    code: int | None = None
    started: float | None = None
    ended: float | None = None

    @property
    def lane(self) -> str:
        return LANES.get(self.kind, "tools")


class Jobs:
    """The queue. All methods may be called from any thread."""

    def __init__(self, folder: Path, cwd: Path) -> None:
        self.folder, self.cwd = folder, cwd
        self._children: dict[str, subprocess.Popen[bytes]] = {}
        self._lock = threading.RLock()
        self._jobs: dict[str, Job] = {}
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob("*.json"):
            with contextlib.suppress(ValueError, TypeError, OSError):
                tree = json.loads(path.read_text(encoding="utf-8"))
                job = Job(**{**tree, "arguments": tuple(tree["arguments"])})
                self._jobs[job.id] = job

    def all(self) -> list[Job]:
        """Every job, the newest first."""
        with self._lock:
            return sorted(self._jobs.values(), key=lambda job: job.id, reverse=True)

    def get(self, name: object) -> Job:
        with self._lock:
            if not isinstance(name, str) or name not in self._jobs:
                raise UserError("there is no such job", str(name)[:80], "look at the list again")
            return self._jobs[name]

    def add(self, kind: str, name: str, arguments: list[str]) -> Job:
        """Queue `sdxl <arguments>`; it starts by itself when its lane is free."""
        with self._lock:
            waiting = [job for job in self._jobs.values() if job.state in {"queued", "running"}]
            if kind == "train" and any(job.kind == kind and job.name == name for job in waiting):
                raise UserError(f"'{name}' is in training or waits for it", "queue", "stop it first")
            job = Job(f"{time.time_ns():020}", kind, name, tuple(arguments), place=time.time())
            self._keep(job)
            self._forget()
        self.tick()
        return job

    def move(self, name: object, steps: int) -> None:
        """Let a waiting job change places with its neighbours."""
        with self._lock:
            job = self.get(name)
            line = self.waiting(job.lane)
            if job not in line:
                raise UserError("only what waits can be moved", job.name, "look at the queue again")
            at = line.index(job)
            other = line[min(max(at + steps, 0), len(line) - 1)]
            self._keep(replace(job, place=other.place))
            self._keep(replace(other, place=job.place))

    def waiting(self, lane: str) -> list[Job]:
        found = (job for job in self._jobs.values() if job.lane == lane and job.state == "queued")
        return sorted(found, key=lambda job: (job.place, job.id))

    def stop(self, name: object, at_once: bool = False) -> Job:
        """Ask a job to save and end; `at_once` ends it without. One that waits leaves the queue."""
        with self._lock:
            job = self.get(name)
            if job.state == "queued":
                self._keep(replace(job, state="stopped", ended=time.time()))
            elif job.state == "running" and (process := _alive(job)):
                with contextlib.suppress(psutil.NoSuchProcess):
                    for child in process.children(recursive=True) if at_once else ():
                        child.kill()
                    process.send_signal(signal.SIGKILL if at_once else signal.SIGTERM)
        self.tick()
        return self.get(name)

    def tick(self) -> None:
        """Note what has ended and start what may start."""
        with self._lock:
            for job in list(self._jobs.values()):
                if job.state == "running":
                    self._look_after(job)
            for lane in ("training", "tools"):
                busy = any(job.state == "running" and job.lane == lane for job in self._jobs.values())
                line = self.waiting(lane)
                if line and not busy:
                    self._start(line[0])

    def output(self, job: Job, limit: int = TAIL) -> str:
        """The last of what a job has said."""
        try:
            with (self.folder / f"{job.id}.log").open("rb") as file:
                file.seek(max(0, os.fstat(file.fileno()).st_size - limit))
                return file.read().decode("utf-8", errors="replace")
        except OSError:
            return ""

    def _start(self, job: Job) -> None:
        environment = {**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "120"}
        # The same code as the studio's own, whichever folder it is run in.
        found = [str(Path(sdxl_trainer.__file__).parent.parent), os.environ.get("PYTHONPATH", "")]
        environment["PYTHONPATH"] = os.pathsep.join(filter(None, found))
        with (self.folder / f"{job.id}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "sdxl_trainer", *job.arguments],
                cwd=self.cwd,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=environment,
                start_new_session=True,  # neither Ctrl-C in the studio's terminal nor its end reaches the training
            )
        self._children[job.id] = process
        born = psutil.Process(process.pid).create_time()
        self._keep(replace(job, state="running", pid=process.pid, born=born, started=time.time()))

    def _look_after(self, job: Job) -> None:
        child = self._children.get(job.id)
        if child is None:
            if _alive(job) is None:
                self._keep(replace(job, state=_told(self.output(job, 4000)), ended=time.time()))
            return
        code = child.poll()
        if code is not None:
            del self._children[job.id]
            state = "done" if code == 0 else "stopped" if code in STOPPED else "failed"
            self._keep(replace(job, state=state, code=code, ended=time.time()))

    def _keep(self, job: Job) -> None:
        self._jobs[job.id] = job
        files.write_json(self.folder / f"{job.id}.json", asdict(job))

    def _forget(self) -> None:
        """Remove the records of the oldest jobs that have ended."""
        ended = sorted(job.id for job in self._jobs.values() if job.state in ENDED)
        for name in ended[: max(0, len(self._jobs) - KEPT)]:
            del self._jobs[name]
            for suffix in (".json", ".log"):
                (self.folder / f"{name}{suffix}").unlink(missing_ok=True)


def _told(output: str) -> str:
    """How a command ended that nobody waited for, by its last words."""
    last = output.strip().rsplit("\n", 1)[-1]
    found = (state for start, state in WORDS.items() if last.startswith(start))
    return next(found, "lost")


def _alive(job: Job) -> psutil.Process | None:
    """The job's process; none if it has ended, or another process has its number now."""
    try:
        process = psutil.Process(job.pid)
        same = job.born is not None and abs(process.create_time() - job.born) < 1
        return process if same and process.status() != psutil.STATUS_ZOMBIE else None
    except (psutil.Error, ValueError):
        return None


def memory(job: Job) -> int:
    """Bytes of main memory that a running job holds, with what it has started; 0 if it does not run."""
    process = _alive(job) if job.state == "running" else None
    total = 0
    with contextlib.suppress(psutil.Error):
        for each in [process, *process.children(recursive=True)] if process else []:
            total += each.memory_info().rss
    return total


def as_json(job: Job) -> dict[str, Any]:
    """A job as the page shows it, with its command to copy."""
    import shlex

    command = shlex.join(["sdxl", *job.arguments])
    shown = ("id", "kind", "name", "state", "code", "started", "ended")
    return {**{name: getattr(job, name) for name in shown}, "lane": job.lane, "command": command}
