"""Work shared among threads, with its results in order."""

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from typing import TypeVar

T = TypeVar("T")


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
