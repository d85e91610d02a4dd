"""What a person sees while a model heals: a few live lines on a terminal, plain lines elsewhere. All on stderr.

The launcher learns how the run goes from metrics.jsonl alone, so a view can follow any run.
"""

from __future__ import annotations

import json
import math
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dus_cli.report import human_bytes

if TYPE_CHECKING:
    from rich.console import RenderableType
    from typing_extensions import Self  # in typing from Python 3.11 on

Row = dict[str, Any]

_BLOCKS = "▁▂▃▄▅▆▇█"
_SPARK_WIDTH = 40

# Seconds between two plain lines that tell nothing but progress.
_MINUTE = 60.0


class MetricsFollower:
    """The rows of a metrics.jsonl that grows, and that a restarted worker replaces by a shorter one."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._inode = -1
        self._offset = 0
        self.rows: list[Row] = []

    def poll(self) -> list[Row]:
        """Rows that are new since the last call. Those that a replaced file has kept are not new."""
        try:
            with self._path.open("rb") as file:
                status = os.fstat(file.fileno())
                if status.st_ino != self._inode or status.st_size < self._offset:
                    self._inode, self._offset = status.st_ino, 0
                file.seek(self._offset)
                text = file.read()
        except FileNotFoundError:  # not begun, or the finished model has just taken the folder's name
            return []
        whole = text[: text.rfind(b"\n") + 1]  # a line that is being written is left for the next time
        rows: list[Row] = [json.loads(line) for line in whole.splitlines()]
        before = self.rows if self._offset == 0 else []
        kept = next((i for i, pair in enumerate(zip(before, rows, strict=False)) if pair[0] != pair[1]), len(before))
        self.rows = rows if self._offset == 0 else self.rows + rows
        self._offset += len(whole)
        return rows[kept:]


class View(Protocol):
    """Told what happens. `update` is called several times a second."""

    def __enter__(self) -> Self: ...

    def __exit__(self, *_: object) -> None: ...

    def begin(self, num_steps: int, tokens_per_step: int) -> None: ...

    def status(self, text: str) -> None: ...

    def tokenising(self, done: int, total: int) -> None: ...

    def update(self, follower: MetricsFollower) -> None: ...


class QuietView:
    """Says nothing."""

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        pass

    def status(self, text: str) -> None:
        pass

    def tokenising(self, done: int, total: int) -> None:
        pass

    def update(self, follower: MetricsFollower) -> None:
        pass


class LineView(QuietView):
    """For logs: a line for each held-out measurement and change of state, else one a minute at most."""

    def __init__(self) -> None:
        self._num_steps = 0
        self._status = ""
        self._told = 0.0

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        self._num_steps = num_steps
        self._say(f"{num_steps:,} steps of {tokens_per_step:,} tokens")

    def status(self, text: str) -> None:
        if text != self._status:
            self._status = text
            self._say(f"{text} …")

    def tokenising(self, done: int, total: int) -> None:
        if time.monotonic() - self._told >= _MINUTE:
            self._say(f"tokenising: {human_bytes(done)} of {human_bytes(total)}")

    def update(self, follower: MetricsFollower) -> None:
        new = follower.poll()
        for count, row in enumerate(new, start=len(follower.rows) - len(new) + 1):
            if "eval_loss" in row or time.monotonic() - self._told >= _MINUTE:
                self._say(f"step {row['step']:,}/{self._num_steps:,}: {'; '.join(figures(follower.rows[:count]))}")

    def _say(self, text: str) -> None:
        self._told = time.monotonic()
        sys.stderr.write(f"{text}\n")
        sys.stderr.flush()


class LiveView(QuietView):
    """For a terminal: progress, losses with a sparkline, the line to reach, speed, time left."""

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(stderr=True)
        self._live = Live(console=self._console, refresh_per_second=4, transient=True)
        self._num_steps = 0
        self._tokens_per_step = 0
        self._status = ""
        self._rows: list[Row] = []

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._live.stop()

    def begin(self, num_steps: int, tokens_per_step: int) -> None:
        self._num_steps, self._tokens_per_step = num_steps, tokens_per_step

    def status(self, text: str) -> None:
        self._status = text
        self._draw()

    def tokenising(self, done: int, total: int) -> None:
        self._status = f"tokenising {human_bytes(done)} of {human_bytes(total)}"
        self._draw()

    def update(self, follower: MetricsFollower) -> None:
        if follower.poll():
            self._rows = follower.rows
            if self._status == "loading the model":
                self._status = ""
            self._draw()

    def _draw(self) -> None:
        self._live.update(self._picture())

    def _picture(self) -> RenderableType:
        from rich.console import Group
        from rich.progress_bar import ProgressBar
        from rich.table import Table
        from rich.text import Text

        if not self._rows:
            return Text(f"{self._status} …" if self._status else "")
        row = self._rows[-1]
        top = Table.grid(padding=(0, 1), expand=False)
        bar = ProgressBar(total=self._num_steps, completed=row["step"], width=max(10, self._console.width - 44))
        left = time_left(self._rows, self._num_steps)
        top.add_row(bar, f"step {row['step']:,}/{self._num_steps:,}", "" if left is None else f"{clock(left)} left")
        lines: list[RenderableType] = [top]
        losses = [math.nan if each["loss"] is None else each["loss"] for each in self._rows if "loss" in each]
        width = min(_SPARK_WIDTH, self._console.width - 20)
        if losses:
            lines.append(Text(f"loss     {losses[-1]:.4f}  {sparkline(losses, width)}", overflow="crop", no_wrap=True))
        for label, text in zip(("held-out", "speed   "), self._details(), strict=False):
            lines.append(Text(f"{label} {text}", overflow="ellipsis", no_wrap=True))
        if self._status:
            lines.append(Text(f"{self._status} …", style="yellow"))
        return Group(*lines)

    def _details(self) -> list[str]:
        row = self._rows[-1]
        found = [heldout(self._rows)]
        if "tokens_per_second" in row:
            skipped = sum(bool(each.get("skipped")) for each in self._rows)
            found.append(
                f"{row['tokens_per_second']:,.0f} tokens/s  mfu {row['mfu']:.0%}  lr {row['lr']:.1e}  "
                f"|g| {row['grad_norm'] or math.nan:.2f}  {human_bytes(row['peak_memory_bytes'])}"
                + (f"  {skipped} skipped" if skipped else "")
            )
        return found


def view_for(speaks: bool) -> View:
    """The view for this process's stderr."""
    if not speaks:
        return QuietView()
    return LiveView() if sys.stderr.isatty() else LineView()


