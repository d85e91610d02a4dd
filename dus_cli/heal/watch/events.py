"""`dus heal --progress json`: JSON Lines on stderr. docs/layout.md describes every field."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from dus_cli.console.events import INTERVAL, emit, stage_event
from dus_cli.heal.watch.follower import MetricsFollower
from dus_cli.heal.watch.run_state import RunState
from dus_cli.progress import Stage

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on


class EventView:
    """A `View` that writes events: one for each held-out measurement, and a few a second for other
    rows.
    """

    def __init__(self) -> None:
        self._tokenising: Stage | None = None
        self._state = RunState(0, 0)
        self._last_step = 0  # the last step that an event reported
        self._began: float | None = None  # when training began
        self._is_saving = False
        self._written_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._end_tokenising()
        if kind is None and self._began is not None:
            self._emit("end")

    def note(self, text: str) -> None:
        emit("note", message=text)

    def status(self, text: str) -> None:
        self._end_tokenising()
        emit("status", message=text)

    def tokenising(self, done: int, total: int) -> None:
        if self._tokenising is None:
            self._tokenising = Stage("tokenising", total)
            stage_event("start", self._tokenising)
            self._written_at = time.monotonic()
        self._tokenising.done, self._tokenising.total = done, total
        if time.monotonic() - self._written_at >= INTERVAL:
            stage_event("progress", self._tokenising)
            self._written_at = time.monotonic()

    def plan(self, _lines: Sequence[str], record: dict[str, Any], /) -> None:
        self._end_tokenising()
        emit("plan", **record)

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        self._end_tokenising()
        self._state = RunState(num_steps, tokens_per_step)
        emit("run", num_steps=num_steps, tokens_per_step=tokens_per_step)

    def update(self, follower: MetricsFollower) -> None:
        rows = follower.poll()
        if follower.starts_over:
            self._state = self._state.without_rows()
        for row in rows:
            self._state.add(row)
            for text in () if follower.starts_over else self._state.notes:
                self.note(text)
            is_new = row["step"] > self._last_step
            if self._began is not None and self._state.is_measured and is_new:
                self._emit("progress")
        is_due = time.monotonic() - self._written_at >= INTERVAL
        if self._began is None and rows:
            self._began = time.monotonic()
            self._emit("start")
        elif rows and self._state.step < self._last_step:
            self.note(self._state.resumed_text())
            self._last_step = self._state.step
        elif self._state.step > self._last_step and is_due:
            self._emit("progress")
        if rows and self._state.is_done and not self._is_saving:
            self._is_saving = True
            self.status("saving")

    def _end_tokenising(self) -> None:
        if self._tokenising is not None:
            stage_event("end", self._tokenising)
            self._tokenising = None

    def _emit(self, event: str) -> None:
        now, pace = self._state, self._state.seconds_per_step
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
        self._last_step, self._written_at = now.step, time.monotonic()
