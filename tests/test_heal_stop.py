"""A run that is told to stop ends wherever it is, with what there is to keep: stage by stage.

Each stage is made longer than the test waits, by Python that runs in the worker first; time is only
a guard here.
"""

from __future__ import annotations

import os
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from runs import PATIENCE, until  # noqa: E402

SHORT = (
    "--steps 6 --seq-length 32 --batch-tokens 128 --lr 3e-3 --holdout 5% --eval-every 2 "
    "--save-every 100 --micro-batch 2 --precision fp32 -q"
).split()

# A place that a test can wait for, and one that nobody leaves: what a library does in one call.
PLACES = """
import pathlib, threading, time
def reached(path=pathlib.Path({marker!r})):
    with path.open("a") as file:
        file.write(".")
def stuck():
    lock = threading.Lock()
    lock.acquire()
    lock.acquire()
"""

LOADING = """
import dus_cli.heal.train.setup as training
training.load = lambda *_, **__: (reached(), stuck())
"""

# The second measurement is that after step 2, behind the base's and the scaled model's.
MEASURING = """
import dus_cli.heal.train.evaluate as evaluate, dus_cli.heal.train.loop as training
measure, calls = evaluate.mean_loss, []
class Long:
    num_documents = 1
    def __init__(self, row):
        self.row = row
    def __len__(self):
        return 10**8
    def __getitem__(self, rows):
        return [self.row] * len(range(*rows.indices(10**8)))
    def label_documents(self, index):
        return 0 * self.row.labels
def longer(decoder, rows, *rest):
    calls.append(0)
    if len(calls) != {call}:
        return measure(decoder, rows, *rest)
    reached()
    return measure(decoder, Long(rows[0]), *rest)
evaluate.mean_loss = longer
"""

# Step 3 has thousands of micro-batches.
STEPPING = """
import dus_cli.heal.train.loop as training
cut = training.micro_batches
def longer(rows, step, *rest):
    batches = cut(rows, step, *rest)
    if step < 2:
        return batches
    reached()
    return batches * 5000
training.micro_batches = longer
"""

# Each layer takes its time in step 3, forwards or backwards.
ONE_PASS = """
import time
import dus_cli.heal.train.loop as training
from transformers.models.llama.modeling_llama import LlamaDecoderLayer
cut, forward, late = training.micro_batches, LlamaDecoderLayer.forward, []
def noted(rows, step, *rest):
    late.extend([0] * (step == 2))
    return cut(rows, step, *rest)
def slow(*_):
    if late:
        reached()
        time.sleep(1)
def forward_slowly(self, *args, **kwargs):
    output = forward(self, *args, **kwargs)
    if "{way}" == "forwards":
        slow()
    elif output.requires_grad:
        output.register_hook(slow)
    return output
training.micro_batches, LlamaDecoderLayer.forward = noted, forward_slowly
"""

SAVING = """
import torch.distributed.checkpoint as dcp
save = dcp.save
def slow(*args, **kwargs):
    reached()
    time.sleep(2)
    return save(*args, **kwargs)
dcp.save = slow
"""

# A disk that takes longer to give a checkpoint its name than a worker has, once it saves, to come
# to a brake.
NAMING = """
import time
import dus_cli.heal.train.checkpoints as checkpoints, dus_cli.models.stopping as stopping
save, sync = checkpoints.dcp.save, checkpoints._sync
def hurried(*args, **kwargs):
    stopping._GRACE = 0.5
    time.sleep(1)
    return save(*args, **kwargs)
def slow(folder):
    time.sleep(2)
    sync(folder)
checkpoints.dcp.save, checkpoints._sync = hurried, slow
"""

PUBLISHING = """
from dus_cli.heal.proof.publish import Publication
gather = Publication._gather
def slow(*args):
    reached()
    time.sleep(1)
    return gather(*args)
Publication._gather = slow
"""

