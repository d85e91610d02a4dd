"""From hidden states behind the last layer to the loss: the model's own norm and head, without
full logits.
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

# Of a loss: what two orders of the same sums may differ by, in fp32 and in 16 bits.
_ROUNDING = {torch.float32: 1e-4, torch.float64: 1e-4}
_ROUNDING_ELSE = 2e-2


class Tail:
    """The loss of a batch. Where the head does what dus does not know, through the model's own
    logits.

    Args:
        replay: the model.
        ids: of the replay's example, (rows, length).
        labels: of the same.

    Raises:
        ProbeError: the model's loss is no number, or its logits are none for each token.
    """

    def __init__(self, replay: Replay, ids: Tensor, labels: Tensor) -> None:
        self._replay = replay
        self._output: nn.Module | None = replay.model.get_output_embeddings()
        self._head = head_of(replay.model.config.get_text_config())
        self._rounding = _ROUNDING.get(replay.after.dtype, _ROUNDING_ELSE)
        self._example = ids, labels
        logits = replay.logits
        if logits.shape[:1] != labels.shape[:1] or logits.ndim != 3:
            raise ProbeError(
                f"model_type {replay.model_type} gives no logits for each token of a text; dus "
                "probe cannot measure it"
            )
        some = labels[:, -logits.shape[1] :]
        self._theirs = _full_cross_entropy(logits, some)
        if not math.isfinite(self._theirs):
            raise damaged("behind its last layer", replay.model)
        self._some = torch.full_like(labels, IGNORED)
        self._some[:, -logits.shape[1] :] = some
        if not self._agrees(self.loss(ids, self._some, replay.after)):
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
        ids, _ = self._example
        ours = self.loss(ids, self._some, hidden)
        if not self._agrees(ours):
            count = max(1, int((self._some != IGNORED).sum()))
            raise ProbeError(
                f"the base's layers, called one by one, give a loss of {ours / count:.4f} and the "
                f"model itself {self._theirs / count:.4f}: dus probe does not know how model_type "
                f"{self._replay.model_type} calls its layers; please report it"
            )

    def _agrees(self, ours: float) -> bool:
        count = max(1, int((self._some != IGNORED).sum()))
        return abs(ours - self._theirs) <= self._rounding * max(count, abs(self._theirs))


def _full_cross_entropy(logits: Tensor, labels: Tensor) -> float:
    flat: Any = logits.float().flatten(0, 1)
    return float(
        functional.cross_entropy(flat, labels.flatten(), ignore_index=IGNORED, reduction="sum")
    )
