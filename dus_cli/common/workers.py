"""Threads that end when their work is done, failed or interrupted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Bytes that a worker holds at a time, whatever it does with them.
PIECE = 4 << 20


class Workers(NamedTuple):
    """A pool, and the flag that long tasks look at between two pieces of work."""

    pool: ThreadPoolExecutor
    stop: threading.Event


@contextmanager
def workers(jobs: int) -> Iterator[Workers]:
    """A pool of `jobs` threads. On leaving, also by Ctrl-C, waiting tasks are dropped and
    running ones told.
    """
    stop = threading.Event()
    pool = ThreadPoolExecutor(jobs)
    try:
        yield Workers(pool, stop)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)


def ahead(
    pool: ThreadPoolExecutor,
    function: Callable[[_Item], _Result],
    items: Iterable[_Item],
    window: int = 32,
) -> Iterator[_Result]:
    """Like `pool.map`, but at most `window` results wait for whoever takes them: memory does not
    grow with the items.

    Raises:
        Exception: the function's, at the result's turn.
    """
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