STUCK = """
from dus_cli.heal.train.optimizer import Optimizer
import dus_cli.heal.train.loop as training
training.mean_losses = lambda *_: (reached(), stuck())
"""


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scaled model, text, and a run that nothing happened to."""
    torch.set_num_threads(1)
    folder = tiny.write_home(tmp_path_factory.mktemp("stop"))
    assert (
        tiny.heal(folder / "scaled", folder / "straight", "--data", folder / "corpus.jsonl", *SHORT)
        == ""
    )
    prepare(folder, folder / "prepared")
    return folder


def command(home: Path, out: Path) -> tuple[str | Path, ...]:
    return ("heal", home / "scaled", "-o", out, "--data", home / "corpus.jsonl", *SHORT)


def prepare(home: Path, out: Path) -> None:
    done = tiny.forked_dus(*command(home, out), "--print-command")
    assert done.returncode == 0, done.stderr


@pytest.fixture
def out(home: Path, tmp_path: Path) -> Path:
    """A run about to begin."""
    shutil.copytree(home / "prepared", tmp_path / "out")
    return tmp_path / "out"


def start(out: Path, stage: str, *, workers: int = 1, **fields: Any) -> list[Any]:
    """Workers, once they have reached a stage."""
    marker = out.parent / "reached"
    first = PLACES.format(marker=str(marker)) + stage.format(**fields)
    started = [process for process, _ in tiny.start_workers(out, workers, first=first)]
    assert until(lambda: marker.exists() or not all(process.is_alive() for process in started))
    assert all(process.is_alive() for process in started), [process.exitcode for process in started]
    return started


def stop(out: Path, stage: str, signum: signal.Signals = signal.SIGTERM, **fields: Any) -> int:
    """The exit code of a worker that a signal met in a stage."""
    (worker,) = start(out, stage, **fields)
    os.kill(worker.pid, signum)
    return tiny.wait(worker, PATIENCE)


def saved(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


def assert_goes_on(home: Path, out: Path) -> None:
    """The same command ends it, and it has learned what a run that was never stopped has."""
    assert tiny.ended(out, tiny.start_workers(out)) == ""
    assert tiny.curve(out) == tiny.curve(home / "straight")
    assert (
        tiny.digests(out)["model.safetensors"]
        == tiny.digests(home / "straight")["model.safetensors"]
    )


def test_while_it_loads_a_signal_ends_a_worker_at_once(out: Path) -> None:
    assert stop(out, LOADING) == 143
    assert not (out / "metrics.jsonl").exists()


def test_a_signal_while_base_and_scaled_loss_are_measured_ends_it_with_nothing_to_keep(
    home: Path, out: Path
) -> None:
    assert stop(out, MEASURING, call=2) == 143
    assert saved(out) == []
    assert_goes_on(home, out)


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_in_an_evaluation_keeps_the_step_before_it_and_measures_again_later(
    home: Path, out: Path, signum: signal.Signals, code: int
) -> None:
    assert stop(out, MEASURING, signum, call=3) == code
    assert saved(out) == ["step-00000002"]
    assert [row["step"] for row in tiny.metrics(out)] == [0, 1], (
        "step 2 has its row once it is measured"
    )
    assert_goes_on(home, out)


def test_a_signal_in_a_step_of_many_micro_batches_keeps_the_step_before_it(
    home: Path, out: Path
) -> None:
    assert stop(out, STEPPING) == 143
    assert saved(out) == ["step-00000002"]
    assert_goes_on(home, out)


@pytest.mark.parametrize("way", ["forwards", "backwards"])
def test_a_signal_in_one_long_pass_ends_it_at_a_layer(home: Path, out: Path, way: str) -> None:
    assert stop(out, ONE_PASS, way=way) == 143
    assert len((out.parent / "reached").read_text()) < 5, "of six layers"
    assert saved(out) == ["step-00000002"]


def test_a_signal_while_a_checkpoint_is_saved_lets_it_be_saved(home: Path, out: Path) -> None:
    assert stop(out, SAVING) == 143
    assert saved(out) == ["step-00000006"]
    assert_goes_on(home, out)


def test_the_checkpoint_that_a_signal_asked_for_gets_its_name_however_slow_the_disk_is(
    out: Path,
) -> None:
    assert stop(out, STEPPING + NAMING) == 143
    assert saved(out) == ["step-00000002"]


def test_a_signal_while_the_model_is_written_leaves_the_run_and_no_half_of_it(
    home: Path, out: Path
) -> None:
    assert stop(out, PUBLISHING) == 143
    assert saved(out) == ["step-00000006"]
    assert not (out / "config.json").exists()
    assert not list(out.parent.glob(".out*"))
    assert_goes_on(home, out)


def test_what_a_library_does_not_come_back_from_ends_all_the_same(out: Path) -> None:
    assert stop(out, STUCK) == 143


def test_a_second_signal_ends_it_whatever_it_does(out: Path) -> None:
    (worker,) = start(
        out,
        "from dus_cli.models import stopping\nstopping._GRACE, stopping._SAME = 1e9, 0\n" + STUCK,
    )
    for _ in range(2):
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.5)  # two of a kind at once are one
    assert tiny.wait(worker, PATIENCE) == 143


def test_what_a_killed_launcher_sends_twice_is_one_signal_and_the_checkpoint_is_kept(
    out: Path,
) -> None:
    (worker,) = start(
        out, "from dus_cli.models import stopping\nstopping._SAME = 1e9\n" + STEPPING + NAMING
    )
    for _ in range(2):
        os.kill(worker.pid, signal.SIGTERM)
        time.sleep(0.5)
    assert tiny.wait(worker, PATIENCE) == 143
    assert saved(out) == ["step-00000002"]


def test_a_signal_to_one_of_two_workers_ends_both_with_one_checkpoint(
    home: Path, out: Path
) -> None:
    workers = start(out, MEASURING, workers=2, call=3)
    os.kill(workers[1].pid, signal.SIGTERM)
    assert [tiny.wait(worker, PATIENCE) for worker in workers] == [143, 143]
    assert saved(out) == ["step-00000002"]
    assert tiny.ended(out, tiny.start_workers(out, 2)) == ""
    assert [row["step"] for row in tiny.metrics(out)] == list(range(7))


def test_a_worker_that_lost_another_ends_by_itself(out: Path) -> None:
    workers = start(out, MEASURING, workers=2, call=3)
    workers[1].kill()
    assert tiny.wait(workers[0], PATIENCE) == 1


# --- the command itself ---------------------------------------------------------------------------

TOKENISING = """
from dus_cli.data.tokeniser import Tokeniser
def slow(self, texts):
    reached()
    time.sleep(1e6)
