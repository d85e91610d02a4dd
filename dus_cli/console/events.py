"""Progress for a program: JSON Lines on stderr, one event each. docs/layout.md describes every
field.
"""

from __future__ import annotations

import json
import threading
import time
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Any

from dus_cli.console.terminal import say
from dus_cli.progress import PlannedUpscale, ProgressMode, Stage

if TYPE_CHECKING:
    from collections.abc import Sequence

    from typing_extensions import Self  # in typing from Python 3.11 on

# Seconds between two events of one stage, its first and its last aside.
INTERVAL = 0.5


def emit(event: str, **fields: Any) -> None:
    """Write one event, as one line."""
    say(json.dumps({"event": event, **fields}))


def stage_event(event: str, stage: Stage, **more: Any) -> None:
    """Write how far a stage is: `event` is "start", "progress" or "end"."""
    rate, left = stage.per_second, stage.eta_seconds
    emit(
        event,
        stage=stage.name,
        done=stage.done,
        total=stage.total,
        unit=stage.unit,
        seconds=round(stage.seconds, 3),
        **{f"{stage.unit.replace(' ', '_')}_per_second": None if rate is None else round(rate, 3)},
        eta_seconds=None if left is None else round(left, 1),
        **more,
    )


class EventsWanted:
    """Whether a file of options asks for events; `--config` sets it."""

    by_a_file = False


def are_wanted(arguments: Sequence[str]) -> bool:
    """Whether a command line asks for events. It need not be valid, because its usage error must be
    an event, too.

    >>> are_wanted(["verify", "--progress", "json"]), are_wanted(["verify", "--progress=plain"])
    (True, False)
    """
    options = list(takewhile(lambda argument: argument != "--", arguments))
    if not any(option.partition("=")[0] == "--progress" for option in options):
        return EventsWanted.by_a_file
    return f"--progress={ProgressMode.json.value}" in options or (
        "--progress",
        ProgressMode.json.value,
    ) in pairwise(options)


class JsonProgress:
    """A `Progress` of events. As a context manager it ends its last stage, unless that failed."""

    is_live = False

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._stage: Stage | None = None
        self._told_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None:
            with self._lock:
                self._end()

    def planned(self, plan: PlannedUpscale) -> None:
        layer_map = plan.layer_map
        emit(
            "plan",
            model=plan.base.ref.text,
            commit=plan.base.commit,
            num_layers={"base": layer_map.num_base_layers, "output": len(layer_map)},
            layers=str(layer_map),
            bytes=plan.num_data_bytes,
        )

    def start(self, what: str, total: int | None, unit: str = "bytes") -> None:
        with self._lock:
            self._end()
            self._stage = Stage(what, total, unit)
            self._tell("start", self._stage)

    def advance(self, amount: int) -> None:
        with self._lock:
            assert self._stage is not None
            self._stage.done += amount
            if time.monotonic() - self._told_at >= INTERVAL:
                self._tell("progress", self._stage)

    def note(self, text: str) -> None:
        emit("note", message=text)

    def rest(self) -> None:
        with self._lock:
            self._end()

    def _end(self) -> None:
        if self._stage is not None:
            self._tell("end", self._stage)
            self._stage = None

    def _tell(self, event: str, stage: Stage) -> None:
        self._told_at = time.monotonic()
        stage_event(event, stage)
