"""`dus heal --average`: the mean of the last checkpoints is a model of its own, beside the last."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from tiny import forked_dus  # noqa: E402

from dus_cli.heal.checkpoints_folder import averaged  # noqa: E402

# Without a warm-up or a decay a shorter run is the beginning of a longer one.
RECIPE = (
    "--seq-length 32 --batch-tokens 128 --lr 3e-3 --holdout 10% --eval-every 9 --precision fp32 "
    "--schedule constant --warmup 0 --micro-batch 2"
).split()

# A worker that is sent a signal as it begins a step, counted from 0.
SIGNALLED = """
import os
import dus_cli.heal.train.loop as training
cut = training.micro_batches
def sent(rows, step, *rest):
    if step == {step}:
        os.kill(os.getpid(), {signum})
    return cut(rows, step, *rest)
training.micro_batches = sent
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model in several shards."""
    folder = tmp_path_factory.mktemp("average")
    tiny.write_corpus(folder / "corpus.jsonl")
    base = tiny.write_base(folder / "base", shard="40KB", tie_word_embeddings=False)
    tiny.upscaled(base, folder / "scaled", shard="60KB")
    return folder


def heal(home: Path, name: str, *arguments: str, workers: int = 1) -> Path:
    data = ("--data", home / "corpus.jsonl")
    failure = tiny.heal(home / "scaled", home / name, *data, *RECIPE, *arguments, workers=workers)
    assert failure == ""
    return home / name


def test_the_mean_of_the_last_checkpoints_stands_beside_the_last_model(home: Path) -> None:
    """Of two workers, which hold parts; one checkpoint is kept otherwise."""
    first = heal(home, "first", "--steps", "1")
    arguments = "--steps 2 --save-every 1 --keep 1 --average 2".split()
    last = heal(home, "last", *arguments, workers=2)
    mean = home / "last-average"
    ours, one, two = map(tiny.weights, (mean, first, last))
    assert ours.keys() == two.keys()
    for name, tensor in ours.items():
        expected = (one[name].float() + two[name].float()) / 2
        assert tensor.dtype == two[name].dtype
        torch.testing.assert_close(tensor.float(), expected, atol=1e-3, rtol=1e-2)
    assert any(not torch.equal(ours[name], two[name]) for name in ours)  # it can fail
    assert {path.name for path in mean.glob("*.safetensors")} == {
        path.name for path in last.glob("*.safetensors")
    }
    for name in ("config.json", "tokenizer.json"):
        assert (mean / name).read_bytes() == (last / name).read_bytes()
    assert forked_dus("verify", mean).returncode == 0
    record = json.loads((mean / "dus.json").read_text())["healing"][-1]
    assert (record["averaged_steps"], record["loss"]) == ([1, 2], None)
    assert "The mean of 2 checkpoints" in (mean / "README.md").read_text()
    report = json.loads((last / "report.json").read_text())
    assert report["average"] == {"folder": "last-average", "steps": [1, 2]}
    assert "average" not in json.loads((first / "report.json").read_text())
    data: tuple[str | Path, ...] = ("--data", home / "corpus.jsonl", *RECIPE)
    again = forked_dus("heal", home / "scaled", "-o", last, *data, *arguments)
    assert "is finished already" in again.stdout
    shutil.rmtree(mean)
    gone = forked_dus("heal", home / "scaled", "-o", last, *data, *arguments)
    gone.assert_one_line_error("its checkpoints are deleted")


def test_a_run_that_was_stopped_and_killed_has_the_mean_of_one_that_was_not(home: Path) -> None:
    """SIGTERM leaves a checkpoint of step 5, which is not due; SIGKILL leaves none."""
    arguments = "--steps 7 --save-every 2 --keep 1 --average 3".split()
    straight, out = heal(home, "straight", *arguments), home / "signalled"
    data: tuple[str | Path, ...] = ("--data", home / "corpus.jsonl", *RECIPE, *arguments)
    assert forked_dus("heal", home / "scaled", "-o", out, *data, "--print-command").returncode == 0
    for step, signum, code in ((5, signal.SIGTERM, 143), (6, signal.SIGKILL, -signal.SIGKILL)):
        first = SIGNALLED.format(step=step, signum=int(signum))
        ((worker, _),) = tiny.start_workers(out, first=first)
        assert tiny.wait(worker) == code
        if signum is signal.SIGTERM:
            assert (out / "checkpoints/step-00000005").is_dir()
    assert not (out / "config.json").exists()
    heal(home, "signalled", *arguments)
    mean, expected = home / "signalled-average", home / "straight-average"
    assert tiny.curve(out) == tiny.curve(straight)
    ours, theirs = tiny.digests(mean), tiny.digests(expected)
    shards = {name for name in theirs if name.endswith(".safetensors")}
    assert {name: ours[name] for name in shards} == {name: theirs[name] for name in shards}
    for folder in (mean, expected):
        record = json.loads((folder / "dus.json").read_text())["healing"][-1]
        assert record["averaged_steps"] == [4, 6, 7]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ("--steps 8 --save-every 4 --average 3", "needs as many checkpoints"),
        ("--steps 8 --average 2", "give --save-every STEPS"),
        ("--steps 8 --save-every 2 --average 2 --until base", "leave one out"),
    ],
)
def test_checkpoints_that_will_not_be_there_are_told_of_before_training(
    options: str, said: str, home: Path
) -> None:
    data: tuple[str | Path, ...] = ("--data", home / "corpus.jsonl", *RECIPE)
    run = forked_dus("heal", home / "scaled", "-o", home / "out", *data, *options.split())
    run.assert_one_line_error(said)


def test_what_stands_in_the_place_of_the_mean_is_not_touched(home: Path) -> None:
    (home / "out2-average").mkdir(exist_ok=True)
    (home / "out2-average/thesis.txt").write_text("mine")
    data: tuple[str | Path, ...] = ("--data", home / "corpus.jsonl", *RECIPE)
    options = "--steps 8 --save-every 2 --average 2".split()
    run = forked_dus("heal", home / "scaled", "-o", home / "out2", *data, *options)
    run.assert_one_line_error("out2-average, the folder for the mean of the checkpoints")
    assert (home / "out2-average/thesis.txt").read_text() == "mine"


def test_checkpoints_of_a_stop_do_not_count() -> None:
    assert averaged([4, 8, 9, 12, 13, 14], count=3, every=4) == [8, 12, 14]
    assert averaged([5], count=3, every=4) == [5]
    assert averaged([], count=3, every=4) == []
