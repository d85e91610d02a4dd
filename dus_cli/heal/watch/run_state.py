"""The state of a run by its metrics so far: losses, pace and time left."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

from dus_cli.common.units import human_bytes, human_count, human_time
from dus_cli.heal.proof.confidence import difference_text

# The latest losses in the sparkline, and the latest steps by which the time left is estimated.
_NUM_LOSSES, _NUM_PACED = 1000, 50

# The share of the time that is worth telling if steps wait for tokens.
_MUCH_WAITING = 0.05

_BLOCKS = "▁▂▃▄▅▆▇█"


@dataclass
class RunState:
    """The state of a run by the rows so far, in numbers and in words."""

    num_steps: int
    tokens_per_step: int
    has_begun: bool = False
    row: dict[str, Any] = field(default_factory=dict)
    base_loss: float | None = None
    scaled_loss: float | None = None
    eval_loss: float | None = None
    base_losses: dict[str, float | None] = field(default_factory=dict)
    scaled_losses: dict[str, float | None] = field(default_factory=dict)
    eval_losses: dict[str, float | None] = field(default_factory=dict)
    intervals: dict[str, list[float] | None] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)
    is_measured: bool = False
    num_skipped: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_LOSSES))
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_PACED))
    waits: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_PACED))

    def without_rows(self) -> RunState:
        """The same run before its first row."""
        return RunState(self.num_steps, self.tokens_per_step)

    def add(self, row: dict[str, Any]) -> None:
        self.has_begun, self.row = True, row
        self.is_measured = row.get("eval_loss") is not None
        if self.is_measured:
            self.eval_loss, self.eval_losses = row["eval_loss"], row.get("eval_losses", {})
            whole = {"": row.get("difference_interval")}
            self.intervals = row.get("difference_intervals", whole)
            self.tasks = row.get("tasks", self.tasks)
        if not row["step"]:
            self.base_loss, self.scaled_loss = row.get("base_loss"), row.get("eval_loss")
            self.base_losses, self.scaled_losses = row.get("base_losses", {}), self.eval_losses
            return
        self.num_skipped += bool(row.get("skipped"))
        if not row.get("skipped") and math.isfinite(self.loss):
            self.losses.append(self.loss)
        seconds = sum((row.get("seconds") or {}).values())
        if seconds > 0:
            self.paces.append(seconds)
            self.waits.append(row.get("waited", 0.0))

    @property
    def step(self) -> int:
        return int(self.row.get("step", 0))

    @property
    def is_done(self) -> bool:
        return self.step >= self.num_steps > 0

    @property
    def loss(self) -> float:
        return self._number("loss")

    def _number(self, name: str) -> float:
        """A figure of the last row; NaN if it is null, as figures that are not finite are."""
        value = self.row.get(name)
        return math.nan if value is None else float(value)

    @property
    def notes(self) -> list[str]:
        """What the last row tells besides figures."""
        return [push_text(self.row["push"])] if "push" in self.row else []

    def line(self) -> str:
        """The state in one line."""
        if not self.step:
            return self.start_text()
        heldout = f"held-out {', '.join(self.heldout_texts())}" if self.is_measured else ""
        parts = [
            f"step {self.step_text(', ')}",
            f"loss {loss_text(self.loss)}",
            heldout,
            self.tasks_text() if "tasks" in self.row else "",
            self.speed_texts()[0],
            self.waiting_text(),
        ]
        return ", ".join(part for part in (*parts, self.time_left_text()) if part)

    def step_text(self, separator: str) -> str:
        done, budget = (
            human_count(self.step * self.tokens_per_step),
            human_count(self.num_steps * self.tokens_per_step),
        )
        parts = [f"{self.step:,} of {self.num_steps:,}", f"{done} of {budget} tokens"]
        return separator.join(parts + [f"{self.num_skipped:,} skipped"] * bool(self.num_skipped))

    def resumed_text(self) -> str:
        return f"going on from step {self.step:,}"

    def start_text(self) -> str:
        now = self._by_set(self.eval_loss, self.eval_losses)
        if self.base_loss is None:
            return f"held-out loss at the start: {now}"
        base = self._by_set(self.base_loss, self.base_losses)
        return f"held-out loss after scaling: {now}, of the base: {base}"

    def _by_set(self, loss: float | None, losses: dict[str, float | None]) -> str:
        if not losses:
            return loss_text(loss)
        return " ".join(f"{name} {loss_text(each)}" for name, each in losses.items())

    def heldout_texts(self) -> list[str]:
        """The held-out loss of each set, with its share of the way from right after scaling to the
        base's loss.
        """
        if not self.eval_losses:
            interval = self.intervals.get("")
            return [_heldout_text(self.eval_loss, self.scaled_loss, self.base_loss, interval)]
        texts = []
        for name, now in self.eval_losses.items():
            scaled, base = self.scaled_losses.get(name), self.base_losses.get(name)
            text = _heldout_text(now, scaled, base, self.intervals.get(name))
            texts.append(f"{name} {text}")
        return texts

    def tasks_text(self) -> str:
        return ", ".join(f"{name} {value:.4f}" for name, value in self.tasks.items())

    def speed_texts(self) -> list[str]:
        texts = [f"{self._number('tokens_per_second'):,.0f} tokens/s"]
        if self.row.get("mfu") is not None:
            texts.append(f"MFU {self.row['mfu']:.1%}")
        if self.row.get("peak_memory_bytes"):
            texts.append(f"peak {human_bytes(self.row['peak_memory_bytes'])}")
        if waiting := self.waiting_text():
            texts.append(waiting)
        return texts

    def waiting_text(self) -> str:
        """The share of the latest steps' time in which they waited for tokens; "" if it is small.

        >>> state = RunState(10, 512)
        >>> state.add({"step": 1, "loss": 2.5, "seconds": {"data": 4.0}, "waited": 3.0})
        >>> state.waiting_text()
        '75% of the time waiting for tokens'
        """
        share = sum(self.waits) / max(sum(self.paces), 1e-9)
        return f"{share:.0%} of the time waiting for tokens" if share >= _MUCH_WAITING else ""

    def optimizer_texts(self) -> list[str]:
        texts = [f"lr {self._number('lr'):.2e}", f"gradient norm {self._number('grad_norm'):.3g}"]
        if self.row.get("kl") is not None:
            texts.append(f"KL {self.row['kl']:.3f}")
        return texts

    @property
    def seconds_per_step(self) -> float | None:
        """The mean time of the latest steps, with measurements; None before the first step."""
        return sum(self.paces) / len(self.paces) if self.paces else None

    def time_left_text(self) -> str:
        """The time for the remaining steps at the pace of the latest ones, with measurements."""
        if not self.paces or self.is_done:
            return ""
        return f"{human_time((self.num_steps - self.step) * (self.seconds_per_step or 0))} left"


# --- words ----------------------------------------------------------------------------------------


def sparkline(values: Sequence[float] | deque[float], width: int) -> str:
    """The values as at most `width` block characters; each is the mean of neighbouring values.

    >>> sparkline([8, 7, 6, 5, 4, 3, 2, 1], width=8)
    '█▇▆▅▄▃▂▁'
    >>> sparkline([3, 1, 2, 2], width=2), sparkline([5, 5], width=9)
    ('▁▁', '▁▁')
    """
    known = [value for value in values if math.isfinite(value)]
    count = min(len(known), max(0, width))
    edges = [len(known) * k // count for k in range(count + 1)] if count else []
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, spread = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(
        _BLOCKS[round((mean - low) / spread * (len(_BLOCKS) - 1)) if spread else 0]
        for mean in means
    )


def push_text(push: dict[str, Any]) -> str:
    """The outcome of the push of an export.

    >>> push_text({"step": 8, "commit": "0123456789abcdef"})
    'step 8 is on the Hub, at commit 0123456789ab'
    >>> push_text({"step": 8, "error": "the Hub cannot be reached"})
    'warning: the export of step 8 was not pushed: the Hub cannot be reached'
    """
    if "error" in push:
        return f"warning: the export of step {push['step']} was not pushed: {push['error']}"
    return f"step {push['step']} is on the Hub, at commit {push['commit'][:12]}"


def loss_text(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def _heldout_text(
    now: float | None, scaled: float | None, base: float | None, interval: list[float] | None
) -> str:
    if scaled is None or now is None:
        return loss_text(now)
    if base is None:
        return f"{loss_text(now)} (at the start {loss_text(scaled)})"
    share = _share_text(scaled, now, base)
    if share == "reached" and interval is not None:
        share += f", {difference_text(interval, digits=3)}"
    return (
        f"{loss_text(now)} (scaled {loss_text(scaled)} → base "
        f"{loss_text(base)}{', ' if share else ''}{share})"
    )


def _share_text(scaled: float, now: float, base: float) -> str:
    """The share of the way from the scaled model's loss to the base's; at most 99% unless the
    base's loss is reached.

    >>> _share_text(3.417, 2.91, 2.85), _share_text(3.417, 2.8501, 2.85)
    ('89% of the way', '99% of the way')
    >>> _share_text(3.417, 2.85, 2.85), _share_text(2.8, 2.9, 2.85)
    ('reached', '')
    """
    if now <= base:
        return "reached"
    if not scaled > base or not math.isfinite(now):
        return ""
    return f"{min(99, math.floor((scaled - now) / (scaled - base) * 100 + 1e-9))}% of the way"
