"""`--progress`, and streams that nobody reads: results on stdout, all else on stderr, quiet
ends.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from conftest import DUS, Run, dus
from hub_server import StandInHub, StandInRepo, commit_of

from dus_cli.commands.options import progress_for
from dus_cli.console import events
from dus_cli.console.terminal import BarProgress, PlainProgress
from dus_cli.progress import NoProgress, ProgressMode

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_checkpoint(
        tmp_path_factory.mktemp("model") / "base", llama_tensors(8), llama_config(8)
    )


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that stages go by, in its only entry."""
    now = [1000.0]
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    return now


def told(stderr: str) -> list[dict[str, Any]]:
    """The events of a run; every line is one."""
    return [json.loads(line) for line in stderr.splitlines()]


# --- events ---------------------------------------------------------------------------------------


def test_json_progress_is_events_on_stderr_beside_the_report_on_stdout(
    model: Path, tmp_path: Path
) -> None:
    done = dus(
        "upscale", model, "-o", tmp_path / "out", "--json", "--progress", "json", "--verify", "full"
    )
    plan, *stages, end = told(done.stderr)
    assert plan == {
        "event": "plan",
        "model": str(model),
        "commit": None,
        "num_layers": {"base": 8, "output": 12},
        "layers": "0:6,2:8",
        "bytes": done.report["bytes"],
    }
    marks = [
        (event["stage"], event["event"], event["done"])
        for event in stages
        if event["event"] != "progress"
    ]
    size = done.report["bytes"]
    assert marks == [
        (stage, *mark)
        for stage in ("writing", "verifying")
        for mark in (("start", 0), ("end", size))
    ]
    assert {event["total"] for event in stages} == {size}
    assert {event["unit"] for event in stages} == {"bytes"}
    assert stages[0]["bytes_per_second"] is stages[0]["eta_seconds"] is None
    assert stages[1]["bytes_per_second"] > 0
    assert stages[1]["eta_seconds"] == 0
    assert end == {"event": "exit", "exit_code": 0, "error": None}


@pytest.mark.parametrize(
    ("arguments", "code", "why"),
    [
        (("upscale", "nowhere", "-o", "out", "--progress", "json"), 1, "nowhere"),
        (("upscale", "nowhere", "--progress=json"), 2, "'--output' / '-o'"),
        (("upscale", "{model}", "-o", "out", "--trim", "9", "--progress", "json"), 1, "use 0 to 3"),
        (
            (
                "upscale",
                "{model}",
                "-o",
                "out",
                "--trim",
                "1",
                "--layers",
                "0:8",
                "--progress",
                "json",
            ),
            2,
            "leave out",
        ),
        (("verify", "nowhere", "--progress", "json"), 1, "not a directory"),
        (("heal", "nowhere", "--data", "nowhere", "--progress", "json"), 1, "nowhere"),
    ],
)
def test_a_failure_is_an_event_too(
    model: Path, tmp_path: Path, arguments: tuple[str, ...], code: int, why: str
) -> None:
    done = dus(*(argument.format(model=model) for argument in arguments), cwd=tmp_path)
    assert done.returncode == code
    assert done.stdout == ""
    (event,) = told(done.stderr)
    assert event == {"event": "exit", "exit_code": code, "error": event["error"]}
    assert why in event["error"]


def test_every_field_of_an_event_is_documented(model: Path, tmp_path: Path) -> None:
    layout = (ROOT / "docs/layout.md").read_text(encoding="utf-8")
    section = layout[layout.index("## Events of `--progress json`") :]
    done = dus("upscale", model, "-o", tmp_path / "out", "--progress", "json", "-q")
    for event in told(done.stderr):
        assert f"`{event['event']}`" in section
        for name in event:
            assert f"`{name}`" in section, name


