"""Read metrics.jsonl while it grows."""

from __future__ import annotations

import contextlib
import json
import os
from pathlib import Path
from typing import Any


class MetricsFollower:
    """Reads a metrics.jsonl that another process writes.

    Restarted workers replace the file by one without the rows of steps that run again, and the
    finished model comes with its own copy. After each poll, `starts_over` says whether the rows
    are all rows of the file, because it is the first poll or the file was replaced; results from
    earlier rows must then be dropped.
    """

    def __init__(self, path: Path) -> None:
        self.starts_over = False
        self._path = path
        self._offset = 0
        self._file_id: tuple[int, int] | None = None
        self._is_first_poll = True

    def poll(self) -> list[dict[str, Any]]:
        """The rows that were added since the last poll."""
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
                # what follows the last newline is an incomplete row
                whole, newline, _ = file.read().rpartition(b"\n")
        except OSError:
            return []  # the file is not there yet, or the file system fails for a moment
        self._offset += len(whole) + len(newline)
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows
