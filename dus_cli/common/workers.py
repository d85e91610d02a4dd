"""Thread pools that end when their work is done, fails or is interrupted."""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple, TypeVar

_Item = TypeVar("_Item")
_Result = TypeVar("_Result")

# Bytes that a worker holds at a time.
PIECE = 4 << 20


class Workers(NamedTuple):
    """A pool, and the event that long tasks check between two pieces."""

    pool: ThreadPoolExecutor
    stop: threading.Event


@contextmanager
def workers(jobs: int) -> Iterator[Workers]:
    """A pool of `jobs` threads. On exit, also by Ctrl-C, waiting tasks are cancelled and `stop` is
    set for running ones.
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
    """Like `pool.map`, but at most `window` results are pending, so that memory does not grow with
    the number of items.

    Raises:
        Exception: what the function raised, when its result is due.
    """
    waiting: deque[Future[_Result]] = deque()
    for item in items:
        waiting.append(pool.submit(function, item))
        if len(waiting) >= window:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()
