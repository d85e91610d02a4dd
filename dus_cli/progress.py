"""What a verb tells while it works. The core knows no terminal: `terminal` implements this for people."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dus_cli.planning import UpscalePlan


class Progress(Protocol):
    """Told what happens while it happens; `advance` is called from several threads."""

    def planned(self, plan: UpscalePlan) -> None: ...

    def start(self, what: str, total: int) -> None: ...

    def advance(self, num_bytes: int) -> None: ...

    def note(self, text: str) -> None:
        """Something worth a line of its own."""


class NoProgress:
    """Says nothing."""

    def planned(self, plan: UpscalePlan) -> None:
        pass

    def start(self, what: str, total: int) -> None:
        pass

    def advance(self, num_bytes: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass
