"""What the reports of all verbs share."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def public(value: Any) -> Any:
    """JSON as it goes into a release: of absolute paths the last name, for the rest is about the
    maker's machine.

    >>> files = ["/data/*.jsonl:0.7", "more.txt"]
    >>> public({"model": "/home/me/models/out", "files": files, "steps": 3})
    {'model': 'out', 'files': ['*.jsonl:0.7', 'more.txt'], 'steps': 3}
    """
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, str) and value.startswith(("/", "~")):
        return Path(value).name
    return value


# Raised when a field is removed or changes its meaning; new fields do not raise it.
SCHEMA = 1


def table_lines(rows: list[tuple[str, str]]) -> list[str]:
    """Labels in one column; further lines of a value are indented to the second."""
    return [f"{label:<13}{value}".replace("\n", "\n" + " " * 13) for label, value in rows]
