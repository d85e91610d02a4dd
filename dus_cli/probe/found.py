"""What a probe would measure, and what it measured."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from dus_cli.data.sources import Unread
from dus_cli.maps.starts import StartRule
from dus_cli.probe.budget import Memory
from dus_cli.probe.maps import Cost, MapCandidate
from dus_cli.probe.search import borne

if TYPE_CHECKING:
    from dus_cli.probe.distances import Distances


@dataclass(frozen=True)
class ProbeText:
    """The text that maps are measured on. `tokens` counts the predicted tokens; `before` are the
    ids with which a document begins.
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
    """A map and its loss in nats per token; None if `dus upscale` refuses the map.

    `seams` are the angular distance and block influence of each of its seams.
    """

    candidate: MapCandidate
    loss: float | None
    seams: tuple[tuple[float, float], ...] = ()

    @property
    def is_finite(self) -> bool:
        """Whether it was measured, and no hidden state left the range of the precision."""
        return self.loss is not None and math.isfinite(self.loss)


@dataclass(frozen=True)
class Doublings:
    """The loss with each layer of the base doubled alone, in nats per token; None if `dus upscale`
    refuses that map.

    A search doubles the layers that add at most `most` to the base's loss.
    """

    start: StartRule
    losses: tuple[float | None, ...]
    base_loss: float
    most: float

    @property
    def costs(self) -> tuple[float | None, ...]:
        """What doubling each layer adds to the base's loss; None if that is not a finite number."""
        return tuple(
            loss - self.base_loss if loss is not None and math.isfinite(loss) else None
            for loss in self.losses
        )

    @property
    def not_borne(self) -> tuple[int, ...]:
        """The layers that a search does not double, because that costs too much."""
        bears = borne(self.costs, self.most)
        return tuple(layer for layer in range(len(self.losses)) if layer not in bears)


@dataclass(frozen=True, kw_only=True)
class ProbePlan:
    """What a probe would measure, on which device, and what that takes. Nothing was measured yet.

    Attributes:
        model: the base as it was given; `name` is its name in titles and commands.
        candidates: the maps that were asked for; a search adds more.
        seq_length: tokens in a row.
        bound: a share above the base's loss, within which a map is recommended.
        layer_passes: calls of a layer for all rows, without those of a search.
        seconds: that planning took.
        engines: those that a recommended map must be right for.
        starts: those that each map is measured with; () is as copies, and not reported.
    """

    model: str
    name: str
    commit: str | None
    num_layers: int
    base_cost: Cost
    candidates: tuple[MapCandidate, ...]
    seq_length: int
    precision: str
    device: str
    streams: bool
    memory: Memory
    bound: float
    layer_passes: int
    seconds: float
    engines: tuple[str, ...] = ()
    starts: tuple[StartRule, ...] = ()


@dataclass(frozen=True, kw_only=True)
class Probe:
    """What a probe measured.

    Attributes:
        maps: the plan's candidates, then those of a search.
        within: the number in `maps` of the largest within the plan's bound; None if there is none.
        knee: the number in `maps` beyond which more trimming pays less; None if there is none.
        layer_passes: calls of a layer, for all rows.
        num_groups: groups of rows that went through the layers one after the other.
        seconds: from planning to the end.
        peak_bytes: the most memory that was taken; None where it cannot be told.
        doublings: of a search with starts, one for each of them.
    """

    plan: ProbePlan
    text: ProbeText
    base_loss: float
    maps: tuple[Measured, ...]
    distances: Distances
    within: int | None
    knee: int | None
    layer_passes: int
    num_groups: int
    seconds: float
    peak_bytes: int | None
    warnings: tuple[str, ...] = ()
    doublings: tuple[Doublings, ...] = ()
