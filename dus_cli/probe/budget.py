"""Estimate memory before anything is loaded, and how many rows go through the layers together.
Pure.
"""

from __future__ import annotations

from dataclasses import dataclass

from dus_cli.common.units import human_bytes
from dus_cli.errors import ProbeError
from dus_cli.maps.layers import split_name
from dus_cli.maps.stacks import LayerStack
from dus_cli.source.checkpoint import Checkpoint

# What Python takes with torch and transformers, before any weight is loaded.
_LIBRARIES = 500_000_000


@dataclass(frozen=True)
class Memory:
    """Bytes by purpose. `states` are hidden states of the rows that go through the layers together.

    Rows that do not fit go later, in `num_groups` groups.
    """

    weights: int
    states: int
    others: int
    batches_at_once: int
    num_groups: int

    @property
    def total(self) -> int:
        return self.weights + self.states + self.others


def weight_bytes(checkpoint: Checkpoint, stack: LayerStack, itemsize: int, *, streams: bool) -> int:
    """Bytes of weights held at a time: all of them, or with streaming the largest layer and
    everything that belongs to no layer.
    """
    layers = [0] * stack.num_layers
    rest = 0
    for _, tensor in checkpoint.tensors():
        split = split_name(tensor.name)
        if split is not None and split.prefix == stack.prefix and split.index < stack.num_layers:
            layers[split.index] += tensor.num_elements * itemsize
        else:
            rest += tensor.num_elements * itemsize
    # A layer is read as it is stored and then cast, so two copies may exist.
    return rest + (2 * max(layers) if streams else sum(layers))


def plan_memory(
    weights: int,
    most_states: int,
    batch_bytes: int,
    num_batches: int,
    others: int,
    available: int,
    *,
    streams: bool,
) -> Memory:
    """Choose how many batches go through the layers together: as many as fit.

    Args:
        weights: bytes of weights held at a time.
        most_states: hidden states of each batch that are held at a time.
        batch_bytes: of one hidden state of one batch.
        num_batches: all there are.
        others: bytes for a batch's own work, the head's logits, distances.
        available: bytes that may be used.
        streams: whether layers are read one at a time.

    Raises:
        ProbeError: not even one batch fits.
    """
    others += _LIBRARIES
    each = (most_states + 1) * batch_bytes
    room = available - weights - others
    if room < each:
        way_out = (
            "a smaller --seq-length, or a larger machine"
            if streams
            else "--stream-layers, or a larger machine"
        )
        raise ProbeError(
            f"this takes {human_bytes(weights + others + each)} of memory ({human_bytes(weights)} "
            f"of weights) and {human_bytes(max(0, available))} may be used; try {way_out}, or "
            "--max-memory if you know better"
        )
    at_once = min(num_batches, room // each)
    return Memory(weights, at_once * each, others, at_once, -(-num_batches // at_once))
