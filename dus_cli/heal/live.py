"""What a person sees of a run: the rows of metrics.jsonl as they come, and how a terminal or a log shows them."""

from __future__ import annotations

import contextlib
import json
import math
import os
import sys
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dus_cli.progress import ProgressMode
from dus_cli.release.svg import human_count
from dus_cli.report import human_bytes, human_time
from dus_cli.terminal import is_live, say

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from typing_extensions import Self  # in typing from Python 3.11 on

# Losses that the sparkline is drawn from, and steps whose pace tells the time left.
_NUM_LOSSES, _NUM_PACED = 1000, 50

# Seconds between two pictures on a terminal, and between two lines of a log that no measurement asks for.
_REDRAW, _PLAIN_INTERVAL = 0.1, 60.0

# Seconds after which a status says how long it has been true.
_PATIENCE = 10.0

# Columns of the labels on a terminal.
_LABEL = 11

# Columns that stay free at the right: a terminal writes ^C behind the last line, and must not begin another with it.
_ECHO = 4

_BLOCKS = "▁▂▃▄▅▆▇█"

# For terminals whose encoding has no such characters.
_ASCII = str.maketrans({"…": "...", "→": "->", "·": "|", "–": "-"})


class MetricsFollower:
    """Reads a metrics.jsonl that another process writes.

    When workers start again they replace the file by one without the steps that are run again, and the finished
    model comes with its own copy. `starts_over` tells, after each poll, that its rows are all that a file holds:
    at the first look, or because the file was replaced. Whatever was made of earlier rows is void then.
    """

    def __init__(self, path: Path) -> None:
        self.starts_over = False
        self._path = path
        self._offset = 0
        self._file_id: tuple[int, int] | None = None
        self._is_first_poll = True

    def poll(self) -> list[dict[str, Any]]:
        """Rows that are new since the last time."""
        self.starts_over, self._is_first_poll = self._is_first_poll, False
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                file_id = (status.st_dev, status.st_ino)
                if self._file_id is not None and (file_id != self._file_id or status.st_size < self._offset):
                    self.starts_over, self._offset = True, 0
                self._file_id = file_id
                file.seek(self._offset)
                whole, newline, _ = file.read().rpartition(b"\n")  # what follows is half a row, so far
        except OSError:
            return []  # not there yet, or a file system that hiccups: nothing to end a run for
        self._offset += len(whole) + len(newline)
        rows = []
        for line in whole.splitlines():
            with contextlib.suppress(ValueError):
                rows.append(json.loads(line))
        return rows


