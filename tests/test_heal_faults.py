"""`dus heal` stopped, killed, short of disk and run again: the loss curve is the uninterrupted
run's, bit for bit.

Real processes take their time to start, so these stories run two at a time in the background, each
once, and tests look at what they left. The first of them run the command in new interpreters, the
others in processes that are forked.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from conftest import DUS, Run

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from runs import PATIENCE, are_gone, last_step, processes, until  # noqa: E402

from dus_cli.models.compiled import has_compiler  # noqa: E402
from dus_cli.models.devices import computes_in_bf16  # noqa: E402

STEPS = 90
RECIPE = (
    "--steps 90 --seq-length 32 --batch-tokens 128 --micro-batch 2 --lr 1e-3 --holdout 5% "
    "--eval-every 20 --eval-tokens 1K --save-every 5 --precision fp32 --distill 0.3:50%"
).split()

# A short run, mostly in forked workers.
SHORT = (
    "--steps 16 --seq-length 32 --batch-tokens 128 --lr 3e-3 --holdout 5% --eval-tokens 1K "
    "--eval-every 4 --save-every 3 --micro-batch 1"
).split()

ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1"}


# --- real processes ------------------------------------------------------------------------------


def checkpoints(out: Path) -> list[str]:
    return sorted(path.name for path in (out / "checkpoints").glob("*"))


@dataclass
class Healing:
    """`dus heal` on its way."""

    arguments: tuple[Any, ...]
    out: Path
    is_new: bool = False  # in new interpreters, as a user starts it; others are forked
    process: subprocess.Popen[str] | tiny.ForkedDus = field(init=False)
    stderr: str = ""

    def __post_init__(self) -> None:
        command = ["heal", *map(str, self.arguments), "-o", str(self.out), "-q"]
        if not self.is_new:
            self.process = tiny.ForkedDus(*command)
            return
        self.process = subprocess.Popen(
            [*DUS, *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=ENVIRONMENT,
        )

    def reach(self, step: int) -> None:
        """Wait until it has done this step."""
        assert until(lambda: last_step(self.out) >= step or self.process.poll() is not None)
        assert self.process.poll() is None, self.process.communicate()

    def end(self) -> int | None:
        """Its exit code, once it has one."""
        _, self.stderr = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode


@contextlib.contextmanager
def frozen(out: Path) -> Iterator[None]:
    """Its workers stand still."""
    workers = processes(out)["worker"]
    assert workers
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)
    yield
    for pid in workers:
        os.kill(pid, signal.SIGCONT)


@dataclass
class Story:
    """What was seen at the stations of a run, for tests to judge."""

    out: Path
    seen: dict[str, Any] = field(default_factory=dict)


def command(home: Path) -> tuple[str | Path, ...]:
    return (home / "scaled", "--data", home / "corpus.jsonl", *RECIPE)


def short(home: Path) -> tuple[str | Path, ...]:
    return (home / "scaled", "--data", home / "corpus.jsonl", *SHORT, "--precision", "fp32")


def heal(home: Path, out: Path, *arguments: str, workers: int = 1) -> str:
    return tiny.heal(
        home / "scaled", out, "--data", home / "corpus.jsonl", *arguments, workers=workers
    )


# --- the stories ---------------------------------------------------------------------------------


def tell_straight(home: Path) -> Story:
    """Nothing happens."""
    story = Story(home / "straight")
    healing = Healing(command(home), story.out, is_new=True)
    healing.reach(20)
    story.seen["while it runs"] = sorted(path.name for path in story.out.iterdir())
    story.seen["code"] = healing.end()
    story.seen["stderr"] = healing.stderr
    return story


def tell_signals(home: Path) -> Story:
    """SIGTERM, SIGINT and SIGHUP, each after some steps."""
    story = Story(home / "signals")
    step = 0
    for signum in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        healing = Healing(command(home), story.out, is_new=signum == signal.SIGTERM)
        healing.reach(step + 8)
        # a run that waits while the test does something, however busy the machine
        with frozen(story.out):
            if signum == signal.SIGTERM:
                second = tiny.forked_dus("heal", *command(home), "-o", story.out, "-q")
                story.seen["second"] = (second, healing.process.poll())
            healing.process.send_signal(signum)
            time.sleep(1)
        code = healing.end()
        story.seen[signum.name] = (code, healing.stderr, are_gone(story.out), last_step(story.out))
        story.seen[f"{signum.name} saved"] = (
            checkpoints(story.out),
            (story.out / "config.json").exists(),
        )
        step = last_step(story.out)
    story.seen["failure"] = heal(home, story.out, *RECIPE)
    return story


def tell_kills(home: Path) -> Story:
    """Killed with -9: the worker, the launcher alone, everything."""
    story = Story(home / "kills")
    healing = Healing(command(home), story.out)
    healing.reach(12)
    os.kill(processes(story.out)["worker"][0], signal.SIGKILL)
    step = last_step(story.out)
    healing.reach(step + 12)
    story.seen["restarted"] = step
    healing.process.kill()
    healing.end()
    story.seen["launcher killed"] = (
        are_gone(story.out),
        last_step(story.out),
        checkpoints(story.out),
    )
    healing = Healing(command(home), story.out)
    healing.reach(last_step(story.out) + 8)
    pids = [pid for found in processes(story.out).values() for pid in found]
    for pid in pids:
        os.kill(pid, signal.SIGKILL)
    healing.end()
    story.seen["all killed"] = are_gone(story.out, pids)
    story.seen["failure"] = heal(home, story.out, *RECIPE)
    return story


def tell_full_disk(home: Path) -> Story:
    """The disk of the output fills up between two checkpoints; then there is room again."""
    disk = home / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True, check=False
    )
    story = Story(disk / "full")
    story.seen["mounted"] = mounted.returncode == 0
    if mounted.returncode:
        return story
    healing = Healing(command(home), story.out)
    healing.reach(12)
    ballast = disk / "ballast"
    with ballast.open("wb", 0) as file:
        size = 1 << 20
        while size >= 4096:  # to the last page
            try:
                file.write(bytes(size))
            except OSError:
                size //= 2
    code = healing.end()
    story.seen["full"] = (code, healing.stderr, are_gone(story.out), checkpoints(story.out))
    ballast.unlink()
    story.seen["code"] = Healing(command(home), story.out).end()
    return story


def tell_nodes(home: Path) -> Story:
    """Two launchers that stand for two nodes, with a real rendezvous on loopback."""
    story = Story(home / "nodes")
    endpoint = f"127.0.0.1:{tiny.free_port()}"
    healings = [
        Healing(
            (*short(home), "--nnodes", "2", "--node-rank", str(rank), "--rdzv-endpoint", endpoint),
            story.out,
        )
        for rank in range(2)
    ]
    story.seen["codes"] = [healing.end() for healing in healings]
    story.seen["stderr"] = [healing.stderr for healing in healings]
    return story


def tell_by_hand(home: Path) -> Story:
    """The printed command, typed into a shell."""
    story = Story(home / "by hand")
    printed = tiny.forked_dus(
        "heal", *command(home), "-o", story.out, "--print-command", "-q", OMP_NUM_THREADS="1"
    )
    story.seen["printed"] = printed
    story.seen["before"] = sorted(path.name for path in story.out.iterdir())
    done = subprocess.run(  # noqa: S602
        printed.stdout,
        shell=True,
        env=ENVIRONMENT,
        capture_output=True,
        check=False,
    )
    story.seen["code"] = done.returncode
    return story


STORIES: dict[str, Callable[[Path], Story]] = {
    "straight": tell_straight,
    "signals": tell_signals,
    "kills": tell_kills,
    "full_disk": tell_full_disk,
    "nodes": tell_nodes,
    "by_hand": tell_by_hand,
}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scaled model and text."""
    torch.set_num_threads(1)
    folder = tiny.write_home(tmp_path_factory.mktemp("faults"), 600)
    assert tiny.forked_dus("--version").returncode == 0, (
        "and now the server that forks has imported everything"
    )
    return folder


@pytest.fixture(scope="module")
def told(home: Path, request: pytest.FixtureRequest) -> Iterator[dict[str, Future[Story]]]:
    """The stories that the chosen tests ask for, under way."""
    wanted = {name for item in request.session.items for name in getattr(item, "fixturenames", ())}
    with ThreadPoolExecutor(2) as pool:
        yield {name: pool.submit(story, home) for name, story in STORIES.items() if name in wanted}
    if (home / "disk").is_mount():
        subprocess.run(["umount", home / "disk"], check=True)


@pytest.fixture(scope="module")
def straight(told: dict[str, Future[Story]]) -> Story:
    return told["straight"].result()


@pytest.fixture(scope="module")
def signals(told: dict[str, Future[Story]]) -> Story:
    return told["signals"].result()


@pytest.fixture(scope="module")
def kills(told: dict[str, Future[Story]]) -> Story:
    return told["kills"].result()


@pytest.fixture(scope="module")
def full_disk(told: dict[str, Future[Story]]) -> Story:
    story = told["full_disk"].result()
    if not story.seen["mounted"]:
        pytest.skip("mounting needs root")
    return story


@pytest.fixture(scope="module")
def nodes(told: dict[str, Future[Story]]) -> Story:
    return told["nodes"].result()


@pytest.fixture(scope="module")
def by_hand(told: dict[str, Future[Story]]) -> Story:
    return told["by_hand"].result()


