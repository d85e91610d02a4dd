"""What a probe tells while it works."""

from __future__ import annotations


class Listener:
    """Told of a stage with its number of layer passes, and of passes done. This one says nothing."""

    def start(self, what: str, total: int) -> None:
        pass

    def advance(self, count: int) -> None:
        pass
