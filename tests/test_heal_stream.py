"""`dus heal --stream`: training begins while the text is still tokenised."""

from __future__ import annotations

import contextlib
import json
import os
import signal
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from runs import are_gone, last_step, processes, until  # noqa: E402

from dus_cli.data import segments  # noqa: E402
from dus_cli.data.growing import GrowingRows  # noqa: E402
from dus_cli.data.order import WindowOrder  # noqa: E402
from dus_cli.data.remote import StoreFile  # noqa: E402
from dus_cli.data.shelf import Shelf  # noqa: E402
from dus_cli.data.sources import Source  # noqa: E402
from dus_cli.errors import DataError  # noqa: E402
from dus_cli.heal.run import read_run  # noqa: E402
from dus_cli.hub import remote  # noqa: E402

# --- the order of rows ----------------------------------------------------------------------------


def rows_of(order: WindowOrder, num_rows: list[int], count: int) -> list[tuple[int, int]]:
    """The first rows of a run whose sources have all ended."""
    draws = [order.draw(index) for index in range(count)]
    return [(source, order.row(source, draw, num_rows[source])) for source, draw in draws]


def test_the_order_is_the_same_before_and_after_a_source_has_ended() -> None:
    num_rows = [50, 23, 9]
    order = WindowOrder([0.6, 0.3, 0.1], 20, seed=4)
    known = rows_of(order, num_rows, 80)
    for index, (source, row) in enumerate(known):
        drawn, draw = order.draw(index)
        assert drawn == source
        if order.num_needed(source, draw) <= num_rows[source]:
            assert order.row(source, draw, None) == row, "its window alone decides"


def test_a_row_is_known_when_its_window_is_complete_and_a_window_is_shuffled() -> None:
    order = WindowOrder([1.0], 160, seed=1)
    rows = [order.row(0, draw, None) for draw in range(480)]
    for first, size in ((0, 10), (10, 10), (20, 20), (40, 40), (80, 80), (160, 160), (320, 160)):
        window = rows[first : first + size]
        assert sorted(window) == list(range(first, first + size))
        assert window != sorted(window)
        assert {order.num_needed(0, draw) for draw in range(first, first + size)} == {first + size}


def test_every_pass_has_each_row_once_in_another_order() -> None:
    order = WindowOrder([1.0], 8, seed=2)
    passes = [[order.row(0, 21 * turn + i, 21) for i in range(21)] for turn in range(3)]
    assert all(sorted(rows) == list(range(21)) for rows in passes)
    assert passes[0] != passes[1] != passes[2]
    assert [WindowOrder([1.0], 8, seed=3).row(0, i, 21) for i in range(21)] != passes[0]


@pytest.mark.parametrize("weights", [[1.0], [1, 1], [0.7, 0.2, 0.1], [1e-3, 5, 1e-3, 2, 1e3]])
def test_sources_take_turns_evenly_by_their_weights(weights: list[float]) -> None:
    order = WindowOrder(weights, 100, seed=0)
    seen: Counter[int] = Counter()
    for index in range(2000):
        assert order.counts(index) == tuple(seen[source] for source in range(len(weights)))
        source, draw = order.draw(index)
        assert draw == seen[source]
        seen[source] += 1
        for other, weight in enumerate(weights):
            assert abs(seen[other] - (index + 1) * weight / sum(weights)) < len(weights)


def test_each_source_has_a_share_of_the_window_by_its_weight() -> None:
    assert WindowOrder([3, 1], 1024, seed=0).windows == (768, 256)
    assert WindowOrder([1.0, 1e-6], 1024, seed=0).windows == (1024, 1), "and at least one row"


Arguments = tuple[str | Path, ...]

# --- runs -----------------------------------------------------------------------------------------

STEPS = 60
RECIPE = (
    f"--steps {STEPS} --seq-length 32 --batch-tokens 192 --micro-batch 3 --lr 1e-3 --holdout 5% "
    "--eval-every 20 --save-every 5 --precision fp32 --stream --shuffle-window 200"
).split()

