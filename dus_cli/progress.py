"""Progress of a verb. The verbs report to these protocols; `console/terminal.py` and
`console/events.py` implement them.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class ProgressMode(str, Enum):
    """What `--progress` shows on stderr: a bar or lines, lines for logs, JSON Lines, or nothing."""

    auto = "auto"
    plain = "plain"
    json = "json"
    none = "none"


class PlannedLayers(Protocol):
    """The layer map of a plan; its text is in the grammar of `--layers`."""

    @property
    def num_base_layers(self) -> int: ...

    def __len__(self) -> int: ...


class Named(Protocol):
    """A model as the user typed it: `text` is a path or a Hub id."""

    @property
    def text(self) -> str: ...


class PlannedBase(Protocol):
    """The base of a plan. `commit` is None for a local directory."""

    @property
    def ref(self) -> Named: ...

    @property
    def commit(self) -> str | None: ...


class PlannedUpscale(Protocol):
    """The part of an upscale's plan that a view shows before the first byte is written."""

    @property
    def base(self) -> PlannedBase: ...

    @property
    def layer_map(self) -> PlannedLayers: ...

    @property
    def num_data_bytes(self) -> int: ...


class Progress(Protocol):
    """Receives the progress of a verb; `advance` is called from several threads.

    A stage runs from its `start` to the next one's, or to the end. `total` and the amounts of
    `advance` are counted in `unit`, a plural such as "bytes" or "tokens"; `total` is None if it is
    not known. If `is_live`, it draws on a terminal, and huggingface_hub may draw its bars there
    too.
    """

    @property
    def is_live(self) -> bool: ...

    def planned(self, plan: PlannedUpscale) -> None: ...

    def start(self, what: str, total: int | None, unit: str = "bytes") -> None: ...

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None:
        """Show a line of text, such as a retry."""

    def rest(self) -> None:
        """End the stage; draw nothing until the next `start`, because another program draws."""


class NoProgress:
    """Shows nothing."""

    is_live = False

    def planned(self, plan: PlannedUpscale) -> None:
        pass

    def start(self, what: str, total: int | None, unit: str = "bytes") -> None:
        pass

    def advance(self, amount: int) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def rest(self) -> None:
        pass


@dataclass
class Stage:
    """How far a stage has come. Its rate is the mean since its start."""

    name: str
    total: int | None
    unit: str = "bytes"
    done: int = 0
    began: float = field(init=False)

    def __post_init__(self) -> None:
        self.began = time.monotonic()

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.began

    @property
    def per_second(self) -> float | None:
        return self.done / self.seconds if self.done and self.seconds else None

    @property
    def eta_seconds(self) -> float | None:
        """Seconds left at this rate; None before the first step, or if the total is not known."""
        rate = self.per_second
        return None if rate is None or self.total is None else max(0, self.total - self.done) / rate
