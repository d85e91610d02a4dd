"""Fixtures: checkpoints whose bytes are their layer's number, and the real command, run as a user
runs it.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint

DUS = [sys.executable, "-m", "dus_cli"]


def _restore_signals_for_children() -> None:
    """Let the commands that the suite starts handle signals, even if the suite was started with
    signals ignored (`nohup … &`) or blocked, both of which children inherit.

    A handler that does nothing takes the place of "ignore": the suite is not ended by the signal,
    and execve(2) gives a started program the default handler.
    """
    for signum in (
        signal.SIGINT,
        signal.SIGTERM,
        signal.SIGHUP,
        signal.SIGQUIT,
        signal.SIGUSR1,
        signal.SIGUSR2,
    ):
        if signal.getsignal(signum) is signal.SIG_IGN:
            signal.signal(signum, lambda _signum, _frame: None)
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # else exit codes are lost
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


_restore_signals_for_children()

# By default the collector looks for cycles after every 700 new objects, which took a sixth of the
# time of the tests that build models.
gc.set_threshold(50_000)

# pytest imports readline, which sets these for children such as the workers of pytest-xdist.
for _width in ("COLUMNS", "LINES"):
    os.environ.pop(_width, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --no-loadscope-reorder, use xdist's order (files with many tests first), but start the
    long chains of two files with few tests first.
    """
    if not config.getoption("loadscopereorder", default=True):
        num_tests = Counter(item.path for item in items)
        long = ("test_extras.py", "test_heal_hosts.py")
        items.sort(key=lambda item: (item.path.name not in long, -num_tests[item.path]))


class Run(subprocess.CompletedProcess[str]):
    """A finished `dus` command, with the report that it printed."""

    @property
    def report(self) -> dict[str, Any]:
        assert self.returncode == 0, self.stderr
        report: dict[str, Any] = json.loads(self.stdout)
        return report

    def assert_one_line_error(self, *parts: str, code: int = 1) -> None:
        """Check the exit code, a single line on stderr with all parts, and an empty stdout."""
        assert self.returncode == code, (self.returncode, self.stderr)
        assert self.stdout == ""
        assert self.stderr.startswith("error: ")
        assert self.stderr.count("\n") == 1, self.stderr
        for part in parts:
            assert part in self.stderr


def dus(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Run:
    """Run the command in a new process. Use -q or --json for a stderr without progress."""
    done = subprocess.run(
        [*DUS, *map(str, arguments)],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
        env={**os.environ, **environment},
    )
    return Run(done.args, done.returncode, done.stdout, done.stderr)


@pytest.fixture
def base(tmp_path: Path) -> Path:
    """Eight Llama layers in one file; every byte of layer k is k, all other bytes are 0xEE."""
    return write_checkpoint(tmp_path / "base", llama_tensors(8), llama_config(8))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same checkpoint in five shards."""
    return write_checkpoint(tmp_path / "sharded", llama_tensors(8), llama_config(8), num_shards=5)


@pytest.fixture
def edit_config() -> Callable[..., None]:
    """Change fields of a checkpoint's config.json; None removes one."""

    def edit(folder: Path, **fields: object) -> None:
        path = folder / "config.json"
        config = json.loads(path.read_text()) | fields
        path.write_text(
            json.dumps({key: value for key, value in config.items() if value is not None})
        )

    return edit


@pytest.fixture(params=["xfs", "btrfs"])
def reflinks(tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Path]:
    """A loop mount with reflinks; skips the test if there is no root or no mkfs."""
    image, folder = tmp_path / "image", tmp_path / "mounted"
    folder.mkdir()
    if shutil.which(f"mkfs.{request.param}") is None:
        pytest.skip(f"mkfs.{request.param} is not installed")
    with image.open("wb") as file:
        file.truncate(400 << 20)
    subprocess.run([f"mkfs.{request.param}", "-q", image], check=True, capture_output=True)
    if subprocess.run(
        ["mount", "-o", "loop", image, folder], check=False, capture_output=True
    ).returncode:
        pytest.skip("mounting needs root and a loop device")
    yield folder
    subprocess.run(["umount", folder], check=True)
