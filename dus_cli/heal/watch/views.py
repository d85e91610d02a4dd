"""What a person sees of a run: the rows of metrics.jsonl as they come, and how a terminal or a
log shows them.
"""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

from dus_cli.common.units import human_time
from dus_cli.console.terminal import is_live, say
from dus_cli.heal.watch.follower import MetricsFollower
from dus_cli.heal.watch.standing import Standing, loss_text, sparkline
from dus_cli.progress import ProgressMode

if TYPE_CHECKING:
    from rich.console import Console, RenderableType
    from typing_extensions import Self  # in typing from Python 3.11 on

# Seconds between two pictures on a terminal, and between two lines of a log that no measurement
# asks for.
_REDRAW, _PLAIN_INTERVAL = 0.1, 60.0

# Seconds after which a status says how long it has been true.
_PATIENCE = 10.0

# Columns of the labels on a terminal.
_LABEL = 11

# Columns that stay free at the right: a terminal writes ^C behind the last line, and must not begin
# another with it.
_ECHO = 4

# For terminals whose encoding has no such characters.
_ASCII = str.maketrans({"…": "...", "→": "->", "·": "|", "–": "-"})


class View(Protocol):
    """Told what a run does while it does it. A context manager, so that a terminal is left as it
    was.
    """

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

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        """The size of the run."""

    def update(self, follower: MetricsFollower) -> None:
        """Look for new rows, and show them. Called several times a second."""


def view_for(mode: ProgressMode) -> View:
    """The view of `--progress`: for auto a terminal's or a log's, as stderr is."""
    if mode is ProgressMode.none:
        return NoView()
    if mode is ProgressMode.json:
        from dus_cli.heal.watch.events import EventView

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

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        pass

    def update(self, follower: MetricsFollower) -> None:
        pass


class PlainView(NoView):
    """For logs: a line for each held-out measurement and each new status, and otherwise one a
    minute.
    """

    def __init__(self) -> None:
        self._standing = Standing(0, 0)
        # rows up to this step were told, also those that are there at the first look
        self._known = math.inf
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

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        self._standing = Standing(num_steps, tokens_per_step)

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
        # The last picture of a run stays above its report; a status that is over does not, and of a
        # run that ended otherwise nothing does: its time left and its bar are no longer true.
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
        # Until there are new rows a status says what to wait for. Later it is the end that has
        # begun.
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
        self._standing = Standing(num_steps, tokens_per_step)

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

        Some terminals break the lines that are there, others cut them, and tmux tells of it a
        quarter of a second later: nobody knows how many rows the last picture has now. Most
        terminals keep what is cleared to scroll to.
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
        if now.step:
            width = self._console.width - _ECHO - _LABEL - 8
            line = "" if self._console.options.ascii_only else sparkline(now.losses, min(width, 60))
            rows.append(("loss", f"{loss_text(now.loss):<7} {line}"))
        first, *others = now.heldout_texts()
        rows += [("held-out", first), *(("", text) for text in others)]
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
