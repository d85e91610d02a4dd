"""The view of `dus heal --progress json`: JSON Lines on stderr. docs/layout.md describes every
field.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dus_cli.console.events import INTERVAL, emit, stage_event
from dus_cli.heal.watch.follower import MetricsFollower
from dus_cli.heal.watch.standing import Standing
from dus_cli.progress import Stage

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class EventView:
    """A `View` of events: each held-out measurement, and of the rows between them a few a
    second.
    """

    def __init__(self) -> None:
        self._tokenising: Stage | None = None
        self._standing = Standing(0, 0)
        self._known = 0  # the last step that was told
        self._began: float | None = None  # of training
        self._is_saving = False
        self._told_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_tokenising()
        if kind is None and self._began is not None:
            self._tell("end")

    def note(self, text: str) -> None:
        emit("note", message=text)

    def status(self, text: str) -> None:
        self._end_tokenising()
        emit("status", message=text)

    def tokenising(self, done: int, total: int) -> None:
        if self._tokenising is None:
            self._tokenising = Stage("tokenising", total)
            stage_event("start", self._tokenising)
            self._told_at = time.monotonic()
        self._tokenising.done, self._tokenising.total = done, total
        if time.monotonic() - self._told_at >= INTERVAL:
            stage_event("progress", self._tokenising)
            self._told_at = time.monotonic()

    def plan(self, _lines: Sequence[str], record: dict[str, Any], /) -> None:
        self._end_tokenising()
        emit("plan", **record)

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        self._end_tokenising()
        self._standing = Standing(num_steps, tokens_per_step)
        emit("run", num_steps=num_steps, tokens_per_step=tokens_per_step)

    def update(self, follower: MetricsFollower) -> None:
        rows = follower.poll()
        if follower.starts_over:
            self._standing = self._standing.blank()
        for row in rows:
            self._standing.add(row)
            if self._began is not None and self._standing.is_measured and row["step"] > self._known:
                self._tell("progress")
        if self._began is None and rows:
            self._began = time.monotonic()
            self._tell("start")
        elif rows and self._standing.step < self._known:
            self.note(self._standing.resumed_text())
            self._known = self._standing.step
        elif self._standing.step > self._known and time.monotonic() - self._told_at >= INTERVAL:
            self._tell("progress")
        if rows and self._standing.is_done and not self._is_saving:
            self._is_saving = True
            self.status("saving")

    def _end_tokenising(self) -> None:
        if self._tokenising is not None:
            stage_event("end", self._tokenising)
            self._tokenising = None

    def _tell(self, event: str) -> None:
        now, pace = self._standing, self._standing.seconds_per_step
        fields: dict[str, Any] = {
            "stage": "training",
            "done": now.step,
            "total": now.num_steps,
            "unit": "steps",
        }
        fields["seconds"] = round(time.monotonic() - (self._began or 0), 3)
        fields["steps_per_second"] = None if not pace else round(1 / pace, 3)
        fields["eta_seconds"] = (
            None if pace is None else round(pace * (now.num_steps - now.step), 1)
        )
        emit(event, **fields, metrics=now.row)
        self._known, self._told_at = now.step, time.monotonic()