# In the launcher: wait for workers that the test forks, instead of starting them.
WAITS = """
import time
from dus_cli.heal.launch import torchrun

def wait(run, launch, logs, view, has_failed):
    (logs / "ready").touch()
    while not (run.folder / "report.json").exists() and not has_failed():
        time.sleep(0.02)
    return 0, None

torchrun._run_torchrun = wait
"""

# In the launcher: fork the process that tokenises, too.
FORKS = 'import child\nchild.PROGRAMS.append("dus_cli.heal.launch.tokenising")\n'


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A scaled model and two sources of text, of which the second is read more than once."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stream")
    tiny.write_corpus(folder / "a.jsonl", 300, seed=1)
    tiny.write_corpus(folder / "b.jsonl", 16, seed=2)
    tiny.write_corpus(folder / "c.jsonl", 300, seed=3)
    tiny.upscaled(tiny.write_base(folder / "base"), folder / "scaled")
    yield folder
    for out in folder.iterdir():  # a test that failed may have left a stopped process
        for pid in chain.from_iterable(processes(out).values()):
            os.kill(pid, signal.SIGKILL)


def mixture(home: Path) -> Arguments:
    weighted = (f"{home / 'a.jsonl'}:0.7", f"{home / 'b.jsonl'}:0.3")
    return (home / "scaled", "--data", weighted[0], "--data", weighted[1])


def heal(*arguments: str | Path, out: Path, first: str = FORKS) -> Any:
    """Run the real command."""
    return tiny.forked_dus("heal", *arguments, "-o", out, "-q", first=first, OMP_NUM_THREADS="1")


def healed(*arguments: str | Path, out: Path, first: str = FORKS) -> Path:
    """Run the real command to its end."""
    done = heal(*arguments, out=out, first=first)
    assert (done.returncode, done.stderr) == (0, "")
    return out


class Streamed:
    """`dus heal --stream` on its way: its processes are forked with everything imported. With
    `forks` False, the process that tokenises is started as always.
    """

    def __init__(
        self, arguments: Arguments, out: Path, size: int = 1, *, forks: bool = True
    ) -> None:
        self.out, self.log = out, out.with_name(f"{out.name}.log")
        ready = out / "logs" / "0" / "ready"
        ready.unlink(missing_ok=True)
        first = FORKS + WAITS if forks else WAITS
        self.launcher = tiny.start_dus(self.log, "heal", *arguments, "-o", out, "-q", first=first)
        assert until(lambda: ready.exists() or not self.launcher.is_alive())
        assert ready.exists(), Path(f"{self.log}.err").read_text()
        self.workers = tiny.start_workers(out, size)

    def builders(self) -> list[int]:
        """The process that tokenises, if it has not done its work."""
        return processes(self.out)["tokenising"]

    def builder(self) -> int:
        """The process that tokenises, as soon as it is there."""
        assert until(self.builders)
        return self.builders()[0]

    def signal_builder(self, signum: signal.Signals) -> None:
        """Send a signal to the process that tokenises, if it has not done its work."""
        for pid in self.builders():
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signum)

    def num_segments(self) -> int:
        """How many segments the first source has."""
        return len(list((self.out / "tokens" / self.streams()[0]).glob("0*/meta.json")))

    def streams(self) -> list[str]:
        """The folders of its streams."""
        keys: list[str] = json.loads((self.out / "run.json").read_text())["data"]["growing"]["keys"]
        return keys

    def reach(self, step: int) -> None:
        """Wait until it has done this step."""
        assert until(lambda: last_step(self.out) >= step or self.died())
        assert not self.died()

    def died(self) -> bool:
        return any(process.exitcode not in (None, 0) for process, _ in self.workers)

    def kill(self) -> None:
        """Kill the launcher and the workers with -9. The process that tokenises must end, too."""
        self.launcher.kill()
        for process, _ in self.workers:
            process.kill()
        for process in (self.launcher, *(process for process, _ in self.workers)):
            process.join()
        self.signal_builder(signal.SIGCONT)
        assert until(lambda: not self.builders())

    def end(self) -> Path:
        """Wait for its end, which must be a success."""
        assert tiny.ended(self.out, self.workers) == ""
        assert tiny.wait(self.launcher) == 0, Path(f"{self.log}.err").read_text()
        return self.out


