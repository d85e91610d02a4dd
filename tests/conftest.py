"""Fixtures: checkpoints whose bytes tell their layer, and the real command run as a user runs
it.
"""

from __future__ import annotations

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


def _let_children_have_their_signals() -> None:
    """What the suite was started with ignored (`nohup … &`), commands that it starts would ignore
    too.

    A handler that does nothing keeps such a signal from the suite, and a program that it starts has
    the default again (execve(2)). What was blocked stays blocked across both, so it is unblocked.
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
    if signal.getsignal(signal.SIGCHLD) is signal.SIG_IGN:  # else no exit code ever arrives
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, [])


_let_children_have_their_signals()

# pytest imports readline, which tells children a width that nobody asked for; pytest-xdist's
# workers are such children.
for _width in ("COLUMNS", "LINES"):
    os.environ.pop(_width, None)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """With --no-loadscope-reorder, xdist's order (files of many tests first), but the extras'
    long chain before all.
    """
    if not config.getoption("loadscopereorder", default=True):
        num_tests = Counter(item.path for item in items)
        items.sort(key=lambda item: (item.path.name != "test_extras.py", -num_tests[item.path]))


class Run(subprocess.CompletedProcess[str]):
    """A finished `dus`, with its report when it printed one."""

    @property
    def report(self) -> dict[str, Any]:
        assert self.returncode == 0, self.stderr
        report: dict[str, Any] = json.loads(self.stdout)
        return report

    def assert_one_line_error(self, *parts: str, code: int = 1) -> None:
        """Exit code, one line on stderr that holds all parts, nothing on stdout, no traceback."""
        assert self.returncode == code, (self.returncode, self.stderr)
        assert self.stdout == ""
        assert self.stderr.startswith("error: ")
        assert self.stderr.count("\n") == 1, self.stderr
        for part in parts:
            assert part in self.stderr


def dus(*arguments: str | Path, cwd: Path | None = None, **environment: str) -> Run:
    """Run the command. Errors are quiet of progress with -q or --json, as a pipeline would have
    it.
    """
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
    """Eight Llama layers in one file; every byte of layer k is k, of all else 0xEE."""
    return write_checkpoint(tmp_path / "base", llama_tensors(8), llama_config(8))


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """The same in five shards."""
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
    """A loop mount with reflinks; skipped where it cannot be made (no root, no mkfs)."""
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
