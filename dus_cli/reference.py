"""`ModelRef`: a directory, or `org/name@revision` on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from dus_cli.errors import ModelNotFoundError, shown

_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:@(?P<revision>[\w./-]+))?", re.ASCII)


@dataclass(frozen=True)
class ModelRef:
    """Where a model is: exactly one of `path` and `repo_id` is set.

    `text` is what the user typed; reports and lineage repeat it.
    """

    text: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None

    @classmethod
    def parse(cls, text: str) -> ModelRef:
        """Tell a Hub id from a directory by its form alone, so that a pipeline means the same everywhere.

        `org/name` and `org/name@revision` are Hub ids, also where a directory of that name exists:
        write `./org/name` for the directory. Everything else is a directory.

        >>> ModelRef.parse("mistralai/Mistral-7B-v0.1@main").revision
        'main'
        >>> ModelRef.parse("./models/base").repo_id is None
        True

        Raises:
            ModelNotFoundError: the text is empty, or cannot be a path.
        """
        match = _HUB_ID.fullmatch(text)
        if match is not None:
            return cls(text, repo_id=match["repo"], revision=match["revision"])
        if not text or "\0" in text:
            raise ModelNotFoundError(f"MODEL is {shown(text)!r}; give a directory or a Hub id such as org/name")
        return cls(text, path=Path(text).expanduser())

    @property
    def name(self) -> str:
        """The model's own name, without owner or folders: Mistral-7B-v0.1."""
        if self.repo_id is not None:
            return self.repo_id.split("/")[1]
        assert self.path is not None
        return self.path.resolve().name

    def __str__(self) -> str:
        return self.text
