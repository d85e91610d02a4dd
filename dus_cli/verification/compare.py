"""Tensors of two files compared byte by byte."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from dus_cli.common.workers import workers
from dus_cli.errors import CheckpointError, shown
from dus_cli.planning.treatment import Making, made_pieces
from dus_cli.source.headers import TensorInfo
from dus_cli.source.reading import open_regular


class Place(NamedTuple):
    """Where a tensor's bytes lie."""

    path: Path
    tensor: TensorInfo


class Comparison(NamedTuple):
    """A place, and one from which its bytes come: they must be the same, or what `making` makes of them.

    `dtype` is the left one's where it is not the right one's.
    """

    left: Place
    right: Place
    right_name: str
    making: Making = Making.copied
    dtype: str | None = None


def compare(pairs: Iterable[Comparison], jobs: int, on_bytes: Callable[[int], object]) -> Iterator[str]:
    """Compare places byte by byte; yields one line for each pair that differs. Memory does not grow."""
    with workers(jobs) as (pool, stop):
        for problem in pool.map(lambda pair: _difference(pair, on_bytes, stop), pairs):
            if problem is not None:
                yield problem


def _difference(pair: Comparison, on_bytes: Callable[[int], object], stop: threading.Event) -> str | None:
    left, right = pair.left.tensor, pair.right.tensor
    name = shown(left.name)
    dtype = pair.dtype or right.dtype
    if (left.dtype, left.shape) != (dtype, right.shape):
        return f"tensor {name} is {left.dtype} {list(left.shape)}, {pair.right_name} {dtype} {list(right.shape)}"
    try:
        with open_regular(pair.left.path, 0) as left_file, open_regular(pair.right.path, 0) as right_file:
            position = 0
            for theirs in made_pieces(right_file.fileno(), right, pair.making, dtype):
                if stop.is_set():
                    return None
                ours = os.pread(left_file.fileno(), len(theirs), left.start + position)
                if ours != theirs:
                    at = next((i for i, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
                    return f"tensor {name} differs from {pair.right_name} at byte {position + at}"
                position += len(theirs)
                on_bytes(len(theirs))
            if position != left.num_bytes:
                return f"tensor {name} differs from {pair.right_name} at byte {position}: the file became shorter"
    except OSError as error:
        return f"tensor {name} cannot be read: {error.strerror or error}"
    except CheckpointError as error:
        return str(error)
    return None
