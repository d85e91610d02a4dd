"""Measure the losses of many maps in sweeps over the base's layers; `tree` says what is computed
once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor

from dus_cli.errors import ProbeError, ReplayError
from dus_cli.models.replay import Ready, Replay, Scaled
from dus_cli.probe.distances import Depths
from dus_cli.probe.tail import Tail, tail_of
from dus_cli.probe.tree import Node, Step, grow, sweeps


@dataclass(frozen=True)
class Batch:
    """Token ids and labels, both int64 (rows, length); a label of -100 is ignored."""

    ids: Tensor
    labels: Tensor

    def to(self, device: torch.device) -> Batch:
        return Batch(self.ids.to(device), self.labels.to(device))


@torch.no_grad()
def meter_of(
    model: object,
    num_layers: int,
    batches: Sequence[Batch],
    *,
    ready: Ready,
    batches_at_once: int,
    scaled: Scaled = lambda _layer, _factor: nullcontext(),
) -> Meter:
    """Make a meter for a model. The model runs once, on the first batch.

    Args:
        model: of transformers, in evaluation mode.
        num_layers: of its decoder.
        batches: all of one shape.
        ready: a context in which the numbered layer has its weights.
        batches_at_once: how many are taken through the layers together; memory grows with it.
        scaled: a context in which what the numbered layer adds to the stream is multiplied; it is
            not entered for maps that scale nothing.

    Raises:
        ProbeError: the model cannot be measured in parts.
    """
    try:
        replay = Replay(model, num_layers, batches[0].ids, ready)
    except ReplayError as error:
        raise ProbeError(
            f"dus probe cannot measure maps of {error}; write the models with dus upscale "
            "and measure those"
        ) from error
    tail = tail_of(replay, batches[0].ids, batches[0].labels)
    return Meter(replay, tail, batches, ready=ready, batches_at_once=batches_at_once, scaled=scaled)


class Meter:
    """Measures maps of one model. Arguments as of `meter_of`."""

    def __init__(
        self,
        replay: Replay,
        tail: Tail,
        batches: Sequence[Batch],
        *,
        ready: Ready,
        batches_at_once: int,
        scaled: Scaled,
    ) -> None:
        self._replay, self._tail, self._batches = replay, tail, batches
        self._num_layers = len(replay.layers)
        self._ready, self._at_once, self._scaled = ready, batches_at_once, scaled
        self._is_checked = False

    @property
    def num_groups(self) -> int:
        """The number of groups of batches, which go through the layers one after the other."""
        return -(-len(self._batches) // self._at_once)

    def losses(
        self,
        maps: Sequence[Sequence[Step]],
        depths: Depths | None = None,
        on_layer: Callable[[], object] = lambda: None,
    ) -> list[float]:
        """The sum of cross-entropy over all labelled tokens for each map, in nats.

        Args:
            maps: base layers in the order of each map, with their factors. The first is the base
                itself.
            depths: told the base's hidden states.
            on_layer: told after each layer of each map, or of several that share it.

        Raises:
            ProbeError: the base's layers, called one by one, do not give the base's loss.
        """
        totals = [0.0] * len(maps)
        with torch.no_grad():
            for start in range(0, len(self._batches), self._at_once):
                self._sweep(
                    maps, self._batches[start : start + self._at_once], totals, depths, on_layer
                )
        return totals

    def _sweep(
        self,
        maps: Sequence[Sequence[Step]],
        batches: Sequence[Batch],
        totals: list[float],
        depths: Depths | None,
        on_layer: Callable[[], object],
    ) -> None:
        root = grow(maps)
        of_base = _chain(root, self._num_layers)
        self._replay.take([batch.ids for batch in batches])
        states: dict[Node, list[Tensor | None]] = {root: self._replay.starts}
        if depths is not None:
            for start in self._replay.starts:
                assert start is not None
                depths.add(0, start)
        waiting = {root: len(root.children)}

        def call(node: Node) -> None:
            """Call one layer on all rows, for one map or for several that share it."""
            assert node.parent is not None
            waiting[node.parent] -= 1
            is_last = not waiting[node.parent]
            source = states.pop(node.parent) if is_last else states[node.parent]
            behind: list[Tensor | None] = []
            for index, batch in enumerate(batches):
                before = source[index]
                assert before is not None
                if is_last:
                    source[index] = None  # freed, for the layer's output to take its place
                hidden = self._replay.layer(node.layer, index, before)
                del before
                if depths is not None and node in of_base:
                    depths.add(of_base[node], hidden)
                if node.ends:
                    self._end(node, batch, hidden, totals)
                behind.append(hidden if node.children else None)
            if node.children:
                states[node], waiting[node] = behind, len(node.children)
            on_layer()

        for layer, nodes in sweeps(root, self._num_layers):
            with self._ready(layer):
                for factor, alike in groupby(nodes, key=lambda node: node.factor):
                    with nullcontext() if factor == 1 else self._scaled(layer, factor):
                        for node in alike:
                            call(node)

    def _end(self, node: Node, batch: Batch, hidden: Tensor, totals: list[float]) -> None:
        if 0 in node.ends and not self._is_checked:
            self._tail.check(hidden)
            self._is_checked = True
        loss = self._tail.loss(batch.ids, batch.labels, hidden)
        for number in node.ends:
            totals[number] += loss


def _chain(root: Node, num_layers: int) -> dict[Node, int]:
    """The nodes of the base's own map, each with the depth of its output."""
    found: dict[Node, int] = {}
    node = root
    for layer in range(num_layers):
        node = node.children[layer, 1.0]
        found[node] = layer + 1
    return found
