"""The state of a training run: steps, tokens and losses so far."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dus_cli.evaluation.intervals import ratio

if TYPE_CHECKING:
    from dus_cli.heal.train.evaluate import MeanLoss

# The weight of the past in the running mean and variance of the loss, and the steps after which
# they are trusted.
_MEMORY = 0.98
_TRUSTED_AFTER = 20

# A loss this many standard deviations and this many nats above its mean is a spike.
_SPIKE_DEVIATIONS = 6.0
_SPIKE_NATS = 1.0


@dataclass
class TrainState:
    """How far a run is; saved with each checkpoint. `step` counts finished steps, `seconds` all
    sessions' time. Losses are the first held-out set's; `losses_by_set` has `base`, `scaled` and
    `now` of each that has a name. By set, also of one without a name: `base_nats`, the base's sums
    by unit of documents, and `intervals`, the 95% interval of the difference to the base's loss,
    paired (None with a single document).
    """

    step: int = 0
    seconds: float = 0.0
    base_loss: float | None = None
    scaled_loss: float | None = None
    eval_loss: float | None = None
    reached_at: int | None = None
    evals_at_base: int = 0
    skipped: int = 0
    skipped_in_a_row: int = 0
    mean: float = 0.0
    variance: float = 0.0
    seen: int = 0
    adam_steps: dict[str, int] = field(default_factory=dict)
    losses_by_set: dict[str, dict[str, float]] = field(default_factory=dict)
    base_nats: dict[str, list[float]] = field(default_factory=dict)
    intervals: dict[str, list[float] | None] = field(default_factory=dict)
    # The scores of tasks: the latest, each with its value at the `start`.
    task_scores: list[dict[str, Any]] = field(default_factory=list)
    # The outcome of each push of an export.
    pushes: list[dict[str, Any]] = field(default_factory=list)
    # The row of the last step, until its held-out loss is measured.
    unmeasured: dict[str, Any] | None = None

    def is_spike(self, loss: float) -> bool:
        """Whether a loss is so far above the mean that its step would do more harm than good."""
        if not math.isfinite(loss):
            return True
        if self.seen < _TRUSTED_AFTER:
            return False
        return loss > self.mean + max(_SPIKE_DEVIATIONS * math.sqrt(self.variance), _SPIKE_NATS)

    def saw(self, loss: float) -> None:
        """Take a loss into the running mean and variance (West 1979, exponentially weighted)."""
        weight = max(1 - _MEMORY, 1 / (self.seen + 1))
        difference = loss - self.mean
        self.mean += weight * difference
        self.variance = (1 - weight) * (self.variance + weight * difference**2)
        self.seen += 1

    def take(self, what: str, losses: Mapping[str, MeanLoss]) -> float:
        """Keep the loss of each set that has a name, and return the first set's."""
        for name, loss in losses.items():
            if name:
                self.losses_by_set.setdefault(name, {})[what] = loss.mean
        return next(iter(losses.values())).mean

    def measured_base(self, losses: Mapping[str, MeanLoss]) -> None:
        """Take in the base's held-out losses, by the set's name."""
        self.base_loss = self.take("base", losses)
        self.base_nats = {name: list(loss.nats) for name, loss in losses.items()}

    def losses(self, what: str) -> dict[str, float]:
        """The kept loss of each set that has a name."""
        return {name: kept[what] for name, kept in self.losses_by_set.items() if what in kept}

    def measured(self, losses: Mapping[str, MeanLoss]) -> None:
        """Take in the held-out losses, by the set's name."""
        self.eval_loss = loss = self.take("now", losses)
        self.intervals = {
            name: _interval(each, self.base_nats[name])
            for name, each in losses.items()
            if name in self.base_nats
        }
        if self.base_loss is None:
            return
        self.evals_at_base = self.evals_at_base + 1 if loss <= self.base_loss else 0
        if self.evals_at_base and self.reached_at is None:
            self.reached_at = self.step

    def scored(self, scores: list[dict[str, Any]]) -> None:
        """Take in the scores of tasks, and keep what each was at the start."""
        earlier = {score["label"]: score["start"] for score in self.task_scores}
        self.task_scores = [
            score | {"start": earlier.get(score["label"], score["value"])} for score in scores
        ]


def _interval(now: MeanLoss, base_nats: list[float]) -> list[float] | None:
    """The interval of the difference between a loss and the base's, paired by unit of documents."""
    units = [unit for unit in zip(now.nats, base_nats, now.tokens, strict=True) if unit[2]]
    estimate = ratio([nats - base for nats, base, _ in units], [tokens for *_, tokens in units])
    if estimate.interval is None or not all(map(math.isfinite, estimate.interval)):
        return None
    return list(estimate.interval)