class View(Protocol):
    """Told what a run does while it does it. A context manager, so that a terminal is left as it was."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def note(self, text: str) -> None:
        """Something to keep in sight, in a line of its own."""

    def status(self, text: str) -> None:
        """What goes on until something else does, like "loading the model"."""

    def tokenising(self, done: int, total: int) -> None:
        """How far the data are tokenised, in bytes."""

    def plan(self, lines: Sequence[str], record: dict[str, Any], /) -> None:
        """What the run will do: for a person, and as JSON."""

    def begin(self, num_steps: int, tokens_per_step: int, phases: Sequence[str] = ()) -> None:
        """The size of the run, and the names of its phases where they are worth telling."""

    def update(self, follower: MetricsFollower) -> None:
        """Look for new rows, and show them. Called several times a second."""


def view_for(mode: ProgressMode) -> View:
    """The view of `--progress`: for auto a terminal's or a log's, as stderr is."""
    if mode is ProgressMode.none:
        return NoView()
    if mode is ProgressMode.json:
        from dus_cli.heal.events import EventView

        return EventView()
    return LiveView() if mode is ProgressMode.auto and is_live() else PlainView()


class NoView:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def note(self, text: str) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def tokenising(self, done: int, total: int) -> None:
        pass

    def plan(self, _lines: Sequence[str], _record: dict[str, Any], /) -> None:
        pass

    def begin(self, num_steps: int, tokens_per_step: int, phases: Sequence[str] = ()) -> None:
        pass

    def update(self, follower: MetricsFollower) -> None:
        pass


class PlainView(NoView):
    """For logs: a line for each held-out measurement and each new status, and otherwise one a minute."""

    def __init__(self) -> None:
        self._standing = Standing(0, 0)
        self._known = math.inf  # rows up to this step were told, also those that are there at the first look
        self._said_at = time.monotonic()

    def note(self, text: str) -> None:
        self._say(text)

    def status(self, text: str) -> None:
        self._say(f"{text} …")

    def tokenising(self, done: int, total: int) -> None:
        if total and self._is_due():
            self._say(f"tokenising: {done / total:.0%}")

    def plan(self, lines: Sequence[str], _record: dict[str, Any], /) -> None:
        for line in lines:
            self.note(line)

    def begin(self, num_steps: int, tokens_per_step: int, phases: Sequence[str] = ()) -> None:
        self._standing = Standing(num_steps, tokens_per_step, tuple(phases))

    def update(self, follower: MetricsFollower) -> None:
        rows = follower.poll()
        known = self._known if follower.starts_over else -1
        if follower.starts_over:
            self._standing = self._standing.blank()
        for row in rows:
            self._standing.add(row)
            if self._standing.is_measured and row["step"] > known:
                self._say(self._standing.line())
        self._known = self._standing.step
        if 0 < self._standing.step < known < math.inf:
            self._say(self._standing.resumed_text())
        elif rows and self._standing.is_done and self._standing.step > known:
            self.status("saving")
        elif rows and self._is_due():
            self._say(self._standing.line())

    def _is_due(self) -> bool:
        return time.monotonic() - self._said_at >= _PLAIN_INTERVAL

    def _say(self, line: str) -> None:
        is_utf8 = sys.stderr.encoding.lower().startswith("utf")
        say(line if is_utf8 else line.translate(_ASCII))
        self._said_at = time.monotonic()


class LiveView:
    """For terminals: a few lines that are drawn anew in place.

    Drawn by the calls alone: a thread that does it would be one too many when the launcher forks.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._console = console or RichConsole(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False)
        self._standing = Standing(0, 0)
        self._status, self._status_passes, self._status_since = "", True, 0.0
        self._is_training = False
        self._tokenised: float | None = None
        self._drawn_at = 0.0
        self._drawn_width: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # The last picture of a run stays above its report; a status that is over does not, and of a run that ended
        # otherwise nothing does: its time left and its bar are no longer true.
        self._status, self._tokenised = "", None
        self._settle()
        self._live.update(self._picture())
        self._live.transient = kind is not None or not self._standing.has_begun
        self._live.stop()

    def note(self, text: str) -> None:
        self._settle()
        self._console.print(self._plain(text), markup=False, highlight=False)

    def status(self, text: str) -> None:
        self._tokenised = None
        # Until there are new rows a status says what to wait for. Later it is the end that has begun.
        self._set_status(text, passes=not self._is_training)
        self._draw(at_once=True)

    def tokenising(self, done: int, total: int) -> None:
        self._tokenised = min(1.0, done / total) if total else None
        self._draw()

    def plan(self, lines: Sequence[str], _record: dict[str, Any], /) -> None:
        for line in lines:
            self.note(line)

    def begin(self, num_steps: int, tokens_per_step: int, phases: Sequence[str] = ()) -> None:
        self._tokenised = None
        self._standing = Standing(num_steps, tokens_per_step, tuple(phases))

    def update(self, follower: MetricsFollower) -> None:
        rows, before = follower.poll(), self._standing.step
        if follower.starts_over:
            self._standing = self._standing.blank()
        for row in rows:
            self._standing.add(row)
        if rows and not follower.starts_over:
            self._is_training = True
        if self._status_passes:
            if self._is_training and self._standing.step < before:
                self._set_status(self._standing.resumed_text(), passes=True)
            elif rows and not follower.starts_over:
                self._status = ""
        if self._standing.is_done and not self._status:
            self._set_status("saving", passes=False)
        self._draw()

    def _set_status(self, text: str, *, passes: bool) -> None:
        self._status, self._status_passes, self._status_since = text, passes, time.monotonic()

    def _draw(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._drawn_at >= _REDRAW:
            self._drawn_at = now
            self._live.start()  # the first time; later it does nothing
            self._settle()
            self._live.update(self._picture(), refresh=True)

    def _settle(self) -> None:
        """Clear the screen where its width changed.

        Some terminals break the lines that are there, others cut them, and tmux tells of it a quarter of a second
        later: nobody knows how many rows the last picture has now. Most terminals keep what is cleared to scroll to.
        """
        from rich.control import Control

        width = self._console.width
        if self._drawn_width not in {None, width}:
            self._console.control(Control.home(), Control.clear())
        self._drawn_width = width

    # --- the picture ------------------------------------------------------------------------------

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.constrain import Constrain
        from rich.text import Text

        lines: list[RenderableType] = []
        if self._tokenised is not None:
            lines.append(self._bar(self._tokenised, ""))
        if self._standing.has_begun:
            now = self._standing
            lines.append(self._bar(now.step / max(1, now.num_steps), now.time_left_text()))
            lines += [self._row(*pair) for pair in self._rows()]
        if self._status:
            waited = time.monotonic() - self._status_since
            text = f"{self._status} … {human_time(waited) if waited >= _PATIENCE else ''}"
            frames = "-\\|/" if self._console.options.ascii_only else "⠋⠙⠹⠸⠼⠴⠦⠧⠇⠏"
            frame = frames[int(waited / _REDRAW) % len(frames)]
            lines.append(Text(f"{frame} {self._plain(text)}", no_wrap=True, overflow="crop"))
        return Constrain(Group(*lines), self._console.width - _ECHO)

    def _rows(self) -> list[tuple[str, str]]:
        now = self._standing
        rows = [("step", now.step_text(" · "))]
        if now.phase_text():
            rows.append(("phase", now.phase_text()))
        if now.step:
            width = self._console.width - _ECHO - _LABEL - 8
            line = "" if self._console.options.ascii_only else sparkline(now.losses, min(width, 60))
            rows.append(("loss", f"{_loss(now.loss):<7} {line}"))
        rows.append(("held-out", now.heldout_text()))
        if now.step:
            rows.append(("speed", " · ".join(now.speed_texts())))
            rows.append(("optimizer", " · ".join(now.optimizer_texts())))
        return rows

    def _row(self, label: str, value: str) -> RenderableType:
        from rich.text import Text

        return Text.assemble((f"{label:<{_LABEL}}", "dim"), self._plain(value), no_wrap=True, overflow="crop")

    def _bar(self, share: float, left: str) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_row(ProgressBar(total=1.0, completed=share), f"{math.floor(share * 100):>3}%", self._plain(left))
        return grid

    def _plain(self, text: str) -> str:
        return text.translate(_ASCII) if self._console.options.ascii_only else text


@dataclass
class Standing:
    """What the rows so far come to, in numbers and in words."""

    num_steps: int
    tokens_per_step: int
    phases: tuple[str, ...] = ()
    has_begun: bool = False
    row: dict[str, Any] = field(default_factory=dict)
    base_loss: float | None = None
    scaled_loss: float | None = None
    eval_loss: float | None = None
    is_measured: bool = False
    num_skipped: int = 0
    losses: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_LOSSES))
    paces: deque[float] = field(default_factory=lambda: deque(maxlen=_NUM_PACED))

    def blank(self) -> Standing:
        """The same run without a row."""
        return Standing(self.num_steps, self.tokens_per_step, self.phases)

    def add(self, row: dict[str, Any]) -> None:
        self.has_begun, self.row = True, row
        self.is_measured = row.get("eval_loss") is not None
        if self.is_measured:
            self.eval_loss = row["eval_loss"]
        if not row["step"]:
            self.base_loss, self.scaled_loss = row.get("base_loss"), row.get("eval_loss")
            return
        self.num_skipped += bool(row.get("skipped"))
        if not row.get("skipped") and math.isfinite(self.loss):
            self.losses.append(self.loss)
        seconds = sum((row.get("seconds") or {}).values())
        if seconds > 0:
            self.paces.append(seconds)

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
        """A figure of the last row. What is not finite is null there, as JSON has it."""
        value = self.row.get(name)
        return math.nan if value is None else float(value)

    def line(self) -> str:
        """Everything that matters, in one line."""
        if not self.step:
            return self.start_text()
        heldout = f"held-out {self.heldout_text()}" if self.is_measured else ""
        parts = [f"step {self.step_text(', ')}", f"loss {_loss(self.loss)}", heldout, self.speed_texts()[0]]
        return ", ".join(part for part in (*parts, self.time_left_text()) if part)

    def step_text(self, separator: str) -> str:
        done, budget = human_count(self.step * self.tokens_per_step), human_count(self.num_steps * self.tokens_per_step)
        parts = [f"{self.step:,} of {self.num_steps:,}", f"{done} of {budget} tokens"]
        return separator.join(parts + [f"{self.num_skipped:,} skipped"] * bool(self.num_skipped))

    def resumed_text(self) -> str:
        return f"going on from step {self.step:,}"

    def phase_text(self) -> str:
        """The phase, where the run has several."""
        index = int(self.row.get("phase", 0))
        if len(self.phases) > 1:
            return f"{index + 1} of {len(self.phases)}: {self.phases[min(index, len(self.phases) - 1)]}"
        return f"{index + 1}" if index else ""

    def start_text(self) -> str:
        if self.base_loss is None:
            return f"held-out loss at the start: {_loss(self.eval_loss)}"
        return f"held-out loss after scaling: {_loss(self.eval_loss)}, of the base: {_loss(self.base_loss)}"

    def heldout_text(self) -> str:
        """The held-out loss on its way from right after scaling to the base."""
        now, scaled, base = self.eval_loss, self.scaled_loss, self.base_loss
        if scaled is None or now is None:
            return _loss(now)
        if base is None:
            return f"{_loss(now)} (at the start {_loss(scaled)})"
        where = _way(scaled, now, base)
        return f"{_loss(now)} (scaled {_loss(scaled)} → base {_loss(base)}{', ' if where else ''}{where})"

    def speed_texts(self) -> list[str]:
        texts = [f"{self._number('tokens_per_second'):,.0f} tokens/s"]
        if self.row.get("mfu") is not None:
            texts.append(f"MFU {self.row['mfu']:.1%}")
        if self.row.get("peak_memory_bytes"):
            texts.append(f"peak {human_bytes(self.row['peak_memory_bytes'])}")
        return texts

    def optimizer_texts(self) -> list[str]:
        texts = [f"lr {self._number('lr'):.2e}", f"gradient norm {self._number('grad_norm'):.3g}"]
        if self.row.get("kl") is not None:
            texts.append(f"KL {self.row['kl']:.3f}")
        return texts

    @property
    def seconds_per_step(self) -> float | None:
        """The mean of the latest steps, measurements included; None before the first."""
        return sum(self.paces) / len(self.paces) if self.paces else None

    def time_left_text(self) -> str:
        """The steps that remain at the pace of the latest ones, measurements included."""
        if not self.paces or self.is_done:
            return ""
        return f"{human_time((self.num_steps - self.step) * (self.seconds_per_step or 0))} left"