def assert_same_bits(one: Path, other: Path) -> None:
    """The same losses and the same model, to the last bit, and one row for each step."""
    assert tiny.curve(one) == tiny.curve(other)
    assert [row["step"] for row in tiny.metrics(other)] == list(range(STEPS + 1))
    ours, theirs = tiny.digests(one), tiny.digests(other)
    assert ours.keys() == theirs.keys()
    for name in ("model.safetensors", "dus.json", "config.json"):
        assert ours[name] == theirs[name], name


# --- while nothing happens -----------------------------------------------------------------------


def test_while_it_runs_there_is_no_config_and_nothing_unknown(straight: Story) -> None:
    assert straight.seen["while it runs"] == [
        "checkpoints",
        "logs",
        "metrics.jsonl",
        "run.json",
        "tokens",
    ]
    assert (straight.seen["code"], straight.seen["stderr"]) == (0, "")
    assert are_gone(straight.out)
    mine = f".{straight.out.name}.*"  # other runs begin beside it meanwhile
    assert not [path.name for path in straight.out.parent.glob(mine)]


# --- signals -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "code"), [("SIGTERM", 143), ("SIGINT", 130), ("SIGHUP", 129)])
def test_a_signal_saves_a_checkpoint_and_exits_with_its_code_and_one_line(
    signals: Story, name: str, code: int
) -> None:
    found, stderr, gone, step = signals.seen[name]
    assert found == code, stderr
    assert (
        stderr
        == f"error: ended by {name} with a checkpoint at step {step}; the same command goes on from there\n"
    )
    assert gone
    saved, has_config = signals.seen[f"{name} saved"]
    assert saved[-1] == f"step-{step:08}"
    assert len(saved) <= 2
    assert not has_config


def test_stopped_three_times_it_learned_the_same_to_the_last_bit(
    straight: Story, signals: Story
) -> None:
    assert signals.seen["failure"] == ""
    assert_same_bits(straight.out, signals.out)


def test_a_second_run_into_the_same_output_is_refused_at_once(signals: Story) -> None:
    second, first = signals.seen["second"]
    second.assert_one_line_error("another run is healing into", "wait for it")
    assert first is None, "the first one ended meanwhile: the test shows nothing"


# --- kill -9 -------------------------------------------------------------------------------------


