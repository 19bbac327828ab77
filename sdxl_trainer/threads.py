"""Threads of a process, and the memory that they share: work in order, and what becomes of freed memory."""

import ctypes
import os
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")

# Of glibc's mallopt: from which size on memory is asked of the system for itself (at most this), and how much freed
# memory is kept.
_MMAP_THRESHOLD, _LARGEST = -3, 32 << 20
_TRIM_THRESHOLD, _KEPT = -1, 1 << 30


def keep_freed_memory() -> bool:
    """Let the C library keep what a step frees for the next step, up to a gigabyte; gives whether it does. By itself
    glibc gives much of it back each time, and the system clears every page of it anew. Without glibc, or where the
    environment has settings of its own for it, nothing is changed."""
    mallopt = None if {"MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"} & {*os.environ} else _mallopt()
    return mallopt is not None and bool(mallopt(_MMAP_THRESHOLD, _LARGEST) and mallopt(_TRIM_THRESHOLD, _KEPT))


def _mallopt() -> Callable[[int, int], int] | None:
    try:
        return ctypes.CDLL(None).mallopt
    except (OSError, AttributeError, TypeError):  # macOS and musl have none, Windows has no CDLL(None)
        return None


def mapped(
    one: Callable[[int], T], numbers: Iterable[int], ahead: int = 32, threads: int | None = None
) -> Iterator[tuple[int, T]]:
    """(number, one(number)) in order, computed by threads with no more than `ahead` in work or waiting. `threads`: how
    many, for what waits more than it computes."""
    with ThreadPoolExecutor(threads) as pool:
        waiting = iter(numbers)
        queue = [(n, pool.submit(one, n)) for n in islice(waiting, ahead)]
        while queue:
            number, future = queue.pop(0)
            yield number, future.result()
            queue += [(n, pool.submit(one, n)) for n in islice(waiting, 1)]
