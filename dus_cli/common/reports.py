"""Helpers for the reports of all verbs."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dus_cli.errors import shown

# An absolute path, and a web address with its possible secrets (a password, a query with a
# signature); either may follow a held-out set's name and "=".
_PATH = re.compile(r"((?:\w[\w.-]*=)?)[/~]", re.ASCII)
_WEB = re.compile(
    r"((?:\w[\w.-]*=)?https?://)(?:[^/@\s]*@)?([^?\s]*)(?:\?\S*?)?(:[\d.]+)?", re.ASCII
)


def public(value: Any) -> Any:
    """JSON without what a release must not show: an absolute path is cut to its last name, a web
    address loses its query and password.

    >>> files = ["/data/*.jsonl:0.7", "more.txt"]
    >>> public({"model": "/home/me/models/out", "files": files, "steps": 3})
    {'model': 'out', 'files': ['*.jsonl:0.7', 'more.txt'], 'steps': 3}
    >>> public("code=/data/b.jsonl")
    'code=b.jsonl'
    >>> public("https://me:word@host/a.jsonl?key=1:0.5")
    'https://host/a.jsonl:0.5'
    """
    if isinstance(value, dict):
        return {key: public(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [public(inner) for inner in value]
    if isinstance(value, str) and (match := _PATH.match(value)):
        return match[1] + Path(value).name
    return public_address(value) if isinstance(value, str) else value


def public_address(text: str) -> str:
    """A web address without its query, which may hold a signature, and its password. Other text
    stays.

    >>> public_address("https://me:word@host/a.jsonl?key=1:0.5")
    'https://host/a.jsonl:0.5'
    >>> public_address("hf://datasets/org/name@main?split=train")
    'hf://datasets/org/name@main?split=train'
    """
    match = _WEB.fullmatch(text)
    return text if match is None else match[1] + match[2] + (match[3] or "")


# Raised when a field is removed or changes its meaning; new fields do not raise it.
SCHEMA = 1


def shown_address(text: str) -> str:
    """A source of data for a message."""
    return shown(public_address(text))


def table_lines(rows: list[tuple[str, str]]) -> list[str]:
    """Labels and values in two columns; further lines of a value are indented to the second."""
    return [f"{label:<13}{value}".replace("\n", "\n" + " " * 13) for label, value in rows]
