"""A search over starts in rounds: first each layer doubled alone, then maps with blocks of several
widths, then several depths of the best width.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING

from dus_cli.maps.starts import COPY, StartRule
from dus_cli.planning.plan import MapRequest
from dus_cli.probe import search
from dus_cli.probe.found import Doublings, Measured
from dus_cli.probe.maps import MapCandidate, nearest, started
from dus_cli.probe.options import ProbeOptions

if TYPE_CHECKING:
    from dus_cli.probe.distances import Distances

# The base's loss, and one for each map that was not refused.
Losses = Callable[[Sequence[MapCandidate]], list[float]]
Check = Callable[[MapRequest], MapCandidate]


class Rounds:
    """The searches, one for each start.

    Args:
        options: of the verb.
        num_layers: of the base.
        check: a map as `dus upscale` sees it.
        losses: measures maps together.
    """

    def __init__(
        self, options: ProbeOptions, num_layers: int, check: Check, losses: Losses
    ) -> None:
        self._options, self._num_layers = options, num_layers
        self._check, self._losses = check, losses

    def doublings(self, starts: Sequence[StartRule]) -> list[Doublings]:
        """Measure every layer doubled alone, with each start; equal maps are measured once."""
        singles = [
            search.request_of((range(layer, layer + 1),), self._num_layers)
            for layer in range(self._num_layers)
        ]
        asked = [self._as_asked(single, start) for start in starts for single in singles]
        base_loss, measured = self._measured(asked)
        losses = iter([each.loss for each in measured])
        most = self._options.within * base_loss
        return [
            Doublings(start, tuple(islice(losses, self._num_layers)), base_loss, most)
            for start in starts
        ]

    def maps(self, doublings: Doublings, distances: Distances) -> list[Measured]:
        """Search from there; the maps in the order in which they were measured."""
        start, limit = doublings.start, doublings.base_loss + doublings.most
        found: list[Measured] = []
        if start == COPY:  # where nothing is scaled, the nearest layers meet best
            near = nearest(distances.angular, self._options.best)
            requests = [MapRequest(layers=str(layer_map)) for layer_map in near]
            found += self._measured([self._as_asked(each, start) for each in requests])[1]
        families = search.families(doublings.costs, doublings.most)
        if not families:
            return found
        known: list[dict[int, float]] = []
        for family in families:
            numbers = search.first_round(family)
            known.append({})
            found += self._round(start, family, numbers, known[-1])
        best = max(
            range(len(families)),
            key=lambda number: search.reach(
                families[number], known[number], doublings.base_loss, limit
            ),
        )
        while numbers := search.next_round(known[best], limit, self._options.best):
            found += self._round(start, families[best], numbers, known[best])
        return found

    def _round(
        self,
        start: StartRule,
        family: search.Family,
        numbers: Sequence[int],
        known: dict[int, float],
    ) -> list[Measured]:
        """Measure some of a family's maps, and add their losses to `known`; a refused map has an
        infinite loss.
        """
        _, measured = self._measure(start, [family[number] for number in numbers])
        for number, each in zip(numbers, measured, strict=True):
            known[number] = float("inf") if each.loss is None or not each.is_finite else each.loss
        return measured

    def _measure(
        self, start: StartRule, maps: Sequence[search.Doubled]
    ) -> tuple[float, list[Measured]]:
        requests = [search.request_of(doubled, self._num_layers) for doubled in maps]
        return self._measured([self._as_asked(request, start) for request in requests])

    def _as_asked(self, request: MapRequest, start: StartRule) -> MapCandidate:
        return self._check(started(replace(request, assume=self._options.assume), start))

    def _measured(self, candidates: Sequence[MapCandidate]) -> tuple[float, list[Measured]]:
        """Measure these maps: the base's loss, and each map with its own."""
        base_loss, *losses = self._losses(candidates)
        values = iter(losses)
        return base_loss, [
            Measured(each, None if each.refused else next(values)) for each in candidates
        ]
