"""metrics.jsonl: one line for each step; no step occurs twice, even if workers are killed."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any


class MetricsFile:
    """The file, opened for appending. Rows of steps after `last_step` are removed, because these
    steps run again.
    """

    def __init__(self, path: Path, last_step: int) -> None:
        kept = [json.dumps(row) for row in read_metrics(path) if row["step"] <= last_step]
        partial = path.with_suffix(".jsonl.partial")
        partial.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
        partial.replace(path)
        self._file = path.open("a", encoding="utf-8")

    def write(self, row: dict[str, Any]) -> None:
        """Append a row and flush it for readers. NaN and infinity become null, as JSON needs."""
        self._file.write(json.dumps(_finite(row)) + "\n")
        self._file.flush()

    def close(self) -> None:
        self._file.close()


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl, without a truncated last line."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
