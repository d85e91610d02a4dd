"""The journal of a streamed run: which bytes are on the disk, so that the same command can continue
after a kill.

The first line of JSON has the plan's key; each later one has ranges of a base's shard whose bytes
are in the output. A line is written after the output's files are synced; an incomplete line is
ignored.
"""

from __future__ import annotations

import json
import os
from bisect import bisect_right
from pathlib import Path
from typing import Any

from dus_cli.common.files import writing
from dus_cli.common.storage import sync
from dus_cli.writing.outputs import KEPT

NAME = ".dus-journal"  # in the staged folder; it is not published, and not in SHA256SUMS

_NEW = f"{NAME}.new"

Range = tuple[int, int]


class Journal:
    """The ranges of the base's shards that need not be fetched again. Use as a context manager."""

    def __init__(self, folder: Path, key: str) -> None:
        """Read the journal in a folder; one of another key is replaced.

        Raises:
            OutputError: it cannot be written.
        """
        self.path = folder / NAME
        self._ranges = {
            shard: _joined(ranges) for shard, ranges in (_read(self.path, key) or {}).items()
        }
        with writing(NAME, KEPT):
            # Write a new journal, because the last line of a killed run may be incomplete, and
            # rename it once it is whole.
            new = folder / _NEW
            self._file = os.open(new, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o666)
            lines = [_line(key=key)]
            lines += [_line(shard=shard, ranges=ranges) for shard, ranges in self._ranges.items()]
            self._append("".join(lines))
            new.replace(self.path)

    def __enter__(self) -> Journal:  # noqa: PYI034  (Self is not in Python 3.10)
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self._file)

    @property
    def num_bytes(self) -> int:
        """Bytes of the base that were on the disk when the run began."""
        return sum(end - start for ranges in self._ranges.values() for start, end in ranges)

    def holds(self, shard: str, start: int, end: int) -> bool:
        """Whether the bytes from `start` to `end` of a shard were on the disk when the run
        began.
        """
        ranges = self._ranges.get(shard, [])
        at = bisect_right(ranges, (start, 2**64)) - 1
        return at >= 0 and ranges[at][0] <= start and end <= ranges[at][1]

    def add(self, shard: str, ranges: list[Range]) -> None:
        """Record ranges whose bytes are on the disk.

        Raises:
            OutputError: the disk failed.
        """
        with writing(NAME, KEPT):
            self._append(_line(shard=shard, ranges=ranges))

    def forget(self, shard: str) -> None:
        """Drop all ranges of a shard.

        Raises:
            OutputError: the disk failed.
        """
        with writing(NAME, KEPT):
            self._append(_line(shard=shard, ranges=None))

    def _append(self, text: str) -> None:
        raw = text.encode()
        while raw:
            raw = raw[os.write(self._file, raw) :]
        sync(self._file)


def is_in(folder: Path) -> bool:
    """Whether a streamed run works in a folder, or has left it."""
    return (folder / NAME).exists()


def remove(folder: Path) -> None:
    """Remove the journal of a finished output, if there is one."""
    with writing(NAME, KEPT):
        for name in (NAME, _NEW):
            (folder / name).unlink(missing_ok=True)


def belongs(folder: Path, key: str) -> bool:
    """Whether a staged folder was left by a streamed run of the plan with this key."""
    return _read(folder / NAME, key) is not None


def _line(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def _read(path: Path, key: str) -> dict[str, list[Range]] | None:
    """The ranges by shard; None if there is no journal, or it is of another plan."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if not lines or json.loads(lines[0]).get("key") != key:
            return None
    except (OSError, ValueError, AttributeError):
        return None
    ranges: dict[str, list[Range]] = {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            if entry["ranges"] is None:
                ranges.pop(entry["shard"], None)
            else:
                ranges.setdefault(entry["shard"], []).extend(
                    (int(start), int(end)) for start, end in entry["ranges"]
                )
        except (ValueError, KeyError, TypeError):
            break  # the run was killed while it wrote this line
    return ranges


def _joined(ranges: list[Range]) -> list[Range]:
    """Sort ranges, and join adjacent ones.

    >>> _joined([(4, 8), (0, 4), (9, 10)])
    [(0, 8), (9, 10)]
    """
    joined: list[Range] = []
    for start, end in sorted(ranges):
        if joined and start <= joined[-1][1]:
            joined[-1] = (joined[-1][0], max(end, joined[-1][1]))
        else:
            joined.append((start, end))
    return joined
