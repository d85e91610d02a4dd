"""The progress of a run for a person, on a terminal or in a log."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dus_cli.common.units import human_time
from dus_cli.console.terminal import is_live, say
from dus_cli.heal.watch.follower import MetricsFollower
from dus_cli.heal.watch.run_state import RunState, loss_text, sparkline
from dus_cli.progress import ProgressMode

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from typing_extensions import Self  # in typing from Python 3.11 on

# Seconds between two pictures on a terminal, and between two lines of a log without a measurement.
_REDRAW, _PLAIN_INTERVAL = 0.1, 60.0

# Seconds after which a status shows how long it has lasted.
_PATIENCE = 10.0

# The width of the labels on a terminal.
_LABEL = 11

# Columns left free at the right, because a terminal writes ^C after the last line and must not wrap
# it.
_ECHO = 4

# Replacements for encodings that lack these characters.
_ASCII = str.maketrans({"…": "...", "→": "->", "·": "|", "–": "-", "±": "+-"})


class View(Protocol):
    """Shows what a run does while it runs. A context manager, so that a terminal is restored."""

    def __enter__(self) -> Self: ...

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None: ...

    def note(self, text: str) -> None:
        """Show a line that stays, such as a warning."""

    def status(self, text: str) -> None:
        """Show what goes on until the next call, such as "loading the model"."""

    def tokenising(self, done: int, total: int) -> None:
        """Show how far the data are tokenised, in bytes."""

    def plan(self, lines: Sequence[str], record: dict[str, Any], /) -> None:
        """Show what the run will do: lines for a person, and the record for JSON."""

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        """Take the size of the run, before the first `update`."""

    def update(self, follower: MetricsFollower) -> None:
        """Show new rows of metrics.jsonl; called several times a second."""


def view_for(mode: ProgressMode) -> View:
    """The view for `--progress`; auto is a terminal's or a log's, depending on stderr."""
    if mode is ProgressMode.none:
        return NoView()
    if mode is ProgressMode.json:
        from dus_cli.heal.watch.events import EventView

        return EventView()
    return LiveView() if mode is ProgressMode.auto and is_live() else PlainView()


class NoView:
    """Shows nothing."""

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

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        pass

    def update(self, follower: MetricsFollower) -> None:
        pass


class PlainView(NoView):
    """For logs: a line for each held-out measurement and status, and otherwise one a minute."""

    def __init__(self) -> None:
        self._state = RunState(0, 0)
        # Rows up to this step are not shown again; at first infinite, so that the rows of a resumed
        # run's earlier steps are not shown either.
        self._last_step = math.inf
        self._written_at = time.monotonic()

    def note(self, text: str) -> None:
        self._write(text)

    def status(self, text: str) -> None:
        self._write(f"{text} …")

    def tokenising(self, done: int, total: int) -> None:
        if total and self._is_due():
            self._write(f"tokenising: {done / total:.0%}")

    def plan(self, lines: Sequence[str], _record: dict[str, Any], /) -> None:
        for line in lines:
            self.note(line)

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        self._state = RunState(num_steps, tokens_per_step)

    def update(self, follower: MetricsFollower) -> None:
        rows = follower.poll()
        shown_step = self._last_step if follower.starts_over else -1
        if follower.starts_over:
            self._state = self._state.without_rows()
        for row in rows:
            self._state.add(row)
            for text in () if follower.starts_over else self._state.notes:
                self.note(text)
            if self._state.is_measured and row["step"] > shown_step:
                self._write(self._state.line())
        self._last_step = self._state.step
        if 0 < self._state.step < shown_step < math.inf:
            self._write(self._state.resumed_text())
        elif rows and self._state.is_done and self._state.step > shown_step:
            self.status("saving")
        elif rows and self._is_due():
            self._write(self._state.line())

    def _is_due(self) -> bool:
        return time.monotonic() - self._written_at >= _PLAIN_INTERVAL

    def _write(self, line: str) -> None:
        is_utf8 = sys.stderr.encoding.lower().startswith("utf")
        say(line if is_utf8 else line.translate(_ASCII))
        self._written_at = time.monotonic()


class LiveView:
    """For terminals: a few lines that are redrawn in place.

    They are drawn by its methods, not by a thread, because the launcher forks.
    """

    def __init__(self, console: Console | None = None) -> None:
        from rich.console import Console as RichConsole
        from rich.live import Live

        self._console = console or RichConsole(stderr=True)
        self._live = Live(console=self._console, auto_refresh=False)
        self._state = RunState(0, 0)
        self._status, self._status_passes, self._status_since = "", True, 0.0
        self._is_training = False
        self._tokenised: float | None = None
        self._drawn_at = 0.0
        self._drawn_width: int | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # After a finished run the last picture stays above the report, without a status. After any
        # other end it is removed, because its bar and time left are no longer true.
        self._status, self._tokenised = "", None
        self._settle()
        self._live.update(self._picture())
        self._live.transient = kind is not None or not self._state.has_begun
        self._live.stop()

    def note(self, text: str) -> None:
        self._settle()
        self._console.print(self._plain(text), markup=False, highlight=False)

    def status(self, text: str) -> None:
        self._tokenised = None
        # Before training, a status ends with the next rows; later it is about the end of the run.
        self._set_status(text, passes=not self._is_training)
        self._draw(at_once=True)

    def tokenising(self, done: int, total: int) -> None:
        self._tokenised = min(1.0, done / total) if total else None
        self._draw()

    def plan(self, lines: Sequence[str], _record: dict[str, Any], /) -> None:
        for line in lines:
            self.note(line)

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        self._tokenised = None
        self._state = RunState(num_steps, tokens_per_step)

    def update(self, follower: MetricsFollower) -> None:
        rows, before = follower.poll(), self._state.step
        if follower.starts_over:
            self._state = self._state.without_rows()
        for row in rows:
            self._state.add(row)
            for text in () if follower.starts_over else self._state.notes:
                self.note(text)
        if rows and not follower.starts_over:
            self._is_training = True
        if self._status_passes:
            if self._is_training and self._state.step < before:
                self._set_status(self._state.resumed_text(), passes=True)
            elif rows and not follower.starts_over:
                self._status = ""
        if self._state.is_done and not self._status:
            self._set_status("saving", passes=False)
        self._draw()

    def _set_status(self, text: str, *, passes: bool) -> None:
        self._status, self._status_passes, self._status_since = text, passes, time.monotonic()

    def _draw(self, *, at_once: bool = False) -> None:
        now = time.monotonic()
        if at_once or now - self._drawn_at >= _REDRAW:
            self._drawn_at = now
            self._live.start()  # does nothing but the first time
            self._settle()
            self._live.update(self._picture(), refresh=True)

    def _settle(self) -> None:
        """Clear the screen if its width changed, because the number of rows of the last picture is
        then unknown: some terminals wrap its lines, others cut them, and tmux reports the change a
        quarter of a second late. Most terminals keep what is cleared in their scrollback.
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
        if self._state.has_begun:
            now = self._state
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
        now = self._state
        rows = [("step", now.step_text(" · "))]
        if now.step:
            width = self._console.width - _ECHO - _LABEL - 8
            line = "" if self._console.options.ascii_only else sparkline(now.losses, min(width, 60))
            rows.append(("loss", f"{loss_text(now.loss):<7} {line}"))
        first, *others = now.heldout_texts()
        rows += [("held-out", first), *(("", text) for text in others)]
        if now.tasks:
            rows.append(("tasks", now.tasks_text()))
        if now.step:
            rows.append(("speed", " · ".join(now.speed_texts())))
            rows.append(("optimizer", " · ".join(now.optimizer_texts())))
        return rows

    def _row(self, label: str, value: str) -> RenderableType:
        from rich.text import Text

        return Text.assemble(
            (f"{label:<{_LABEL}}", "dim"), self._plain(value), no_wrap=True, overflow="crop"
        )

    def _bar(self, share: float, left: str) -> RenderableType:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        grid = Table.grid(padding=(0, 2), expand=True)
        grid.add_column(ratio=1)
        grid.add_column(no_wrap=True)
        grid.add_column(no_wrap=True)
        grid.add_row(
            ProgressBar(total=1.0, completed=share),
            f"{math.floor(share * 100):>3}%",
            self._plain(left),
        )
        return grid

    def _plain(self, text: str) -> str:
        return text.translate(_ASCII) if self._console.options.ascii_only else text
