"""A dry run with a pilot makes the first steps of the very run, tells their speed and memory, and
leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from conftest import Run
from runs import processes, until

pytest.importorskip("torch")
pytest.importorskip("transformers")

OPTIONS = "--seq-length 32 --batch-tokens 128 --lr 3e-3 --holdout 5% --precision fp32".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pilot")
    tiny.write_corpus(folder / "corpus.jsonl")
    tiny.upscaled(tiny.write_base(folder / "base"), folder / "scaled")
    return folder


@pytest.fixture
def temporary(tmp_path: Path) -> Path:
    """Where a pilot makes its folder."""
    folder = tmp_path / "temporary"
    folder.mkdir()
    return folder


def in_folder(temporary: Path) -> str:
    """Python that has a command make its temporary folders there."""
    return f"import tempfile\ntempfile.tempdir = {str(temporary)!r}\n"


def arguments(home: Path, out: Path, *more: str) -> list[str | Path]:
    return ["heal", home / "scaled", "-o", out, "--data", home / "corpus.jsonl", *OPTIONS, *more]


def test_a_pilot_tells_speed_memory_and_the_time_of_the_run_and_adds_nothing_to_it(
    home: Path, temporary: Path
) -> None:
    out = home / "out"
    tiny.forked_dus(*arguments(home, out, "--steps", "1000", "--print-command", "-q"))
    before = {path: path.stat().st_mtime_ns for path in sorted(home.rglob("*"))}
    # another share is held out, so the tokens of OUT do not serve
    plain = tiny.forked_dus(*arguments(home, out, *"--holdout 10% --dry-run --json".split()))
    assert "pilot" not in plain.report
    assert {path: path.stat().st_mtime_ns for path in sorted(home.rglob("*"))} == before
    more = "--holdout 10% --dry-run --pilot 1s --json".split()
    run = tiny.forked_dus(
        *arguments(home, out, "--steps", "1000", *more),
        first=in_folder(temporary),
    )
    assert run.returncode == 0, run.stderr
    assert run.stderr == ""
    pilot = run.report["pilot"]
    assert 3 <= pilot["steps"] < 1000
    assert pilot["peak_memory_bytes"] > 1e8  # torch alone takes more
    assert pilot["seconds"] >= 1
    training = 1000 * 128 / pilot["tokens_per_second"]
    share = run.report["evaluation_share"]
    assert pilot["run_seconds"] == pytest.approx(training / (1 - share), rel=1e-3)
    assert pilot["worker_hours"] == pytest.approx(pilot["run_seconds"] / 3600, abs=1e-3)
    assert {path: path.stat().st_mtime_ns for path in sorted(home.rglob("*"))} == before
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize("how", [(), ("--stream",)], ids=["finished", "streamed"])
def test_a_dry_run_adds_no_tokens_to_a_run_that_has_some(
    home: Path, tmp_path: Path, how: tuple[str, ...]
) -> None:
    tokens = tmp_path / "out" / "tokens"
    tokens.mkdir(parents=True)
    run = tiny.forked_dus(*arguments(home, tmp_path / "out", "--steps", "2", "--dry-run", *how))
    assert run.returncode == 0, run.stderr
    assert list(tokens.iterdir()) == []


def test_a_pilot_ends_with_a_run_that_is_shorter(home: Path, temporary: Path) -> None:
    more = "--steps 2 --dry-run --pilot 1h --nproc-per-node 2 --stream".split()
    run = tiny.forked_dus(*arguments(home, home / "out", *more), first=in_folder(temporary))
    assert run.returncode == 0, run.stderr
    assert "(2 steps in" in run.stdout
    assert "at this speed the run takes" in run.stdout
    assert list(temporary.iterdir()) == []


def rows(temporary: Path) -> list[dict[str, Any]]:
    """The complete lines of the metrics of the pilot that runs there."""
    found = [path.read_bytes().split(b"\n")[:-1] for path in temporary.glob("*/metrics.jsonl")]
    return [json.loads(line) for line in (found or [[]])[0]]


@pytest.fixture
def endless(home: Path, tmp_path: Path, temporary: Path) -> tuple[Any, Callable[[], Run]]:
    """A pilot that has made three steps and would make many more, and what it leaves at its end."""
    log = tmp_path / "log"
    more = ("--steps", "100000", "--dry-run", "--pilot", "1h", "-q")
    process = tiny.start_dus(
        log, *arguments(home, tmp_path / "out", *more), first=in_folder(temporary)
    )
    assert until(lambda: len(rows(temporary)) >= 3 or not process.is_alive())

    def ended() -> Run:
        code = tiny.wait(process)
        return Run((), code, log.read_text(), Path(f"{log}.err").read_text())

    return process, ended


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_pilot_makes_the_first_steps_of_the_run_and_a_signal_removes_it(
    home: Path,
    tmp_path: Path,
    temporary: Path,
    endless: tuple[Any, Callable[[], Run]],
    signum: signal.Signals,
    code: int,
) -> None:
    process, ended = endless
    first = rows(temporary)[:3]
    os.kill(process.pid, signum)
    stopped = ended()
    assert stopped.returncode == code
    assert stopped.stderr == (
        f"error: ended by {signum.name} in the pilot, of which nothing is kept\n"
    )
    assert list(temporary.iterdir()) == []
    assert not (tmp_path / "out").exists()
    if signum == signal.SIGTERM:
        return
    # warm-up is a share of the run, so a run of three steps would have other rates
    assert [row["lr"] for row in first] == pytest.approx([3e-3 * n / 2000 for n in (1, 2, 3)])


def test_a_pilot_whose_worker_dies_says_so_in_one_line(
    temporary: Path, endless: tuple[Any, Callable[[], Run]]
) -> None:
    _, ended = endless
    (folder,) = temporary.iterdir()
    (worker,) = processes(folder)["worker"]
    os.kill(worker, signal.SIGKILL)
    died = ended()
    assert died.returncode == 1
    assert died.stderr.startswith("error: a worker of the pilot died, killed from outside or out ")
    assert died.stderr.count("\n") == 1
    assert list(temporary.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "why"),
    [
        (("--pilot", "2m"), "--pilot is a part of --dry-run; give it too"),
        (("--dry-run", "--pilot", "2"), "'2' is not a time of 1s or more; write 30s, 2m or 1h"),
        (("--dry-run", "--pilot", "0s"), "'0s' is not a time of 1s or more"),
        (
            "--dry-run --pilot 2m --nnodes 2 --rdzv-endpoint a:1".split(),
            "--pilot starts the workers of this node only; leave out --nnodes",
        ),
    ],
)
def test_what_a_pilot_cannot_do_is_one_line(home: Path, more: tuple[str, ...], why: str) -> None:
    run = tiny.forked_dus(*arguments(home, home / "out", *more))
    run.assert_one_line_error(why, code=2)
