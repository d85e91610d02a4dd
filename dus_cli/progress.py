"""What a verb tells while it works. The core knows no terminal: `terminal` and `events`
implement this.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from enum import Enum
from typing import Protocol


class ProgressMode(str, Enum):
    """How `--progress` shows it on stderr: a bar, lines for logs, JSON Lines, or not at all."""

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
    """A model as it was asked for, `text`: a path or a Hub id."""

    @property
    def text(self) -> str: ...


class PlannedBase(Protocol):
    """The base of a plan. `commit` is None for a local directory."""

    @property
    def ref(self) -> Named: ...

    @property
    def commit(self) -> str | None: ...


class PlannedUpscale(Protocol):
    """What a view may read of an upscale's plan before the first byte is written."""

    @property
    def base(self) -> PlannedBase: ...

    @property
    def layer_map(self) -> PlannedLayers: ...

    @property
    def num_data_bytes(self) -> int: ...


class Progress(Protocol):
    """Told what happens while it happens; `advance` is called from several threads.

    A stage runs from its `start` to the next one's, or to the end. `total` and what `advance` adds
    are counted in `unit`: bytes where bytes move, else a plural such as "tokens"; `total` is None
    where it is not known. `is_live`: it draws on a terminal, where huggingface_hub may draw its own
    bars too.
    """

    @property
    def is_live(self) -> bool: ...

    def planned(self, plan: PlannedUpscale) -> None: ...

    def start(self, what: str, total: int | None, unit: str = "bytes") -> None: ...

    def advance(self, amount: int) -> None: ...

    def note(self, text: str) -> None:
        """Something worth a line of its own, such as a retry."""

    def rest(self) -> None:
        """The stage is over, and another program draws: nothing is until the next `start`."""


class NoProgress:
    """Says nothing."""

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
    """How far a stage is. Its rate is the mean since its start."""

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
        """Seconds left at this rate; None before the first step, and where the total is not
        known.
        """
        rate = self.per_second
        return None if rate is None or self.total is None else max(0, self.total - self.done) / rate
