"""Runs on several processes, forked from a server that has imported everything already."""

import os
import socket
import sys
import time
from collections.abc import Callable
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch

from sdxl_trainer.configfile import dumps

MODULES = ["sdxl_trainer.train", "sdxl_trainer.configfile", "diffusers.models.unets.unet_2d_condition", "accelerate"]


def written(config: Any) -> Path:
    """The config as a file beside its output folder."""
    path = Path(config.output_dir).with_suffix(".toml")
    path.write_text(dumps(config), encoding="utf-8")
    return path


def start(path: Path, processes: int, target: Callable[..., None] | None = None) -> list[Any]:
    """A run on that many processes, told of each other by plain environment variables. What they say on stderr is in
    files beside the config: <name>.<rank>.said."""
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        port = opened.getsockname()[1]
    each = target or rank
    started = [_context().Process(target=each, args=(str(path), n, processes, port)) for n in range(processes)]
    for process in started:
        process.start()
    return started


def launch(path: Path, processes: int, target: Callable[..., None] | None = None) -> list[int]:
    """The same, waited for: the exit codes."""
    return finished(start(path, processes, target))


def agent(path: Path, processes: int, restarts: int) -> Any:
    """What `torchrun --nproc-per-node PROCESSES --max-restarts RESTARTS` does, in a process of its own."""
    process = _context().Process(target=_agent, args=(str(path), processes, restarts))
    process.start()
    return process


def finished(started: list[Any]) -> list[int]:
    for process in started:
        process.join()
    return [process.exitcode for process in started]


def said(path: Path, number: int) -> str:
    return path.with_suffix(f".{number}.said").read_text(encoding="utf-8")


def until(condition: Callable[[], Any], process: Any, seconds: float = 120.0) -> None:
    """Wait for it, while the process lives."""
    limit = time.monotonic() + seconds
    while process.is_alive() and not condition():
        assert time.monotonic() < limit, "the run did not get there"
        time.sleep(0.002)


def rank(path: str, number: int, processes: int, port: int) -> None:
    if processes > 1:
        group = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": processes, "MASTER_PORT": port}
        os.environ |= {name: str(value) for name, value in group.items()} | {"MASTER_ADDR": "127.0.0.1"}
    _train(path, number)


def _train(path: str, number: int) -> None:
    torch.set_num_threads(1)
    os.environ["ACCELERATE_USE_CPU"] = "true"
    descriptor = os.open(Path(path).with_suffix(f".{number}.said"), os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(descriptor, 2)
    from sdxl_trainer.cli import guarded
    from sdxl_trainer.configfile import load
    from sdxl_trainer.train import train

    sys.exit(guarded(lambda: train(load(Path(path)))))


def worker(path: str) -> None:
    """One of an agent's processes, which leaves its id for the test: <name>.<rank>.pid."""
    number = int(os.environ["RANK"])
    Path(path).with_suffix(f".{number}.pid").write_text(str(os.getpid()), encoding="ascii")
    _train(path, number)


def _agent(path: str, processes: int, restarts: int) -> None:
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    options = LaunchConfig(
        1, 1, processes, rdzv_backend="c10d", rdzv_endpoint="127.0.0.1:0", max_restarts=restarts,
        monitor_interval=0.1, start_method="fork",
    )  # fmt: skip
    elastic_launch(options, worker)(path)


def _context() -> Any:
    context = get_context("forkserver")
    context.set_forkserver_preload(MODULES)
    return context
