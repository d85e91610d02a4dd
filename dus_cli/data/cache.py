"""A folder of streams that several runs share (`--token-cache`), and the bound of its size.

In each stream's folder, `.used` is locked by every run that reads it, and its time is that of the
last of them. Only streams are counted and removed; evaluation data are counted, too.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from dus_cli.common.files import writing
from dus_cli.common.units import human_bytes
from dus_cli.data.segments import PREFIX, is_of_a_segment
from dus_cli.errors import DataError, shown
from dus_cli.writing.replacing import remove_claimed
from dus_cli.writing.staging import MARK

_USED = ".used"


@contextmanager
def in_use(folder: Path, keys: Sequence[str]) -> Iterator[None]:
    """Mark streams as used by this process, so that no other run removes them."""
    locks = []
    try:
        for key in keys:
            with writing(_USED):
                locks.append(os.open(folder / key / _USED, os.O_RDWR | os.O_CREAT, 0o666))
                os.utime(locks[-1])
            with contextlib.suppress(OSError):  # a file system without locks
                fcntl.flock(locks[-1], fcntl.LOCK_SH)
        yield
    finally:
        for lock in locks:
            os.close(lock)


def make_room(folder: Path, keys: Sequence[str], limit: int, *, num_bytes: int = 0) -> None:
    """Remove streams that no run uses, the least recently used first, until a run's streams fit.

    Args:
        folder: the cache.
        keys: the run's streams.
        limit: of the whole folder, in bytes.
        num_bytes: what the run's streams will take, if that is more than they do.

    Raises:
        DataError: they do not fit.
    """
    own = sum(_size(folder / key) for key in keys)
    excess = _size(folder) + max(0, num_bytes - own) - limit
    others = [path for path in folder.glob(f"{PREFIX}*") if path.name not in keys]
    for path in sorted(others, key=_last_used):
        if excess <= 0:
            return
        excess -= _removed(path)
    if excess > 0:
        raise DataError(
            f"the tokens of this run, with what other runs use in {shown(folder)}, take "
            f"{human_bytes(excess)} more than --token-cache-size; raise it, lower --tokens, or "
            "choose another folder"
        )


def _size(folder: Path) -> int:
    """The bytes of the files below a folder."""
    size = 0
    for root, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):  # another process has just removed it
                size += (Path(root) / name).lstat().st_size
    return size


def _last_used(stream: Path) -> float:
    with contextlib.suppress(OSError):
        return (stream / _USED).stat().st_mtime
    return 0.0


def _removed(stream: Path) -> int:
    """Remove a stream that no run uses; return the bytes that are free then."""
    size = _size(stream)
    with contextlib.suppress(OSError):
        lock = os.open(stream / _USED, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            remove_claimed(stream, _is_of_a_stream)
        finally:
            os.close(lock)
    return size - _size(stream)


def _is_of_a_stream(relative: str) -> bool:
    match = re.fullmatch(r"(?:\d{6,}|\.\d{6,}\.partial)/(.+)", relative, re.DOTALL)
    if match is None:
        return relative in (_USED, ".lock")
    return match[1] == MARK or is_of_a_segment(match[1])