def figures(rows: Sequence[Row]) -> list[str]:
    """The last row in words."""
    row = rows[-1]
    found = [f"{row['tokens']:,} tokens"]
    if row.get("loss") is not None:
        found.append(f"loss {row['loss']:.4f}")
    if "eval_loss" in row:
        found.append(f"held-out {heldout(rows)}")
    if "tokens_per_second" in row:
        found.append(f"{row['tokens_per_second']:,.0f} tokens/s")
    if row.get("skipped"):
        found.append("skipped: out of bounds")
    return found


def heldout(rows: Sequence[Row]) -> str:
    """The newest held-out loss, and how much of the way from the scaled model's to the base's it is.

    >>> heldout([{"eval_loss": 3.4, "base_loss": 2.9}, {"eval_loss": 3.0}])
    '3.0000 (scaled 3.4000 → base 2.9000, 80% of the way)'
    """
    measured = [row["eval_loss"] for row in rows if row.get("eval_loss") is not None]
    if not measured:
        return "not measured yet"
    now, scaled, base = measured[-1], measured[0], rows[0].get("base_loss")
    if base is None:
        return f"{now:.4f} (before {scaled:.4f})"
    way = f", {(scaled - now) / (scaled - base):.0%} of the way" if scaled > base else ""
    return f"{now:.4f} (scaled {scaled:.4f} → base {base:.4f}{way})"


def time_left(rows: Sequence[Row], num_steps: int) -> float | None:
    """Seconds to the last step, from the mean of the last fifty; evaluations counted in."""
    recent = [float(sum(row["seconds"].values())) for row in rows[-50:] if row["step"]]
    if not recent:
        return None
    return int(num_steps - rows[-1]["step"]) * sum(recent) / len(recent)


def clock(seconds: float) -> str:
    """A time as on a clock.

    >>> clock(59.6), clock(3725)
    ('1:00', '1:02:05')
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def sparkline(values: Sequence[float], width: int) -> str:
    """The last values as a row of blocks, each column the mean of its share. What is not finite is a gap.

    >>> sparkline([3.0, 2.0, 1.0, math.nan, 0.0], 5)
    '█▆▃ ▁'
    """
    each = max(1, math.ceil(len(values) / max(1, width)))
    groups = [[v for v in values[i : i + each] if math.isfinite(v)] for i in range(0, len(values), each)]
    means = [sum(group) / len(group) if group else None for group in groups]
    known = [mean for mean in means if mean is not None]
    if not known:
        return ""
    low, high = min(known), max(known)
    scale = (len(_BLOCKS) - 1) / (high - low) if high > low else 0.0
    return "".join(" " if mean is None else _BLOCKS[round((mean - low) * scale)] for mean in means)