def test_kill_9_of_worker_launcher_and_everything_loses_nothing(
    straight: Story, kills: Story
) -> None:
    gone, step, saved = kills.seen["launcher killed"]
    assert gone, "workers outlived their launcher"
    assert saved[-1] == f"step-{step:08}", "the workers of a killed launcher save"
    assert kills.seen["all killed"]
    assert kills.seen["failure"] == ""
    assert_same_bits(straight.out, kills.out)


# --- the disk ------------------------------------------------------------------------------------


def test_a_full_disk_is_one_line_and_the_checkpoint_before_is_whole(
    straight: Story, full_disk: Story
) -> None:
    code, stderr, gone, saved = full_disk.seen["full"]
    assert code == 1
    assert stderr.startswith("error: ")
    assert stderr.count("\n") == 1, stderr
    assert "No space left on device" in stderr
    assert gone
    assert saved
    assert full_disk.seen["code"] == 0, "with room again the same command goes on"
    assert_same_bits(straight.out, full_disk.out)


# --- other ways to start it ----------------------------------------------------------------------


def test_two_nodes_learn_what_two_workers_of_one_node_learn(home: Path, nodes: Story) -> None:
    assert nodes.seen["codes"] == [0, 0], nodes.seen["stderr"]
    assert nodes.seen["stderr"] == ["", ""]
    one = home / "one node"
    assert tiny.heal(home / "scaled", one, *short(home)[1:], workers=2) == ""
    assert [row["step"] for row in tiny.metrics(nodes.out)] == list(range(17))
    for a, b in zip(tiny.metrics(one), tiny.metrics(nodes.out), strict=True):
        for name in a.keys() & {"loss", "eval_loss", "base_loss", "kl"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4, abs=1e-5), (a["step"], name)
    assert not [path.name for path in nodes.out.parent.glob(".nodes*")]


def test_the_printed_command_typed_into_a_shell_does_the_same(
    straight: Story, by_hand: Story
) -> None:
    printed = by_hand.seen["printed"]
    assert (printed.returncode, printed.stderr, printed.stdout.count("\n")) == (0, "", 1)
    assert by_hand.seen["before"] == ["run.json", "tokens"]
    assert by_hand.seen["code"] == 0
    assert_same_bits(straight.out, by_hand.out)


# --- going on, in forked workers -----------------------------------------------------------------


def stop(home: Path, out: Path, *arguments: str, at: int = 5) -> Path:
    """A run that was stopped by a signal to its worker."""
    data = ("--data", home / "corpus.jsonl")
    prepared = tiny.forked_dus(
        "heal", home / "scaled", "-o", out, *data, *arguments, "--print-command", "-q"
    )
    assert prepared.returncode == 0, prepared.stderr
    (worker,) = tiny.start_workers(out)
    assert until(lambda: last_step(out) >= at)
    worker[0].terminate()
    assert tiny.wait(worker[0]) == 128 + signal.SIGTERM
    assert not (out / "config.json").exists(), "it was over before the signal came"
    assert checkpoints(out)[-1] == f"step-{last_step(out):08}"
    return out


@pytest.fixture(scope="module")
def stopped(home: Path) -> Path:
    return stop(home, home / "stopped", *SHORT, "--precision", "fp32")


@pytest.fixture
def half(stopped: Path, tmp_path: Path) -> Path:
    """A copy of a run that was stopped: a run's folder may be moved."""
    shutil.copytree(stopped, tmp_path / "half")
    return tmp_path / "half"


IN_BF16 = {
    "with masters": (
        *("--precision", "bf16", "--schedule", "constant", "--weight-decay", "0.1"),
        *("--lr-scale", "base=0.5,norms=0"),
    ),
    "without masters": ("--precision", "bf16", "--master-weights", "bf16", "--train", "new"),
}
if has_compiler():
    IN_BF16["compiled"] = ("--precision", "bf16", "--compile")


@pytest.mark.parametrize("options", IN_BF16.values(), ids=IN_BF16.keys())
def test_a_run_in_bf16_that_went_on_is_the_same_to_the_last_bit(
    home: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    assert heal(home, tmp_path / "straight", *SHORT, *options) == ""
    out = stop(home, tmp_path / "stopped", *SHORT, *options)
    assert heal(home, out, *SHORT, *options) == ""
    assert tiny.curve(out) == tiny.curve(tmp_path / "straight")
    ours, theirs = tiny.digests(out), tiny.digests(tmp_path / "straight")
    assert ours["model.safetensors"] == theirs["model.safetensors"]
    assert ours["dus.json"] == theirs["dus.json"]


@pytest.fixture(scope="module")
def finished(home: Path) -> Path:
    out = home / "finished"
    assert heal(home, out, *SHORT, "--precision", "fp32") == ""
    return out


@pytest.mark.parametrize("workers", [1, 2, 3])
def test_a_run_may_go_on_with_another_number_of_workers(
    home: Path, finished: Path, half: Path, workers: int
) -> None:
    assert heal(home, half, *SHORT, "--precision", "fp32", workers=workers) == ""
    assert [row["step"] for row in tiny.metrics(half)] == list(range(17))
    for a, b in zip(tiny.metrics(finished), tiny.metrics(half), strict=True):
        for name in a.keys() & {"loss", "eval_loss", "grad_norm"}:
            assert a[name] == pytest.approx(b[name], rel=1e-4), (a["step"], name)


def test_a_run_keeps_the_precision_that_auto_chose_also_on_a_machine_where_it_chooses_otherwise(
    home: Path, tmp_path: Path
) -> None:
    out, default = tmp_path / "auto", "bf16" if computes_in_bf16() else "fp32"
    prepare: list[str | Path] = [
        "heal",
        home / "scaled",
        "-o",
        out,
        "--data",
        home / "corpus.jsonl",
        *SHORT,
    ]
    prepare += ["--print-command", "-q"]
    assert tiny.forked_dus(*prepare).returncode == 0
    run = json.loads((out / "run.json").read_text())
    assert (run["options"]["fit.precision"], run["fit"]["precision"]) == ("auto", default)
    (other,) = {"bf16", "fp32"} - {default}
    run["fit"]["precision"] = other
    (out / "run.json").write_text(json.dumps(run))
    assert tiny.forked_dus(*prepare).returncode == 0
    assert json.loads((out / "run.json").read_text())["fit"]["precision"] == other


def test_options_that_change_nothing_of_what_is_learned_may_change(
    home: Path, finished: Path, half: Path
) -> None:
    free = (
        "--keep",
        "1",
        "--save-every",
        "7",
        "--micro-batch",
        "2",
        "--activation-checkpointing",
        "full",
    )
    assert heal(home, half, *SHORT, "--precision", "fp32", *free) == ""
    for a, b in zip(tiny.metrics(finished), tiny.metrics(half), strict=True):
        for name in a.keys() & {"loss", "eval_loss"}:
            assert a[name] == pytest.approx(b[name], rel=1e-5), (a["step"], name)


CHANGES = {
    "lr": ("--lr", "1e-2"),
    "steps": ("--steps", "20"),
    "seq-length": ("--seq-length", "16"),
    "batch-tokens": ("--batch-tokens", "256"),
    "seed": ("--seed", "1"),
    "precision": ("--precision", "bf16"),
    "train": ("--train", "new"),
    "lr-scale": ("--lr-scale", "base=0.5"),
    "distill": ("--distill", "0.5"),
    "warmup": ("--warmup", "3"),
    "holdout": ("--holdout", "20%"),
    "document-mask": ("--no-document-mask",),
}


@pytest.mark.parametrize("folder", ["stopped", "finished"])
def test_another_option_that_matters_is_refused_by_its_name(
    home: Path, folder: str, request: pytest.FixtureRequest
) -> None:
    out = request.getfixturevalue(folder)
    before = tiny.digests(out)
    for name, change in CHANGES.items():
        arguments = [*SHORT, "--precision", "fp32", *change, "-q"]
        refused = tiny.forked_dus(
            "heal", home / "scaled", "-o", out, "--data", home / "corpus.jsonl", *arguments
        )
        refused.assert_one_line_error("other options", f"{name} ")
    after = tiny.digests(out)
    assert {name for name in before if after.get(name) != before[name]} <= {"tokens/.lock"}


def test_other_data_or_another_model_is_refused(home: Path, half: Path, tmp_path: Path) -> None:
    other = tiny.write_corpus(tmp_path / "other.jsonl", 600, seed=1)
    arguments = (*SHORT, "--precision", "fp32", "-q")
    done = tiny.forked_dus("heal", home / "scaled", "-o", half, "--data", other, *arguments)
    done.assert_one_line_error("the data")
    model = tiny.upscaled(tiny.write_base(tmp_path / "base", seed=1), tmp_path / "scaled")
    done = tiny.forked_dus("heal", model, "-o", half, "--data", home / "corpus.jsonl", *arguments)
    done.assert_one_line_error("the model")


def test_other_weights_of_the_same_data_are_refused(home: Path, tmp_path: Path) -> None:
    """They change which row comes when."""
    other = tiny.write_corpus(tmp_path / "other.jsonl", 600, seed=1)
    out: tuple[str | Path, ...] = ("-o", tmp_path / "out", *SHORT, "-q", "--print-command")

    def run(weight: str) -> Run:
        data = ("--data", f"{home / 'corpus.jsonl'}:{weight}", "--data", f"{other}:1")
        return tiny.forked_dus("heal", home / "scaled", *data, *out)

    assert run("3").returncode == 0
    assert run("3").returncode == 0
    run("2").assert_one_line_error("other options (the weights of --data)")


def test_a_finished_run_says_so_at_once_and_changes_nothing(home: Path, signals: Story) -> None:
    before = tiny.digests(signals.out)
    again = tiny.forked_dus("heal", *command(home), "-o", signals.out, "--json")
    assert again.report["status"] == "unchanged"
    assert again.report["steps"] == STEPS
    assert tiny.digests(signals.out) == before


DAMAGES: dict[str, Callable[[Path], object]] = {
    "a truncated shard": lambda folder: os.truncate(next(folder.glob("*.distcp")), 1000),
    "no shard": lambda folder: next(folder.glob("*.distcp")).unlink(),
    "truncated metadata": lambda folder: os.truncate(folder / ".metadata", 100),
    "no metadata": lambda folder: (folder / ".metadata").unlink(),
    "an empty state": lambda folder: os.truncate(folder / "state.json", 0),
    "half a state": lambda folder: os.truncate(folder / "state.json", 40),
    "another state": lambda folder: (folder / "state.json").write_text("[]"),
    "no state": lambda folder: (folder / "state.json").unlink(),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_checkpoint_is_one_line_and_the_one_before_goes_on(
    home: Path, finished: Path, half: Path, damage: Callable[[Path], object]
) -> None:
    newest = half / "checkpoints" / checkpoints(half)[-1]
    damage(newest)
    failure = heal(home, half, *SHORT, "--precision", "fp32")
    assert newest.name in failure
    assert "remove it to go on from the one before" in failure
    assert "\n" not in failure, failure
    shutil.rmtree(newest)
    assert heal(home, half, *SHORT, "--precision", "fp32") == ""
    assert tiny.curve(half) == tiny.curve(finished)


def test_half_a_last_line_of_metrics_is_mended(home: Path, finished: Path, half: Path) -> None:
    with (half / "metrics.jsonl").open("a") as file:
        file.write('{"step": 99, "to')
    assert heal(home, half, *SHORT, "--precision", "fp32") == ""
    assert tiny.curve(half) == tiny.curve(finished)
