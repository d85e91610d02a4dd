"""Progress for a person: a bar on a terminal, plain lines elsewhere. All on stderr."""

from __future__ import annotations

import os
import re
import shutil
import sys
import textwrap
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from dus_cli.common.units import human_bytes, human_time
from dus_cli.progress import PlannedUpscale, Stage

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from typing_extensions import Self  # in typing from Python 3.11 on

# Seconds between two lines of a log about one stage.
_INTERVAL = 60.0


def say(text: str) -> None:
    """Write a line to stderr at once. If stderr is closed, carry on silently."""
    try:
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()
    except OSError:
        silence(sys.stderr.fileno())


def fitted(text: object, width: int | None = None) -> str:
    """Break a result's lines between words, where a terminal would break within them; paths and
    commands stay whole.

    If stdout is no terminal and COLUMNS is not set, lines are not broken.

    >>> print(fitted("left out     1,000 empty, 20 too_long", 30))
    left out     1,000 empty, 20
                 too_long
    """
    if width is None and not (sys.stdout.isatty() or os.environ.get("COLUMNS")):
        return str(text)
    width = width or shutil.get_terminal_size().columns
    return "\n".join(_broken(line, width) for line in str(text).split("\n"))


def _broken(line: str, width: int) -> str:
    if len(line) <= width or line.lstrip().startswith("dus "):
        return line
    label = re.match(r"(?:\S+(?: \S+)*)?\s{2,}", line)  # of a table's first column
    indent = label.end() if label and label.end() <= width // 2 else 0
    lines = textwrap.wrap(
        line[indent:],
        width - indent,
        break_long_words=False,
        break_on_hyphens=False,
        drop_whitespace=True,
    )
    return line[:indent] + ("\n" + " " * indent).join(lines)


def silence(descriptor: int) -> None:
    """Discard what is written to a descriptor from now on, also what a stream flushes when Python
    ends.
    """
    with suppress(OSError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), descriptor)


def is_live() -> bool:
    """Whether stderr is a terminal that can move its cursor."""
    return sys.stderr.isatty() and os.environ.get("TERM") not in {None, "", "dumb", "unknown"}


# Draws a plan in lines of at most so many columns.
Draw = Callable[[Any, int], str]


def _print_plan(draw: Draw, plan: PlannedUpscale) -> None:
    say(f"{draw(plan, shutil.get_terminal_size().columns)}\n")


class PlainProgress:
    """For logs: the drawing, then a line when a stage begins, and one a minute while it lasts."""

    is_live = False

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        self._lock = threading.Lock()
        self._stage = Stage("", None)
        self._said_at = 0.0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def planned(self, plan: PlannedUpscale) -> None:
        _print_plan(self._draw, plan)

    def start(self, what: str, total: int | None, unit: str = "bytes") -> None:
        self._stage, self._said_at = Stage(what, total, unit), time.monotonic()
        say(f"{what}{'' if total is None else f' {_amount(total, unit)}'} …")

    def advance(self, amount: int) -> None:
        with self._lock:
            self._stage.done += amount
            if time.monotonic() - self._said_at >= _INTERVAL:
                self._said_at = time.monotonic()
                say(_stage_line(self._stage))

    def note(self, text: str) -> None:
        say(text)

    def rest(self) -> None:
        pass


def _amount(count: float, unit: str) -> str:
    return human_bytes(count) if unit == "bytes" else f"{count:,.0f} {unit}"


def _stage_line(stage: Stage) -> str:
    of = "" if stage.total is None else f" of {_amount(stage.total, stage.unit)}"
    parts = [f"{stage.name}: {_amount(stage.done, stage.unit)}{of}"]
    if stage.per_second is not None:
        parts.append(f"{_amount(stage.per_second, stage.unit)}/s")
    if stage.eta_seconds is not None:
        parts.append(f"{human_time(stage.eta_seconds)} left")
    return ", ".join(parts)


class BarProgress:
    """A bar with speed and time left."""

    is_live = True

    def __init__(self, draw: Draw) -> None:
        self._draw = draw
        # rich takes as long to import as a reflinked upscale takes to run: for terminals only.
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

        self._bar: Bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            TextColumn("{task.fields[amounts]}"),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._lock = threading.Lock()
        self._stage = Stage("", None)
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def planned(self, plan: PlannedUpscale) -> None:
        _print_plan(self._draw, plan)

    def start(self, what: str, total: int | None, unit: str = "bytes") -> None:
        self._bar.start()  # not earlier: huggingface_hub's own bars come before
        self._stage = Stage(what, total, unit)
        self._task = self._bar.add_task(what, total=total, amounts="")

    def advance(self, amount: int) -> None:
        assert self._task is not None
        with self._lock:
            self._stage.done += amount
            self._bar.update(self._task, advance=amount, amounts=_amounts(self._stage))

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def rest(self) -> None:
        self._bar.stop()  # `start` goes on below what the other leaves


def _amounts(stage: Stage) -> str:
    of = "" if stage.total is None else f" of {_amount(stage.total, stage.unit)}"
    speed = "" if stage.per_second is None else f", {_amount(stage.per_second, stage.unit)}/s"
    return f"{_amount(stage.done, stage.unit)}{of}{speed}"
