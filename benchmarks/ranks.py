"""Processes of one run on one machine, forked from this one: launched by plain environment variables, without the
half minute that importing everything takes a new process on a busy machine."""

import os
import socket
from collections.abc import Callable
from multiprocessing import get_context
from typing import Any


def start(function: Callable[..., Any], arguments: tuple[Any, ...], processes: int) -> list[Any]:
    """Start `function(*arguments)` in each of the processes of a run on the CPU; with one, outside of any group."""
    port = _free_port()
    context: Any = get_context("fork")
    started = []
    for rank in range(processes):
        process = context.Process(target=_begin, args=(function, arguments, rank, processes, port))
        process.start()
        started.append(process)
    return started


def finished(processes: list[Any]) -> list[int]:
    """Wait for all; gives their exit codes."""
    for process in processes:
        process.join()
    return [process.exitcode for process in processes]


def _begin(function: Callable[..., Any], arguments: tuple[Any, ...], rank: int, processes: int, port: int) -> None:
    os.environ["ACCELERATE_USE_CPU"] = "true"
    if processes > 1:
        group = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes}
        os.environ |= {name: str(value) for name, value in group.items()}
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "GLOO_SOCKET_IFNAME": "lo"}
    function(*arguments)


def _free_port() -> int:
    with socket.socket() as opened:
        opened.bind(("127.0.0.1", 0))
        return opened.getsockname()[1]
