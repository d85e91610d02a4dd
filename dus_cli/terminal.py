"""Progress for a person: a bar on a terminal, plain lines elsewhere, nothing when quiet. All on stderr."""

from __future__ import annotations

import shutil
import sys
from typing import TYPE_CHECKING

from dus_cli.planning import UpscalePlan
from dus_cli.report import human_bytes, plan_text

if TYPE_CHECKING:
    from rich.progress import Progress as Bar
    from rich.progress import TaskID
    from typing_extensions import Self  # in typing from Python 3.11 on


def print_plan(plan: UpscalePlan) -> None:
    """The drawing of the layer map, as wide as the terminal."""
    print(plan_text(plan, shutil.get_terminal_size().columns), end="\n\n", file=sys.stderr, flush=True)


class PlainProgress:
    """The drawing, then a line when a stage begins, for logs."""

    def planned(self, plan: UpscalePlan) -> None:
        print_plan(plan)

    def note(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def start(self, what: str, total: int) -> None:
        print(f"{what} {human_bytes(total)} …", file=sys.stderr, flush=True)

    def advance(self, num_bytes: int) -> None:
        pass


class BarProgress:
    """A bar in bytes with speed and time left. Use as a context manager."""

    def __init__(self) -> None:
        # rich takes as long to import as a reflinked upscale takes to run: for terminals only.
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            DownloadColumn,
            Progress,
            TextColumn,
            TimeRemainingColumn,
            TransferSpeedColumn,
        )

        self._bar: Bar = Progress(
            TextColumn("{task.description}"),
            BarColumn(),
            DownloadColumn(),
            TransferSpeedColumn(),
            TimeRemainingColumn(),
            console=Console(stderr=True),
        )
        self._task: TaskID | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def planned(self, plan: UpscalePlan) -> None:
        print_plan(plan)

    def note(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def start(self, what: str, total: int) -> None:
        self._bar.start()  # not earlier: huggingface_hub's own bars come before
        self._task = self._bar.add_task(what, total=total)

    def advance(self, num_bytes: int) -> None:
        assert self._task is not None
        self._bar.advance(self._task, num_bytes)
