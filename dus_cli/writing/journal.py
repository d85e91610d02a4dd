"""What a streamed run has on the disk, written beside it: after a kill the same command goes on
from there.

A line of JSON for the plan's key, then one for each range of a base's shard whose bytes stand in
the output. A line is written once the output's files are synced, and is believed once it is whole.
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

NAME = ".dus-journal"  # in the staged folder; never published, and no part of SHA256SUMS

_NEW = f"{NAME}.new"

Range = tuple[int, int]


class Journal:
    """The ranges of the base's shards that need not be fetched again. Use as a context manager."""

    def __init__(self, folder: Path, key: str) -> None:
        """Read what is there for this key; anything else is no journal of ours, and is replaced.

        Raises:
            OutputError: it cannot be written.
        """
        self.path = folder / NAME
        self._ranges = {
            shard: _joined(ranges) for shard, ranges in (_read(self.path, key) or {}).items()
        }
        with writing(NAME, KEPT):
            # Written anew, for the last line of a killed run may be half a line; and put in its
            # place when it is whole.
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
        """Of the base, on the disk when the run began."""
        return sum(end - start for ranges in self._ranges.values() for start, end in ranges)

    def holds(self, shard: str, start: int, end: int) -> bool:
        """Whether the bytes from `start` to `end` of a shard were on the disk when the run
        began.
        """
        ranges = self._ranges.get(shard, [])
        at = bisect_right(ranges, (start, 2**64)) - 1
        return at >= 0 and ranges[at][0] <= start and end <= ranges[at][1]

    def add(self, shard: str, ranges: list[Range]) -> None:
        """Note ranges whose bytes are on the disk.

        Raises:
            OutputError: the disk failed.
        """
        with writing(NAME, KEPT):
            self._append(_line(shard=shard, ranges=ranges))

    def forget(self, shard: str) -> None:
        """Believe nothing of a shard any more.

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
    """Whether a streamed run works in a folder, or left it."""
    return (folder / NAME).exists()


def remove(folder: Path) -> None:
    """Remove a journal, if there is one: the output is whole and has no need of it."""
    with writing(NAME, KEPT):
        for name in (NAME, _NEW):
            (folder / name).unlink(missing_ok=True)


def belongs(folder: Path, key: str) -> bool:
    """Whether a staged folder was left by a streamed run of the plan with this key."""
    return _read(folder / NAME, key) is not None


def _line(**fields: Any) -> str:
    return json.dumps(fields) + "\n"


def _read(path: Path, key: str) -> dict[str, list[Range]] | None:
    """The ranges by shard; None where the journal is not there, or of another plan."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True)
        if not lines or json.loads(lines[0]).get("key") != key:
            return None
    except (OSError, ValueError, AttributeError):
        return None
    found: dict[str, list[Range]] = {}
    for line in lines[1:]:
        try:
            entry = json.loads(line)
            if entry["ranges"] is None:
                found.pop(entry["shard"], None)
            else:
                found.setdefault(entry["shard"], []).extend(
                    (int(start), int(end)) for start, end in entry["ranges"]
                )
        except (ValueError, KeyError, TypeError):
            break  # the line during which the run was killed
    return found


def _joined(ranges: list[Range]) -> list[Range]:
    """Sorted, neighbours made one.

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
