"""Exports pushed to the Hub while training goes on, each by `dus push` in its own process."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from dus_cli.heal.run import SavingPlan


@dataclass
class Pusher:
    """One push at a time. A failed one ends nothing, and the next export is pushed all the same."""

    keeping: SavingPlan
    logs: Path
    _process: subprocess.Popen[str] | None = None
    _step: int = 0
    _waiting: tuple[int, Path] | None = None
    _output: IO[str] | None = field(default=None, repr=False)

    def push(self, step: int, folder: Path) -> None:
        """Push the export of a step, after the push that runs; one that waits gives way to it."""
        self._waiting = step, folder
        if self._process is None:
            self._start()

    def outcome(self) -> dict[str, Any] | None:
        """The outcome of the push that ended since the last call, if one did: `step`, and `commit`
        or `error`.
        """
        if self._process is None or self._process.poll() is None:
            return None
        code, self._process = self._process.returncode, None
        assert self._output is not None
        with self._output as file:
            file.seek(0)
            said = file.read().strip()
        outcome: dict[str, Any] = {"step": self._step}
        if code == 0:
            outcome["commit"] = json.loads(said.splitlines()[-1])["push"]["commit"]
        else:
            last = said.splitlines()[-1] if said else f"dus push ended with {code}"
            outcome["error"] = last.removeprefix("error: ")
        if self._waiting is not None:
            self._start()
        return outcome

    @property
    def is_busy(self) -> bool:
        return self._process is not None

    def stop(self) -> None:
        """End the push that runs; what was sent stays on the Hub."""
        self._waiting = None
        if self._process is not None:
            self._process.terminate()

    def _start(self) -> None:
        assert self._waiting is not None
        (self._step, folder), self._waiting = self._waiting, None
        keeping = self.keeping
        command = [sys.executable, "-m", "dus_cli", "push", str(folder), str(keeping.push_to)]
        command += ["--branch", str(keeping.push_branch), "--json"]
        command += ["--private"] if keeping.push_private else []
        # the worker is offline, and what a job's launcher has set is about workers
        environment = {
            name: value for name, value in os.environ.items() if name != "HF_HUB_OFFLINE"
        }
        self.logs.mkdir(exist_ok=True)
        self._output = (self.logs / "push.log").open("w+", encoding="utf-8")
        self._process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=self._output,
            stderr=subprocess.STDOUT,
            env=environment,
            text=True,
        )