def assert_same_bits(one: Path, other: Path) -> None:
    """The same losses and the same model, to the last bit, and one row for each step."""
    assert tiny.curve(one) == tiny.curve(other)
    assert [row["step"] for row in tiny.metrics(other)] == list(range(STEPS + 1))
    for name in ("model.safetensors", "dus.json"):
        assert tiny.digests(one)[name] == tiny.digests(other)[name]


def assert_same_rows(one: Path, other: Path) -> None:
    """The same losses but for the order in which workers add them up."""
    for ours, theirs in zip(tiny.metrics(one), tiny.metrics(other), strict=True):
        for name in ours.keys() & {"loss", "eval_loss", "base_loss"}:
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4), (ours["step"], name)


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """A streamed mixture healed by the real command without an interruption."""
    return healed(*mixture(home), *RECIPE, out=home / "straight", first="")


# --- the same curve -------------------------------------------------------------------------------


def test_the_size_is_an_estimate_until_all_text_is_tokenised(home: Path, straight: Path) -> None:
    report = json.loads((straight / "report.json").read_text())
    assert report["is_train_estimated"]
    assert "about" in (straight / "README.md").read_text()
    short = home / "short"
    tiny.write_corpus(home / "short.jsonl", 8)
    options: Arguments = (*RECIPE, "--steps", "9", "--eval-data", home / "b.jsonl")
    healed(home / "scaled", "--data", home / "short.jsonl", *options, out=short)
    assert json.loads((short / "run.json").read_text())["data"]["growing"]["is_estimate"]
    report = json.loads((short / "report.json").read_text())
    assert not report["is_train_estimated"]
    assert report["train_documents"] == 8
    texts = [json.loads(line)["text"] for line in (home / "short.jsonl").read_text().splitlines()]
    assert report["train_tokens"] == sum(len(text) + 1 for text in texts), "bytes, and an end each"
    assert report["epochs"] == pytest.approx(9 * 6 / ((report["train_tokens"] - 1) // 32))
    assert "about" not in (short / "README.md").read_text()
    assert all(row["waited"] >= 0 for row in tiny.metrics(straight)[1:])


def test_the_curve_is_that_of_a_finished_preparation_which_is_not_made_twice(
    home: Path, straight: Path
) -> None:
    cache = home / "finished"
    options = (*mixture(home), *RECIPE, "--token-cache", cache)
    first = healed(*options, out=home / "first to use the cache")
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("train.bin")}
    assert len(before) > 10, "it has many segments"
    second = healed(*options, out=home / "second to use the cache")
    after = {path: path.stat().st_mtime_ns for path in cache.rglob("train.bin")}
    assert after == before
    assert_same_bits(straight, first)
    assert_same_bits(straight, second)


def test_steps_are_taken_before_the_text_is_tokenised_and_a_killed_builder_starts_again(
    home: Path, straight: Path
) -> None:
    run = Streamed((*mixture(home), *RECIPE), home / "frozen", forks=False)
    first = run.builder()
    os.kill(first, signal.SIGSTOP)  # while it imports its libraries
    run.reach(2)
    assert run.num_segments() == 1, "the one that the launcher makes"
    os.kill(first, signal.SIGKILL)
    assert until(lambda: run.builders() not in ([], [first]))
    assert_same_bits(straight, run.end())


@pytest.mark.parametrize("size", [1, 2, 3])
def test_killed_five_times_it_learns_the_same_to_the_last_bit(
    home: Path, straight: Path, size: int
) -> None:
    arguments = (*mixture(home), *RECIPE)
    alone = straight if size == 1 else Streamed(arguments, home / f"{size} alone", size).end()
    out = home / f"{size} killed"
    for step, count in ((6, 2), (14, 4), (22, 6), (34, 8), (46, None)):
        run = Streamed(arguments, out, size)
        if count is not None:
            assert until(lambda: run.num_segments() >= count)  # noqa: B023
            run.signal_builder(signal.SIGSTOP)
        run.reach(step)
        run.kill()
    assert_same_bits(alone, Streamed(arguments, out, size).end())


def test_another_number_of_workers_goes_on_with_the_same_rows(home: Path, straight: Path) -> None:
    arguments = (*mixture(home), *RECIPE)
    run = Streamed(arguments, home / "resized")
    run.reach(20)
    run.kill()
    (damaged,) = (home / "resized").glob(f"tokens/{run.streams()[0]}/000002/train.bin")
    damaged.write_bytes(damaged.read_bytes()[:-1])  # a segment that a crash left cut is made again
    assert_same_rows(straight, Streamed(arguments, home / "resized", 3).end())


@pytest.mark.parametrize("caches", [None, ("a node's", "the other's")])
def test_two_nodes_share_the_tokens_that_one_of_them_makes_or_make_their_own(
    home: Path, straight: Path, caches: tuple[str, str] | None
) -> None:
    out, endpoint = home / f"nodes of {caches}", f"127.0.0.1:{tiny.free_port()}"
    common = ("--nnodes", "2", "--rdzv-endpoint", endpoint, "-o", out, "-q")
    launchers = []
    for rank in range(2):
        own: Arguments = ("--token-cache", home / caches[rank]) if caches else ()
        arguments = (*mixture(home), *RECIPE, *common, "--node-rank", str(rank), *own)
        log = home / f"node {rank}.log"
        launchers.append(tiny.start_dus(log, "heal", *arguments, first=FORKS))
    assert [tiny.wait(launcher) for launcher in launchers] == [0, 0]
    assert_same_rows(straight, out)
    if caches:
        made = [
            {
                path.relative_to(home / cache): path.read_bytes()
                for path in (home / cache).rglob("*.bin")
            }
            for cache in caches
        ]
        assert made[0] == made[1]
        assert len(made[0]) > 10


def test_nodes_that_start_together_write_run_json_at_once(
    home: Path, straight: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = replace(read_run(straight / "run.json"), output=str(home / "together"))
    run.folder.mkdir()
    write_text = Path.write_text

    def write_text_while_another_node_does(path: Path, *args: Any, **options: Any) -> int:
        num_written = write_text(path, *args, **options)
        if path.name == "run.json.0.partial":
            run.write(1)
        return num_written

    monkeypatch.setattr(Path, "write_text", write_text_while_another_node_does)
    run.write(0)
    assert [path.name for path in run.folder.iterdir()] == ["run.json"]
    (run.folder / "run.json.1.partial").write_text("{")  # a node that was killed meanwhile
    (run.folder / "run.json").unlink()
    done = heal(*mixture(home), *RECIPE, "--dry-run", out=run.folder)
    assert (done.returncode, done.stderr) == (0, "")


# --- stores ---------------------------------------------------------------------------------------


@dataclass
class Store:
    """A store with one file, of which it gives only the first `answers` bytes."""

    content: bytes
    answers: int
    num_requests: int = 0

    def chunks(self, start: int, end: int) -> Iterator[bytes]:
        self.num_requests += 1
        if start >= self.answers:
            raise OSError("no answer")
        yield self.content[start : min(end, self.answers)]

    def source(self) -> Source:
        url = "https://host/corpus.jsonl"
        return Source(url, (StoreFile(url, len(self.content), "1", self.chunks),))


def segments_of(source: Source, folder: Path, *, stops: bool = False) -> dict[str, str]:
    """Tokenise a source as for a run that reads all of it; the digests of its segments' tokens."""
    shelf = Shelf(folder / "tokens", folder.parent, 260)
    prepared = segments.begin(
        shelf, [source], [], holdout=0.05, window_tokens=50_000, wait=False, say=print
    )
    rows = GrowingRows(prepared, shelf.folder, 128, 0)
    if stops:
        with pytest.raises(DataError, match=r"host/corpus.jsonl.*no answer"):
            segments.go_on(shelf, [source], prepared, rows, 20_000)
    else:
        segments.go_on(shelf, [source], prepared, rows, 20_000)
    return {
        path: digest
        for path, digest in tiny.digests(folder).items()
        if path.endswith((".bin", ".idx", "place.json"))
    }


def test_a_store_that_stops_answering_is_tried_again_and_then_goes_on_where_it_stopped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "FIRST_WAIT", 0.0)
    tiny.write_tokenizer(tmp_path)
    content = tiny.write_corpus(tmp_path / "corpus.jsonl", 12_000).read_bytes()
    assert len(content) > 2 << 20, "one request reads a MiB"
    (tmp_path / "whole").mkdir()
    whole = segments_of(Store(content, len(content)).source(), tmp_path / "whole")
    broken = Store(content, len(content) * 2 // 3)
    (tmp_path / "broken").mkdir()
    some = segments_of(broken.source(), tmp_path / "broken", stops=True)
    assert broken.num_requests > 8, "it was tried again"
    assert 1 < len(some) < len(whole)
    assert segments_of(Store(content, len(content)).source(), tmp_path / "broken") == whole


# --- the cache ------------------------------------------------------------------------------------


def test_the_cache_keeps_its_bound_and_what_dus_did_not_write(home: Path) -> None:
    cache = home / "bounded"
    short: Arguments = (*RECIPE, "--steps", "2", "--token-cache", cache)
    healed(home / "scaled", "--data", home / "a.jsonl", *short, out=home / "of a")
    (first,) = cache.glob("stream-*")
    (first / "note.txt").write_text("mine")
    size = sum(path.stat().st_size for path in cache.rglob("*") if path.is_file())
    bounded: Arguments = (*short, "--token-cache-size", str(size * 3 // 2))
    healed(home / "scaled", "--data", home / "c.jsonl", *bounded, out=home / "of b")
    assert [path.name for path in first.rglob("*")] == ["note.txt"], "it made room"
    assert len(list(cache.glob("stream-*/000000/train.bin"))) == 1
    tight: Arguments = (*short, "--token-cache-size", "100")
    done = heal(home / "scaled", "--data", home / "a.jsonl", *tight, out=home / "too tight")
    done.assert_one_line_error("more than --token-cache-size", "raise it")


def test_a_stream_that_is_longer_than_it_seemed_does_not_pass_the_bound(home: Path) -> None:
    """By its first segment a document of this source is mostly another field."""
    lines = (home / "a.jsonl").read_text().splitlines()
    padded = [json.dumps(json.loads(line) | {"other": "x" * 20_000}) for line in lines[:3]]
    data = home / "padded.jsonl"
    data.write_text("\n".join([*padded, *lines[3:]]) + "\n")
    arguments: Arguments = (home / "scaled", "--data", data, *RECIPE, "--token-cache")
    healed(*arguments, home / "roomy", out=home / "of padded lines")
    (stream,) = (home / "roomy").glob("stream-*")
    half = sum(path.stat().st_size for path in stream.rglob("*") if path.is_file()) // 2
    cache = home / "small"
    bounded: Arguments = (*arguments, cache, "--token-cache-size", str(half))
    done = heal(*bounded, out=home / "without room")
    done.assert_one_line_error("more than --token-cache-size", "the run ended ", "same command")
    assert sum(path.stat().st_size for path in cache.rglob("*") if path.is_file()) <= half


# --- bad input ------------------------------------------------------------------------------------


def test_a_source_that_changes_ends_the_run_with_a_checkpoint_and_one_line(home: Path) -> None:
    changing = home / "changing.jsonl"
    changing.write_bytes((home / "a.jsonl").read_bytes())
    arguments: Arguments = (home / "scaled", "--data", changing, *RECIPE)
    out = home / "changed"
    with ThreadPoolExecutor(1) as pool:
        running = pool.submit(heal, *arguments, out=out, first="")
        assert until(lambda: processes(out)["tokenising"])
        (builder,) = processes(out)["tokenising"]
        os.kill(builder, signal.SIGSTOP)
        assert until(lambda: last_step(out) >= 2)
        with changing.open("a") as file:
            file.write(json.dumps({"text": "one more"}) + "\n")
        os.kill(builder, signal.SIGCONT)
        done = running.result()
    done.assert_one_line_error("--data changed after the run was started", "with a checkpoint at")
    assert are_gone(out)
    again = heal(*arguments, out=out)
    again.assert_one_line_error("a run with other options (the data)")


def test_a_bad_line_far_behind_ends_the_run_with_its_number_in_one_line(home: Path) -> None:
    lines = (home / "a.jsonl").read_text().splitlines()
    bad = home / "bad.jsonl"
    bad.write_text("\n".join([*lines[:40], "nonsense", *lines[40:]]) + "\n")
    done = heal(home / "scaled", "--data", bad, *RECIPE, out=home / "of bad lines")
    done.assert_one_line_error("bad.jsonl, line 41: not JSON", "the run ended ", "same command")
    skipping: Arguments = (
        home / "scaled",
        "--data",
        bad,
        *RECIPE,
        "--on-bad-line",
        "skip",
        "--steps",
        "40",
    )
    out = healed(*skipping, out=home / "of skipped lines")
    assert json.loads((out / "report.json").read_text())["skipped_lines"] == {"malformed_json": 1}


@pytest.mark.parametrize("text", ["", '{"text": " "}\n', '{"text": "short"}\n'])
def test_a_source_without_a_row_is_refused_before_training(home: Path, text: str) -> None:
    (home / "nothing.jsonl").write_text(text)
    weighted = ("--data", f"{home / 'a.jsonl'}:1", "--data", f"{home / 'nothing.jsonl'}:1")
    done = heal(home / "scaled", *weighted, *RECIPE, out=home / "of nothing")
    done.assert_one_line_error("nothing.jsonl:1 has too few tokens for one row of 32")


@pytest.mark.parametrize("text", ["", '{"text": " "}\n'])
def test_data_without_a_document_are_refused(home: Path, text: str) -> None:
    (home / "nothing.jsonl").write_text(text)
    done = heal(home / "scaled", "--data", home / "nothing.jsonl", *RECIPE, out=home / "nothing")
    done.assert_one_line_error("nothing.jsonl has no documents to train on")


def test_a_source_that_is_all_held_out_is_refused(home: Path) -> None:
    same = home / "a.jsonl"
    done = heal(
        home / "scaled", "--data", same, "--eval-data", same, *RECIPE, out=home / "all held out"
    )
    done.assert_one_line_error("a.jsonl has too few tokens for one row of 32")


@pytest.mark.parametrize(
    ("more", "words"),
    [
        (["--stream"], "--tokens or --steps"),
        (["--stream", "--epochs", "1"], "--tokens or --steps"),
        (["--stream", "--steps", "4", "--print-command"], "run dus heal itself on each node"),
        (["--stream", "--steps", "4", "--data", "-"], "standard input"),
        (["--shuffle-window", "1M"], "add --stream"),
        (["--token-cache", "cache"], "add --stream"),
        (["--stream", "--steps", "4", "--token-cache-size", "1GB"], "bounds a --token-cache"),
    ],
)
def test_options_that_do_not_go_with_streaming_are_one_line(
    home: Path, more: list[str], words: str
) -> None:
    done = heal(home / "scaled", "--data", home / "a.jsonl", *more, out=home / "refused")
    done.assert_one_line_error(words)
    assert not (home / "refused").exists()