def test_a_stage_has_a_first_event_a_last_one_and_two_a_second_between(
    clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with events.JsonProgress() as progress:
        progress.start("writing", 10_000)
        for _ in range(1000):
            clock[0] += 0.01
            progress.advance(10)
        progress.start("uploading", None, "files")
        progress.note("once more")
    (first, *some, last), others = (told_ := told(capsys.readouterr().err))[:-3], told_[-3:]
    assert (first["event"], last["event"]) == ("start", "end")
    assert {event["event"] for event in some} == {"progress"}
    assert 15 <= len(some) <= 21
    assert some[0]["bytes_per_second"] == pytest.approx(1000)
    # to a tenth of a second
    assert some[0]["done"] + some[0]["eta_seconds"] * 1000 == pytest.approx(10_000, abs=100)
    assert (last["done"], last["seconds"]) == (10_000, pytest.approx(10))
    assert [event["event"] for event in others] == ["start", "note", "end"]
    assert others[0]["files_per_second"] is others[0]["total"] is None


def test_a_stage_that_fails_has_no_end(capsys: pytest.CaptureFixture[str]) -> None:
    def fail() -> None:
        with events.JsonProgress() as progress:
            progress.start("writing", 10)
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [event["event"] for event in told(capsys.readouterr().err)] == ["start"]


@pytest.mark.parametrize(
    "view", [events.JsonProgress, lambda: PlainProgress(draw), lambda: BarProgress(draw)]
)
def test_many_threads_may_advance_at_once(
    view: Any, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    with view() as progress:
        progress.start("writing", 8000)

        def work() -> None:
            for _ in range(1000):
                progress.advance(1)

        threads = [threading.Thread(target=work) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert progress._stage.done == 8000


def draw(plan: Any, width: int) -> str:
    return "a drawing of the plan"


# --- lines and bars -------------------------------------------------------------------------------


def test_a_log_has_a_line_a_minute(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with PlainProgress(draw) as progress:
        progress.start("writing", 20_000_000_000)
        for _ in range(100):
            clock[0] += 2
            progress.advance(100_000_000)
        progress.start("measuring", 12, "maps")
    lines = capsys.readouterr().err.splitlines()
    assert lines[0] == "writing 20.00 GB …"
    assert lines[1] == "writing: 3.00 GB of 20.00 GB, 50.00 MB/s, 6 min left"
    assert [line.split(" of ")[0] for line in lines[2:-1]] == [
        "writing: 6.00 GB",
        "writing: 9.00 GB",
    ]
    assert lines[-1] == "measuring 12 maps …"


def test_a_bar_says_amounts_and_speed_in_its_unit(
    clock: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    with BarProgress(draw) as bar:
        bar.start("measuring", 12, "maps")
        clock[0] += 2
        bar.advance(3)
        assert "3 maps of 12 maps, 2 maps/s" in bar._bar.tasks[0].fields["amounts"]


def test_auto_is_silent_with_q_or_json_and_what_was_named_stays(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def kind(mode: str, *, quiet: bool) -> type:
        with progress_for(ProgressMode(mode), quiet=quiet) as chosen:
            return type(chosen)

    assert kind("auto", quiet=True) is kind("none", quiet=False) is NoProgress
    assert kind("auto", quiet=False) is kind("plain", quiet=True) is PlainProgress
    assert kind("json", quiet=True) is kind("json", quiet=False) is events.JsonProgress
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert kind("auto", quiet=False) is BarProgress
    assert kind("plain", quiet=False) is PlainProgress
    monkeypatch.setenv("TERM", "dumb")
    assert kind("auto", quiet=False) is PlainProgress


def test_none_says_errors_only(model: Path, tmp_path: Path) -> None:
    assert dus("upscale", model, "-o", tmp_path / "out", "--progress", "none").stderr == ""
    done = dus("upscale", model, "-o", tmp_path / "out", "--progress", "none", "--trim", "1")
    done.assert_one_line_error("not empty")


# --- streams that nobody reads --------------------------------------------------------------------


def shell(line: str, cwd: Path) -> Run:
    done = subprocess.run(
        ["bash", "-c", line.replace("dus ", f"{' '.join(DUS)} ")],
        capture_output=True,
        text=True,
        check=False,
        cwd=cwd,
    )
    return Run(done.args, done.returncode, done.stdout, done.stderr)


@pytest.mark.parametrize(
    ("command", "unbuffered"),
    [
        ("--help", "1"),
        ("heal --help", ""),
        ("upscale {model} -o out --dry-run", "1"),
        ("verify {model} --json", ""),
    ],
)
def test_a_closed_pipe_is_quiet_and_has_the_code_of_sigpipe(
    model: Path, tmp_path: Path, command: str, unbuffered: str
) -> None:
    line = (
        f"export PYTHONUNBUFFERED={unbuffered}; dus {command.format(model=model)} | true; exit "
        f"${{PIPESTATUS[0]}}"
    )
    done = shell(line, tmp_path)
    assert done.returncode == 141
    assert "Error" not in done.stderr
    assert "error" not in done.stderr


@pytest.mark.parametrize("mode", ["plain", "json"])
def test_where_nobody_reads_stderr_the_work_goes_on(model: Path, tmp_path: Path, mode: str) -> None:
    line = (
        f"dus upscale {model} -o out --progress {mode} 2>&1 >report | true; exit ${{PIPESTATUS[0]}}"
    )
    assert shell(line, tmp_path).returncode == 0
    assert "Wrote out" in (tmp_path / "report").read_text(encoding="utf-8")
    assert dus("verify", tmp_path / "out", "--base", model, "-q").returncode == 0
    line = (
        f"dus upscale {model} -o out --trim 1 --progress {mode} 2>&1 >report | true; exit "
        f"${{PIPESTATUS[0]}}"
    )
    if mode == "plain":  # an error that nobody reads
        assert shell(line, tmp_path).returncode == 1


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&- <&-"])
def test_closed_streams_are_as_dev_null(model: Path, tmp_path: Path, closed: str) -> None:
    done = shell(f"dus upscale {model} -o out {closed}", tmp_path)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert dus("verify", tmp_path / "out", "--base", model, "-q").returncode == 0


@pytest.mark.parametrize("unbuffered", ["", "1"])
def test_results_that_find_no_room_are_a_failure(
    model: Path, tmp_path: Path, unbuffered: str
) -> None:
    done = shell(f"PYTHONUNBUFFERED={unbuffered} dus verify {model} --json >/dev/full", tmp_path)
    done.assert_one_line_error("No space left on device")
    assert shell(f"dus verify {model} --json 2>/dev/full", tmp_path).report["sound"]


# --- from the Hub ---------------------------------------------------------------------------------


def test_fetching_is_a_stage_of_its_own_and_is_none_when_all_is_cached(
    model: Path, tmp_path: Path
) -> None:
    commit = commit_of("model")
    with StandInHub({"org/model": StandInRepo({commit: model}, {"main": commit})}) as hub:
        where: Any = {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path / "hf")}
        where["HF_HUB_DISABLE_PROGRESS_BARS"] = (
            "0"  # asks for bars, which have no place among events
        )
        done = dus(
            "upscale", "org/model", "-o", tmp_path / "out", "--progress", "json", "-q", **where
        )
        first, *others = told(done.stderr)
        assert (first["event"], first["stage"], first["done"]) == ("start", "fetching", 0)
        assert first["total"] == (model / "model.safetensors").stat().st_size
        (end,) = (
            event for event in others if (event["event"], event.get("stage")) == ("end", "fetching")
        )
        assert end["done"] == end["total"] == first["total"]
        assert others[-1]["exit_code"] == 0
        done = dus(
            "verify", tmp_path / "out", "--base", "org/model", "--progress", "json", "-q", **where
        )
        assert [event["stage"] for event in told(done.stderr)[:-1]] == [
            "comparing with the base"
        ] * 2
