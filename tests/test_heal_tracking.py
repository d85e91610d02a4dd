"""`dus heal --track`: the clients themselves, each in its own offline mode, in a run that is killed
and continued. Skipped where a client is not installed.
"""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

STEPS = 24
RECIPE = (
    f"--steps {STEPS} --seq-length 64 --batch-tokens 128 --holdout 10% --eval-every 8 "
    "--save-every 5 --precision fp32"
).split()
NAMES = "--track-project heals --track-run first --track-group trims".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.write_home(tmp_path_factory.mktemp("tracking"))


def killed_and_continued(home: Path, out: Path, *options: str, **environment: str) -> None:
    """A worker is killed between two checkpoints; another one goes on."""
    data = ("--data", home / "corpus.jsonl")
    prepared = tiny.forked_dus(
        "heal", home / "scaled", "-o", out, *data, *RECIPE, *options, "--print-command", "-q"
    )
    assert prepared.returncode == 0, prepared.stderr
    slowly = (
        "import time\n"
        "from dus_cli.heal.train.loop import Training\n"
        "step = Training._step\n"
        "Training._step = lambda self: (time.sleep(0.2), step(self))[1]\n"
    )
    ((worker, log),) = tiny.start_workers(out, extra=environment, first=slowly)
    path = out / "metrics.jsonl"
    end = time.monotonic() + 300
    while not path.exists() or path.read_bytes().count(b"\n") < 10:  # after step 8
        assert worker.is_alive(), Path(f"{log}.err").read_text(encoding="utf-8")
        assert time.monotonic() < end
        time.sleep(0.01)
    os.kill(worker.pid, signal.SIGKILL)
    tiny.wait(worker)
    assert not (out / "report.json").exists()
    assert tiny.ended(out, tiny.start_workers(out, extra=environment)) == ""


def assert_whole(out: Path, found: list[Any]) -> None:
    """Each step once, with the loss that metrics.jsonl has."""
    rows = tiny.metrics(out)
    expected = [(row["step"], pytest.approx(row["loss"])) for row in rows if row["step"]]
    assert found == expected


def test_tensorboard_shows_each_step_once(home: Path) -> None:
    accumulators = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    out = home / "tensorboard"
    killed_and_continued(home, out, "--track", "tensorboard")
    assert len(list((out / "tensorboard").iterdir())) == 2
    events = accumulators.EventAccumulator(str(out / "tensorboard"))
    events.Reload()
    assert_whole(out, [(event.step, event.value) for event in events.Scalars("loss")])


def test_wandb_goes_on_in_the_same_run(home: Path) -> None:
    pytest.importorskip("wandb")
    out = home / "wandb"
    killed_and_continued(home, out, "--track", "wandb", *NAMES, WANDB_MODE="offline")
    files = sorted((out / "wandb").glob("offline-run-*/*.wandb"))
    assert len(files) == 2
    runs: set[tuple[str, ...]] = set()
    losses: list[tuple[int, float]] = []
    for path in files:
        losses = []  # a killed client's file may lack rows, so that the next one has them all
        for record in wandb_records(path):
            if record.HasField("run"):
                run = record.run
                runs.add((run.run_id, run.project, run.display_name, run.run_group))
            if record.HasField("history"):
                row = {item.nested_key[0]: item for item in record.history.item}
                if "loss" in row:
                    step = json.loads(row["_step"].value_json)
                    losses.append((step, json.loads(row["loss"].value_json)))
    ((number, *names),) = runs
    assert names == ["heals", "first", "trims"]
    assert number
    assert_whole(out, losses)


def wandb_records(path: Path) -> Iterator[Any]:
    """The records of wandb's file: LevelDB's log format behind seven bytes of its own."""
    from wandb.proto.wandb_internal_pb2 import Record

    content, place, whole = path.read_bytes(), 7, b""
    while place + 7 <= len(content):
        left = 32768 - place % 32768  # a header is not cut by the end of a block
        if left < 7:
            place += left
            continue
        _, size, kind = struct.unpack_from("<IHB", content, place)
        whole += content[place + 7 : place + 7 + size]
        place += 7 + size
        if kind in {1, 4}:  # full, last
            yield Record.FromString(whole)
            whole = b""


def test_trackio_goes_on_in_the_same_run(home: Path) -> None:
    pytest.importorskip("trackio")
    out, folder = home / "trackio", home / "trackio-data"
    killed_and_continued(home, out, "--track", "trackio", *NAMES, TRACKIO_DIR=str(folder))
    (database,) = folder.glob("heals*.db")
    with sqlite3.connect(database) as connection:
        query = "SELECT run_id, run_name, step, metrics FROM metrics ORDER BY id"
        rows = connection.execute(query).fetchall()
        (config,) = connection.execute("SELECT config FROM configs").fetchone()
    assert len({run_id for run_id, *_ in rows}) == 1
    assert {name for _, name, *_ in rows} == {"first"}
    assert json.loads(config)["_Group"] == "trims"
    losses = [(step, json.loads(metrics).get("loss")) for _, _, step, metrics in rows]
    assert_whole(out, [(step, loss) for step, loss in losses if step])


def test_a_tracker_that_refuses_is_one_line(home: Path) -> None:
    pytest.importorskip("wandb")
    data = ("--data", home / "corpus.jsonl")
    names = ("--track", "wandb", "--track-project", "a/b")
    failure = tiny.heal(
        home / "scaled", home / "refused", *data, *RECIPE, *names, WANDB_MODE="offline"
    )
    assert failure.startswith("--track wandb: wandb fails with UsageError: ")
    assert "a/b" in failure
    assert "\n" not in failure