Tokeniser.encode = slow
"""

# Each layer of whatever is run takes its time.
SLOW_LAYERS = """
import torch
call = torch.nn.Module.__call__
def slow(self, *args, **kwargs):
    if type(self).__name__ == "LlamaDecoderLayer":
        reached()
        time.sleep(1e6)
    return call(self, *args, **kwargs)
torch.nn.Module.__call__ = slow
"""


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
@pytest.mark.parametrize("verb", ["heal", "probe", "probe --stream-layers", "eval"])
def test_the_command_ends_where_it_is_and_leaves_nothing(
    home: Path, tmp_path: Path, verb: str, signum: signal.Signals, code: int
) -> None:
    marker, data = tmp_path / "reached", home / "corpus.jsonl"
    name, *options = verb.split()
    if name == "heal":
        options += ["-o", str(tmp_path / "out")]
    first = PLACES.format(marker=str(marker)) + (TOKENISING if name == "heal" else SLOW_LAYERS)
    model = home / ("base" if name == "probe" else "scaled")
    process = tiny.start_dus(
        tmp_path / "log", name, model, "--data", data, *options, "-q", first=first
    )
    assert until(lambda: marker.exists() or not process.is_alive())
    os.kill(process.pid, signum)
    assert tiny.wait(process, PATIENCE) == code, (tmp_path / "log.err").read_text()
    assert (
        tmp_path / "log.err"
    ).read_text() == f"error: ended by {signum.name}; nothing was left behind\n"
    assert [path.name for path in tmp_path.glob("out/tokens/*") if path.is_dir()] == []


# --- without a network ----------------------------------------------------------------------------

# An own network, in which nothing is up, not even loopback: clone(2).
NO_NETWORK = "import ctypes\nassert ctypes.CDLL(None).unshare(0x40000000) == 0, 'not permitted'\n"


@pytest.fixture
def no_network() -> str:
    if tiny.forked_dus("--version", first=NO_NETWORK).returncode:
        pytest.skip("an own network needs a right that is missing")
    return NO_NETWORK


def test_one_worker_needs_no_port_and_no_loopback(home: Path, out: Path, no_network: str) -> None:
    assert tiny.ended(out, tiny.start_workers(out, first=no_network)) == ""
    assert tiny.curve(out) == tiny.curve(home / "straight")


def test_several_workers_without_loopback_are_refused_before_they_start(
    home: Path, tmp_path: Path, no_network: str
) -> None:
    done = tiny.forked_dus(
        *command(home, tmp_path / "out"), "--nproc-per-node", "2", first=no_network
    )
    done.assert_one_line_error("127.0.0.1 cannot be used", "--nproc-per-node 1")
    assert not (tmp_path / "out").exists()


def test_the_printed_line_of_one_worker_is_the_worker_and_of_two_torchrun(
    home: Path, tmp_path: Path
) -> None:
    line = command(home, tmp_path / "out")
    one = tiny.forked_dus(*line, "--print-command").stdout.split()
    two = tiny.forked_dus(*line, "--print-command", "--nproc-per-node", "2").stdout.split()
    assert one[1:] == ["-m", "dus_cli.heal.worker", str(tmp_path / "out/run.json")]
    assert two[1:4] == ["-m", "torch.distributed.run", "--nproc-per-node=2"]
    assert two[-3:] == one[1:]
