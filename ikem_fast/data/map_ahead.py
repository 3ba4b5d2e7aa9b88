"""Work of threads in the order it was given, a few tasks ahead of the one that is waited for."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from ikem_fast.hardware import usable_cores

Item = TypeVar("Item")
Result = TypeVar("Result")

_TASKS_PER_WORKER = 4


def default_workers() -> int:
    """As many threads as there are CPUs for this process."""
    return usable_cores()


def map_ahead(function: Callable[[Item], Result], items: Iterable[Item], workers: int) -> Iterator[Result]:
    """``function(item)`` of every item in order, by threads that are at most a few items per thread ahead."""
    with ThreadPoolExecutor(workers) as executor:
        futures: deque[Future[Result]] = deque()
        try:
            for item in items:
                futures.append(executor.submit(function, item))
                if len(futures) >= workers * _TASKS_PER_WORKER:
                    yield futures.popleft().result()
            while futures:
                yield futures.popleft().result()
        finally:
            executor.shutdown(cancel_futures=True)
