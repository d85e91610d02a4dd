"""Threads that end when their work is done, failed or interrupted."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import NamedTuple

# Bytes that a worker holds at a time, whatever it does with them.
PIECE = 4 << 20


class Workers(NamedTuple):
    """A pool, and the flag that long tasks look at between two pieces of work."""

    pool: ThreadPoolExecutor
    stop: threading.Event


@contextmanager
def workers(jobs: int) -> Iterator[Workers]:
    """A pool of `jobs` threads. On leaving, also by Ctrl-C, waiting tasks are dropped and running ones told."""
    stop = threading.Event()
    pool = ThreadPoolExecutor(jobs)
    try:
        yield Workers(pool, stop)
    finally:
        stop.set()
        pool.shutdown(wait=True, cancel_futures=True)
