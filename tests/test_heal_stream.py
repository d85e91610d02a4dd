"""`dus heal --stream`: training begins while the text is still tokenised."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

from dus_cli.data.order import WindowOrder  # noqa: E402

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
    order = WindowOrder([1.0], 10, seed=1)
    rows = [order.row(0, draw, None) for draw in range(30)]
    for first in (0, 10, 20):
        window = rows[first : first + 10]
        assert sorted(window) == list(range(first, first + 10))
        assert window != sorted(window)
        assert order.num_needed(0, first) == order.num_needed(0, first + 9) == first + 10


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
    assert WindowOrder([0.7, 0.3], 1000, seed=0).windows == (700, 300)
    assert WindowOrder([1.0, 1e-6], 1000, seed=0).windows == (1000, 1), "and at least one row"


# --- the same curve -------------------------------------------------------------------------------

STEPS = 60
RECIPE = (
    f"--steps {STEPS} --seq-length 32 --batch-tokens 192 --micro-batch 1 --lr 1e-3 --holdout 5% "
    "--eval-every 20 --save-every 5 --precision fp32 --stream --shuffle-window 400"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scaled model and two sources of text, of which the second is read more than once."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("stream")
    tiny.write_corpus(folder / "a.jsonl", 300, seed=1)
    tiny.write_corpus(folder / "b.jsonl", 16, seed=2)
    tiny.upscaled(tiny.write_base(folder / "base"), folder / "scaled")
    return folder


def mixture(home: Path) -> tuple[str | Path, ...]:
    return (
        home / "scaled",
        "--data",
        f"{home / 'a.jsonl'}:0.7",
        "--data",
        f"{home / 'b.jsonl'}:0.3",
    )


def healed(*arguments: str | Path, out: Path, workers: int = 1) -> Path:
    """Run the real command to its end."""
    done = tiny.forked_dus(
        "heal", *arguments, "--nproc-per-node", str(workers), "-o", out, "-q", OMP_NUM_THREADS="1"
    )
    assert (done.returncode, done.stderr) == (0, "")
    return out


@pytest.fixture(scope="module")
def straight(home: Path) -> Path:
    """A streamed mixture healed by one worker without an interruption."""
    return healed(*mixture(home), *RECIPE, out=home / "straight")


def tokenised(out: Path) -> list[str]:
    """The segments of a run."""
    return sorted(str(path.parent.relative_to(out)) for path in out.glob("tokens/*/*/meta.json"))


def test_a_stream_is_cut_into_segments_and_read_to_its_end_and_again(straight: Path) -> None:
    report = json.loads((straight / "report.json").read_text())
    assert report["is_train_estimated"]
    assert [row["step"] for row in tiny.metrics(straight)] == list(range(STEPS + 1))
    assert all(row["waited"] >= 0 for row in tiny.metrics(straight)[1:])


def test_the_curve_is_that_of_a_finished_preparation(home: Path, straight: Path) -> None:
    cache = home / "finished"
    options = (*mixture(home), *RECIPE, "--token-cache", cache)
    first = healed(*options, out=home / "first to use the cache")
    before = {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")}
    assert len(before) > 10, "it has many segments"
    second = healed(*options, out=home / "second to use the cache")
    assert {path: path.stat().st_mtime_ns for path in cache.rglob("*.bin")} == before, (
        "the second run made no tokens"
    )
    assert tiny.curve(straight) == tiny.curve(first) == tiny.curve(second)
    for name in ("model.safetensors", "dus.json"):
        assert tiny.digests(straight)[name] == tiny.digests(second)[name]
