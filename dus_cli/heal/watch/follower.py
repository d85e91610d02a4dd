"""metrics.jsonl, followed as it grows."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class MetricsFollower:
    """Reads a metrics.jsonl that another process writes.

    When workers start again they replace the file by one without the steps that are run again, and
    the finished model comes with its own copy. `starts_over` tells, after each poll, that its rows
    are all that a file holds: at the first look, or because the file was replaced. Whatever was
    made of earlier rows is void then.
    """

    def __init__(self, path: Path) -> None:
        self.starts_over = False
        self._path = path
        self._offset = 0
        self._file_id: tuple[int, int] | None = None
        self._is_first_poll = True

    def poll(self) -> list[dict[str, Any]]:
        """Rows that are new since the last time."""
        self.starts_over, self._is_first_poll = self._is_first_poll, False
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                file_id = (status.st_dev, status.st_ino)
                if self._file_id is not None and (
                    file_id != self._file_id or status.st_size < self._offset
                ):
                    self.starts_over, self._offset = True, 0
                self._file_id = file_id
                file.seek(self._offset)
                # what follows is half a row, so far
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []  # not there yet, or a file system that hiccups: nothing to end a run for
        self._offset += len(whole) + len(newline)
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows
