"""In the launcher of a test: fork the process that tokenises, instead of starting a new one that
imports everything again.
"""

from __future__ import annotations

import os
import signal
from pathlib import Path
from types import SimpleNamespace
from typing import Any, BinaryIO

from dus_cli.heal.launch import tokenising

# Beside the log: the process's id.
PID = "tokenising.pid"


class ForkedProcess:
    """As much of subprocess.Popen as `tokenising.Tokenising` needs."""

    def __init__(self, command: list[str], stdout: BinaryIO, **_options: Any) -> None:
        read_end, self._write_end = os.pipe()
        self._code: int | None = None
        self.pid = os.fork()
        if not self.pid:
            os.close(self._write_end)
            os.setsid()
            for descriptor, opened in enumerate((read_end, stdout.fileno(), stdout.fileno())):
                os.dup2(opened, descriptor)
            os._exit(tokenising.main(command[-1:]))
        os.close(read_end)
        path = Path(stdout.name).with_name(PID)
        path.with_suffix(".new").write_text(str(self.pid))
        path.with_suffix(".new").rename(path)

    def poll(self) -> int | None:
        return self._wait(os.WNOHANG)

    def kill(self) -> None:
        if self._code is None:
            os.kill(self.pid, signal.SIGKILL)

    def communicate(self) -> None:
        os.close(self._write_end)
        self._wait(0)

    def _wait(self, options: int) -> int | None:
        if self._code is None:
            pid, status = os.waitpid(self.pid, options)
            self._code = os.waitstatus_to_exitcode(status) if pid else None
        return self._code


def fork_from_now_on() -> None:
    """Let the launcher fork. It must have used no threads of tokenizers, which a fork lacks."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenising.subprocess = SimpleNamespace(Popen=ForkedProcess, PIPE=None)  # type: ignore[attr-defined,assignment]