# --- words ----------------------------------------------------------------------------------------


def sparkline(values: Sequence[float] | deque[float], width: int) -> str:
    """The values as at most `width` blocks from lowest to highest, each the mean of its neighbours.

    >>> sparkline([8, 7, 6, 5, 4, 3, 2, 1], width=8), sparkline([3, 1, 2, 2], width=2), sparkline([5, 5], width=9)
    ('█▇▆▅▄▃▂▁', '▁▁', '▁▁')
    """
    known = [value for value in values if math.isfinite(value)]
    count = min(len(known), max(0, width))
    edges = [len(known) * k // count for k in range(count + 1)] if count else []
    means = [sum(known[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, spread = min(means, default=0.0), max(means, default=0.0) - min(means, default=0.0)
    return "".join(_BLOCKS[round((mean - low) / spread * (len(_BLOCKS) - 1)) if spread else 0] for mean in means)


def _loss(loss: float | None) -> str:
    return "–" if loss is None else f"{loss:.3f}"


def _way(scaled: float, now: float, base: float) -> str:
    """How much of the way from scaled to base is done. It is all of it only where the base is reached.

    >>> _way(3.417, 2.91, 2.85), _way(3.417, 2.8501, 2.85), _way(3.417, 2.85, 2.85), _way(2.8, 2.9, 2.85)
    ('89% of the way', '99% of the way', 'reached', '')
    """
    if now <= base:
        return "reached"
    if not scaled > base or not math.isfinite(now):
        return ""
    return f"{min(99, math.floor((scaled - now) / (scaled - base) * 100 + 1e-9))}% of the way"
