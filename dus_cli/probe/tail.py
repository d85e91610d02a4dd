"""From the last layer's hidden states to the loss: the model's own norm and head, without full
logits.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dus_cli.data.streams import IGNORED
from dus_cli.errors import ProbeError
from dus_cli.models.losses import cross_entropy, head_of
from dus_cli.models.replay import Replay, damaged

# The most by which two orders of the same sums may differ in a loss, in fp32 and in 16 bits.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_ROUNDING_ELSE = 2e-2


def tail_of(replay: Replay, ids: Tensor, labels: Tensor) -> Tail:
    """The tail of a model, compared with the model's own loss on the replay's example.

    Args:
        replay: the model.
        ids: of the replay's example, (rows, length).
        labels: of the same.

    Raises:
        ProbeError: the model's loss is not a number, or it gives no logits for each token.
    """
    logits = replay.logits
    if logits.shape[:1] != labels.shape[:1] or logits.ndim != 3:
        raise ProbeError(
            f"model_type {replay.model_type} gives no logits for each token of a text; dus "
            "probe cannot measure it"
        )
    some = torch.full_like(labels, IGNORED)
    some[:, -logits.shape[1] :] = labels[:, -logits.shape[1] :]
    theirs = _full_cross_entropy(logits, some[:, -logits.shape[1] :])
    if not math.isfinite(theirs):
        raise damaged("behind its last layer", replay.model)
    tail = Tail(replay, ids, some, theirs)
    tail.choose_way()
    return tail


class Tail:
    """The loss of a batch. If dus does not know what the head does, it comes from the model's own
    logits.

    Args:
        replay: the model.
        ids: of the replay's example, (rows, length).
        labels: of the same, at the positions for which the model gave logits.
        theirs: the sum of cross-entropy over these labels by the model's own logits, in nats.
    """

    def __init__(self, replay: Replay, ids: Tensor, labels: Tensor, theirs: float) -> None:
        self._replay, self._ids, self._labels, self._theirs = replay, ids, labels, theirs
        self._output: nn.Module | None = replay.model.get_output_embeddings()
        self._head = head_of(replay.model.config.get_text_config())
        self._rounding = _ROUNDING.get(replay.after.dtype, _ROUNDING_ELSE)

    def choose_way(self) -> None:
        """Go by the model's own logits if the shorter way to the loss differs from them."""
        if not self._agrees(self.loss(self._ids, self._labels, self._replay.after)):
            self._output = None

    def loss(self, ids: Tensor, labels: Tensor, hidden: Tensor) -> float:
        """The sum of cross-entropy over the labelled tokens, in nats."""
        if self._output is None:
            return _full_cross_entropy(self._replay.finish(ids, hidden).logits, labels)
        kept: list[Tensor] = []

        def keep(states: Tensor) -> Tensor:
            kept.append(states)
            return states[..., :1]

        self._output.forward = keep
        try:
            self._replay.finish(ids, hidden)
        finally:
            del self._output.forward
        if len(kept) != 1 or kept[0].shape[:2] != labels.shape:
            self._output = None
            return self.loss(ids, labels, hidden)
        return float(cross_entropy(kept[0], self._output, labels, self._head))

    def check(self, hidden: Tensor) -> None:
        """Check that the example's hidden states, from layers called one by one, give the model's
        own loss.

        Raises:
            ProbeError: they do not.
        """
        ours = self.loss(self._ids, self._labels, hidden)
        if not self._agrees(ours):
            count = max(1, int((self._labels != IGNORED).sum()))
            raise ProbeError(
                f"the base's layers, called one by one, give a loss of {ours / count:.4f} and the "
                f"model itself {self._theirs / count:.4f}: dus probe does not know how model_type "
                f"{self._replay.model_type} calls its layers; please report it"
            )

    def _agrees(self, ours: float) -> bool:
        count = max(1, int((self._labels != IGNORED).sum()))
        return abs(ours - self._theirs) <= self._rounding * max(count, abs(self._theirs))


def _full_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    flat: Any = logits.float().flatten(0, 1)
    return float(
        functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    )
