"""Two runs at once: the second is told who has the place, and a process that died has nothing."""

from __future__ import annotations

import fcntl
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from forked import dus

from dus_cli.common.locks import holder, this_process
from dus_cli.errors import HealError
from dus_cli.heal import checkpoints_folder

HOLD = (
    "import fcntl, os, sys, time; fcntl.flock(os.open(sys.argv[1], os.O_RDONLY), fcntl.LOCK_EX); "
    "print('held', flush=True); time.sleep(1e6)"
)


@contextmanager
def held(path: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of a file or folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        try:
            yield process
        finally:
            process.kill()


def test_upscale_into_what_another_process_writes_names_its_pid_its_host_and_since_when(
    base: Path, tmp_path: Path
) -> None:
    (tmp_path / ".out.partial").mkdir()
    with held(tmp_path / ".out.partial") as process:
        done = dus("upscale", base, "-o", tmp_path / "out", "-q")
        done.assert_one_line_error(
            f"(process {process.pid} on {socket.gethostname()}, since 20", "is writing"
        )
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert dus("upscale", base, "-o", tmp_path / "out", "-q").returncode == 0, (
            "the dead hold no lock"
        )


def test_heal_into_what_another_process_heals_names_it(tmp_path: Path) -> None:
    folder = tmp_path / "out/checkpoints"
    folder.mkdir(parents=True)
    with held(folder) as process:
        with pytest.raises(
            HealError,
            match=rf"healing into .*out at this moment \(process {process.pid} on .*stop it",
        ):
            checkpoints_folder.check_unlocked(folder)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        checkpoints_folder.check_unlocked(folder)


def test_who_holds_a_lock_is_told_as_it_tells_itself(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    path.touch()
    file = os.open(path, os.O_RDONLY)
    fcntl.flock(file, fcntl.LOCK_EX)
    assert holder(file) == this_process()
    os.close(file)


def test_a_lock_that_this_machine_does_not_know_is_another_machines(tmp_path: Path) -> None:
    file = os.open(tmp_path, os.O_RDONLY)
    assert "another machine" in holder(file)
    os.close(file)
