"""What a probe found."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dus_cli.data.sources import Unread
from dus_cli.maps.starts import StartRule
from dus_cli.probe.budget import Memory
from dus_cli.probe.maps import Candidate, Cost
from dus_cli.probe.search import borne

if TYPE_CHECKING:
    from dus_cli.probe.distances import Distances


@dataclass(frozen=True)
class Text:
    """What is measured on: `tokens` are those that are predicted, `before` the ids that a
    document begins with.
    """

    files: tuple[str, ...]
    tokens: int
    documents: int
    num_bytes: int
    skipped: dict[str, int]
    before: tuple[int, ...] = ()
    unread: Unread = field(default_factory=Unread)


@dataclass(frozen=True)
class Measured:
    """A map and its loss in nats per token; None where it was refused, or not measured (a dry run).

    `seams` are the angular distance and block influence of each of its seams; () in a dry run.
    """

    candidate: Candidate
    loss: float | None
    seams: tuple[tuple[float, float], ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether it was measured, and its hidden states stayed within what the precision can
        say.
        """
        return self.loss is not None and math.isfinite(self.loss)


@dataclass(frozen=True)
class Doublings:
    """The loss with each layer of the base doubled alone, in nats per token; None where it was
    refused.

    `most` is what a layer may add to the base's loss so that a search doubles it.
    """

    start: StartRule
    losses: tuple[float | None, ...]
    base_loss: float
    most: float

    @property
    def costs(self) -> tuple[float | None, ...]:
        """What doubling each layer adds to the base's loss; None where that is no number."""
        return tuple(
            loss - self.base_loss if loss is not None and math.isfinite(loss) else None
            for loss in self.losses
        )

    @property
    def not_borne(self) -> tuple[int, ...]:
        """The layers that do not bear to be doubled."""
        bears = borne(self.costs, self.most)
        return tuple(layer for layer in range(len(self.losses)) if layer not in bears)


@dataclass(frozen=True)
class Probe:
    """What was found. `within` and `knee` are numbers of `maps`. `distances` are None in a dry run.

    `engines` are those that what is recommended must be right for, `starts` those that were asked
    for, and `doublings` are there for each of them where a search was.
    """

    model: str
    name: str
    commit: str | None
    num_layers: int
    base_cost: Cost
    base_loss: float | None
    maps: tuple[Measured, ...]
    text: Text | None
    seq_length: int
    precision: str
    device: str
    streams: bool
    memory: Memory
    distances: Distances | None
    bound: float
    within: int | None
    knee: int | None
    layer_passes: int
    seconds: float
    peak_bytes: int | None
    warnings: tuple[str, ...] = ()
    engines: tuple[str, ...] = ()
    starts: tuple[StartRule, ...] = ()
    doublings: tuple[Doublings, ...] = ()

    @property
    def is_dry_run(self) -> bool:
        return self.base_loss is None
