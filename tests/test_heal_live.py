"""What a person sees of `dus heal`: the follower of metrics.jsonl, the views, and the picture of
the losses.
"""

from __future__ import annotations

import io
import json
import math
import random
import re
import statistics
import subprocess
import sys
import threading
import time
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
from rich.console import Console

from dus_cli.errors import StoppedError
from dus_cli.heal.metrics import MetricsFile
from dus_cli.heal.watch.follower import MetricsFollower
from dus_cli.heal.watch.run_state import sparkline
from dus_cli.heal.watch.views import LiveView, NoView, PlainView, view_for
from dus_cli.pictures.curves import MAX_SERIES, compare_curves, loss_curve
from dus_cli.progress import ProgressMode

Rows = list[dict[str, Any]]


def step_row(step: int, **more: Any) -> dict[str, Any]:
    return {
        "step": step,
        "tokens": 4096 * step,
        "loss": 3.0 - step / 1000,
        "lr": 1e-4,
        "grad_norm": 1.2,
        "tokens_per_second": 1500.0,
        "mfu": 0.31,
        "peak_memory_bytes": 44_000_000_000,
        "seconds": {"data": 0.1, "forward": 0.9, "eval": 0.0},
        "skipped": False,
    } | more


START: dict[str, Any] = {"step": 0, "tokens": 0, "eval_loss": 3.4, "base_loss": 2.9}


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(f"{json.dumps(row)}\n" for row in rows)


def replace(path: Path, *rows: dict[str, Any]) -> None:
    partial = path.with_suffix(".partial")
    append(partial, *rows)
    partial.replace(path)


@pytest.fixture
def metrics(tmp_path: Path) -> Path:
    return tmp_path / "metrics.jsonl"


# --- the follower ---------------------------------------------------------------------------------


def test_each_row_comes_once_and_none_before_the_file_is_there(metrics: Path) -> None:
    follower = MetricsFollower(metrics)
    assert follower.poll() == []
    append(metrics, START, step_row(1))
    assert [row["step"] for row in follower.poll()] == [0, 1]
    assert not follower.starts_over
    assert follower.poll() == []
    append(metrics, step_row(2))
    assert [row["step"] for row in follower.poll()] == [2]


def test_half_a_row_waits_for_its_other_half(metrics: Path) -> None:
    follower = MetricsFollower(metrics)
    line = json.dumps(step_row(1)) + "\n"
    metrics.write_text(line + line[:25])
    assert len(follower.poll()) == 1
    assert follower.poll() == []
    with metrics.open("a") as file:
        file.write(line[25:])
    assert len(follower.poll()) == 1


def test_a_replaced_file_is_read_anew_even_when_it_is_longer(metrics: Path) -> None:
    append(metrics, START, *map(step_row, range(1, 5)))
    follower = MetricsFollower(metrics)
    follower.poll()
    follower.poll()
    assert not follower.starts_over
    replace(metrics, START, *map(step_row, range(1, 9)))
    assert [row["step"] for row in follower.poll()] == list(range(9))
    assert follower.starts_over
    append(metrics, step_row(9))
    assert [row["step"] for row in follower.poll()] == [9]
    assert not follower.starts_over


def test_a_file_that_shrank_in_its_place_is_read_anew(metrics: Path) -> None:
    append(metrics, START, step_row(1), step_row(2))
    follower = MetricsFollower(metrics)
    follower.poll()
    metrics.write_text(json.dumps(START) + "\n")
    assert follower.poll() == [START]
    assert follower.starts_over


def test_the_workers_own_file_is_followed_across_a_restart(metrics: Path) -> None:
    follower = MetricsFollower(metrics)
    follower.poll()
    file = MetricsFile(metrics, 0)
    for row in (START, step_row(1), step_row(2), step_row(3, loss=math.nan, skipped=True)):
        file.write(row)
    assert [row["step"] for row in follower.poll()] == [0, 1, 2, 3]
    file.close()
    file = MetricsFile(metrics, 2)
    assert [row["step"] for row in follower.poll()] == [0, 1, 2]
    assert follower.starts_over
    file.write(step_row(3))
    assert [row["step"] for row in follower.poll()] == [3]
    file.close()


def test_a_line_that_is_no_json_ends_nothing(metrics: Path) -> None:
    metrics.write_text(f"{json.dumps(START)}\n\0\0\0\n{json.dumps(step_row(1))}\n")
    assert [row["step"] for row in MetricsFollower(metrics).poll()] == [0, 1]


# --- lines for a log ------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that the views see, in its only element."""
    now = [1000.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_a_log_has_a_line_for_each_measurement_and_none_for_other_steps(
    metrics: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    view, follower = PlainView(), MetricsFollower(metrics)
    view.begin(100, 4096)
    view.status("loading the model")
    view.update(follower)
    append(
        metrics,
        START,
        *map(step_row, range(1, 10)),
        step_row(10, eval_loss=3.0),
        *map(step_row, range(11, 20)),
    )
    view.update(follower)
    view.update(follower)
    loading, start, measured = capsys.readouterr().err.splitlines()
    assert loading == "loading the model …"
    assert start == "held-out loss after scaling: 3.400, of the base: 2.900"
    assert measured == (
        "step 10 of 100, 41K of 410K tokens, loss 2.990, "
        "held-out 3.000 (scaled 3.400 → base 2.900, 80% of the way), 1,500 tokens/s, 90 s left"
    )


def test_a_log_names_each_held_out_set(metrics: Path, capsys: pytest.CaptureFixture[str]) -> None:
    view, follower = PlainView(), MetricsFollower(metrics)
    view.begin(100, 4096)
    view.update(follower)
    start = START | {
        "eval_losses": {"docs": 3.4, "code": 2.0},
        "base_losses": {"docs": 2.9, "code": 1.5},
    }
    now = step_row(
        10,
        eval_loss=3.0,
        eval_losses={"docs": 3.0, "code": 1.4},
        difference_intervals={"docs": [0.05, 0.15], "code": [-0.25, 0.05]},
    )
    append(metrics, start, now)
    view.update(follower)
    first, measured = capsys.readouterr().err.splitlines()[-2:]
    assert first == (
        "held-out loss after scaling: docs 3.400 code 2.000, of the base: docs 2.900 code 1.500"
    )
    assert measured == (
        "step 10 of 100, 41K of 410K tokens, loss 2.990, "
        "held-out docs 3.000 (scaled 3.400 → base 2.900, 80% of the way), "
        "code 1.400 (scaled 2.000 → base 1.500, reached, -0.100 ± 0.150), 1,500 tokens/s, 90 s left"
    )


def test_a_log_without_measurements_has_a_line_a_minute(
    metrics: Path, clock: list[float], capsys: pytest.CaptureFixture[str]
) -> None:
    view, follower = PlainView(), MetricsFollower(metrics)
    view.begin(1000, 4096)
    view.update(follower)
    for step in range(1, 182):  # a step a second, three minutes
        clock[0] += 1
        append(metrics, step_row(step))
        view.update(follower)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(" of ")[0] for line in lines] == ["step 60", "step 120", "step 180"]
    assert "held-out" not in lines[0]


def test_measurements_that_were_told_before_a_restart_are_not_told_again(
    metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [START, *(step_row(step, eval_loss=3.0) for step in range(1, 9))]
    append(metrics, *rows)
    view, follower = PlainView(), MetricsFollower(metrics)
    view.begin(10, 4096)
    view.update(follower)
    assert capsys.readouterr().err == ""
    replace(metrics, *rows[:6])
    view.update(follower)
    append(metrics, rows[6])
    view.update(follower)
    first, second = capsys.readouterr().err.splitlines()
    assert first == "going on from step 5"
    assert second.startswith("step 6 of 10, ")


def test_the_finished_models_own_copy_of_the_file_tells_what_is_new_and_no_more(
    metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view, follower = PlainView(), MetricsFollower(metrics)
    view.begin(2, 4096)
    view.update(follower)
    rows = [START, step_row(1, eval_loss=3.1), step_row(2, eval_loss=3.0)]
    append(metrics, *rows[:2])
    view.update(follower)
    assert len(capsys.readouterr().err.splitlines()) == 2
    replace(metrics, *rows)
    view.update(follower)
    last, saving = capsys.readouterr().err.splitlines()
    assert last.startswith("step 2 of 2, ")
    assert saving == "saving …"
    replace(metrics, *rows)
    view.update(follower)
    assert capsys.readouterr().err == ""


def test_the_end_of_the_steps_is_told_as_saving(
    metrics: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    view, follower = PlainView(), MetricsFollower(metrics)
    view.begin(1, 4096)
    view.update(follower)
    append(metrics, step_row(1))
    view.update(follower)
    view.update(follower)
    assert capsys.readouterr().err == "saving …\n"


# --- the terminal ---------------------------------------------------------------------------------


def console(width: int = 80, encoding: str = "utf-8") -> Console:
    file = io.TextIOWrapper(io.BytesIO(), encoding=encoding, errors="strict", write_through=True)
    return Console(file=file, force_terminal=True, width=width, height=24, legacy_windows=False)


def picture(view: LiveView) -> list[str]:
    """The lines on the terminal."""
    lines = view._console.render_lines(view._picture(), pad=False)
    return ["".join(segment.text for segment in line).rstrip() for line in lines]


def written(view: LiveView) -> str:
    file = view._console.file
    assert isinstance(file, io.TextIOWrapper)
    assert isinstance(file.buffer, io.BytesIO)
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", file.buffer.getvalue().decode(file.encoding))


def live(
    metrics: Path, *rows: dict[str, Any], num_steps: int = 1000, **options: Any
) -> tuple[LiveView, Any]:
    """A view that has seen these rows come."""
    view, follower = LiveView(console(**options)), MetricsFollower(metrics)
    view.begin(num_steps, 4096)
    view.status("loading the model")
    view.update(follower)
    append(metrics, *rows)
    view.update(follower)
    return view, follower


@pytest.mark.parametrize("width", [80, 60, 20])
@pytest.mark.parametrize("encoding", ["utf-8", "ascii", "latin-1"])
def test_a_whole_picture_has_seven_lines_that_fit(metrics: Path, width: int, encoding: str) -> None:
    rows = [
        START,
        *(step_row(k, kl=0.123, eval_loss=3.0, loss=math.nan, skipped=True) for k in range(1, 700)),
    ]
    with live(metrics, *rows, step_row(700, grad_norm=math.inf), width=width, encoding=encoding)[
        0
    ] as view:
        view.status("saving a checkpoint")
        lines = picture(view)
        assert len(lines) == 7
        assert max(map(len, lines)) <= width
        assert "".join(lines).encode(encoding)


def test_the_picture_says_how_far_the_held_out_loss_is(metrics: Path) -> None:
    with live(metrics, START, step_row(100, eval_loss=3.0), step_row(101))[0] as view:
        assert picture(view)[1:] == [
            "step       101 of 1,000 · 414K of 4.1M tokens",
            "loss       2.899   █▁",
            "held-out   3.000 (scaled 3.400 → base 2.900, 80% of the way)",
            "speed      1,500 tokens/s · MFU 31.0% · peak 44.00 GB",
            "optimizer  lr 1.00e-04 · gradient norm 1.2",
        ]
        assert picture(view)[0].endswith("  10%  15 min left")


def test_a_status_yields_to_the_first_row_and_one_said_later_stays(metrics: Path) -> None:
    view, follower = live(metrics)
    with view:
        assert picture(view)[-1].endswith("loading the model …")
        append(metrics, START)
        view.update(follower)
        assert "loading" not in "".join(picture(view))
        view.status("saving a checkpoint")
        append(metrics, step_row(1))
        view.update(follower)
        assert picture(view)[-1].endswith("saving a checkpoint …")


def test_rows_of_an_earlier_launch_do_not_say_that_the_model_is_loaded(metrics: Path) -> None:
    append(metrics, START, step_row(1))
    view, _ = live(metrics)
    with view:
        assert picture(view)[1].startswith("step       1 of")
        assert picture(view)[-1].endswith("loading the model …")


def test_after_a_restart_the_picture_goes_back(metrics: Path) -> None:
    rows = [START, *(step_row(k, skipped=k > 5) for k in range(1, 9))]
    view, follower = live(metrics, *rows)
    with view:
        assert picture(view)[1].endswith("3 skipped")
        replace(metrics, *rows[:5])
        view.update(follower)
        assert picture(view)[1] == "step       4 of 1,000 · 16.4K of 4.1M tokens"
        assert picture(view)[-1].endswith("going on from step 4 …")
        append(metrics, rows[5])
        view.update(follower)
        assert "going on" not in "".join(picture(view))


def test_what_is_not_finite_is_null_in_the_file_and_nan_in_sight(metrics: Path) -> None:
    row = step_row(1, loss=None, grad_norm=None, kl=None, eval_loss=None, skipped=True)
    with live(metrics, START, row)[0] as view:
        assert "loss       nan" in picture(view)
        assert "optimizer  lr 1.00e-04 · gradient norm nan" in picture(view)


def test_no_base_means_no_way_to_it(metrics: Path) -> None:
    with live(metrics, {"step": 0, "tokens": 0, "eval_loss": 3.4}, step_row(1, eval_loss=3.3))[
        0
    ] as view:
        assert "held-out   3.300 (at the start 3.400)" in picture(view)


def test_the_terminal_view_has_no_thread(metrics: Path) -> None:
    before = threading.active_count()
    with live(metrics, START, step_row(1))[0]:
        assert threading.active_count() == before


def test_notes_stay_in_sight_and_a_waiting_line_does_not(metrics: Path) -> None:
    with LiveView(console()) as view:
        view.status("tokenising")
        view.note("[b] stays as it is")
        view.tokenising(1, 2)
        time.sleep(0.11)
        view.tokenising(3, 4)
    assert "[b] stays as it is\n" in written(view)
    assert " 75%" in written(view)
    assert picture(view) in ([], [""])


def raw(view: LiveView) -> str:
    file = view._console.file
    assert isinstance(file, io.TextIOWrapper)
    assert isinstance(file.buffer, io.BytesIO)
    return file.buffer.getvalue().decode(file.encoding)


def test_where_the_width_changes_the_screen_is_cleared_once_and_drawn_anew(
    metrics: Path, clock: list[float]
) -> None:
    clear = "\x1b[H\x1b[2J"
    view, follower = live(metrics, START, step_row(1))
    for width, times in ((80, 0), (60, 1), (60, 1), (100, 2)):
        view._console.width = width
        clock[0] += 1
        view.update(follower)
        assert raw(view).count(clear) == times
    assert max(map(len, picture(view))) <= 96


def test_the_last_line_leaves_room_for_what_a_terminal_writes_when_a_key_is_pressed(
    metrics: Path,
) -> None:
    view, _ = live(metrics, START, step_row(1), width=40)
    assert max(map(len, picture(view))) <= 36


def test_of_a_run_that_was_stopped_no_line_of_the_view_stays(metrics: Path) -> None:
    erased = "\x1b[1A\x1b[2K"
    for error, stays in ((StoppedError("ended by SIGINT", 2), False), (None, True)):
        view, _ = live(metrics, START, step_row(1))
        num_lines = len(picture(view))
        before = len(raw(view))
        with suppress(StoppedError), view:
            if error is not None:
                raise error
        assert raw(view)[before:].rstrip().endswith(erased * num_lines) == (not stays)


def test_a_pipe_gets_lines_and_quiet_gets_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    assert type(view_for(ProgressMode.none)) is NoView
    assert type(view_for(ProgressMode.auto)) is PlainView


def test_a_terminal_that_cannot_move_its_cursor_gets_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setenv("TERM", "dumb")
    assert type(view_for(ProgressMode.auto)) is PlainView
    monkeypatch.setenv("TERM", "xterm")
    assert type(view_for(ProgressMode.auto)) is LiveView


def test_views_for_logs_do_without_rich() -> None:
    code = (
        "import sys; from dus_cli.heal.watch.views import view_for, MetricsFollower\n"
        "from pathlib import Path\n"
        "from dus_cli.progress import ProgressMode\n"
        "view_for(ProgressMode.auto).update(MetricsFollower(Path('/nowhere')))\n"
        "sys.exit('rich' in sys.modules)"
    )
    assert (
        subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode
        == 0
    )


def test_a_sparkline_is_as_wide_as_told_and_leaves_out_what_is_not_finite() -> None:
    assert len(sparkline([math.sin(k) for k in range(997)], width=60)) == 60
    assert sparkline([1.0, math.nan, 2.0, math.inf], width=60) == "▁█"
    assert sparkline([], width=60) == sparkline([1.0], width=0) == ""


# --- the picture of the losses --------------------------------------------------------------------


def run_rows(num_steps: int, every: int = 10, end: float = 2.8) -> Rows:
    rows = [START]
    for step in range(1, num_steps + 1):
        loss = end + (3.4 - end) * math.exp(-6 * step / num_steps)
        more = {"eval_loss": loss} if step % every == 0 else {}
        rows.append(step_row(step, loss=loss + 0.05 * math.sin(step * 7.3), **more))
    return rows


def parsed(svg: str) -> ET.Element:
    return ET.fromstring(svg)  # noqa: S314  (our own)


def texts(svg: str) -> list[str]:
    return [element.text or "" for element in parsed(svg).iter() if element.tag.endswith("}text")]


def curve(
    rows: Rows, base_loss: float | None = 2.9, title: str = "Healing x", *, dark: bool = False
) -> str:
    """The picture, held to be well-formed, self-contained and inside its frame."""
    svg = loss_curve(rows, base_loss=base_loss, title=title, dark=dark)
    check(svg)
    return svg


def check(svg: str) -> None:
    root = parsed(svg)
    _, _, width, height = map(float, root.attrib["viewBox"].split())
    assert [child.tag.rpartition("}")[2] for child in root][:2] == ["title", "desc"]
    assert not re.search(r"<script|href|url\(|<style|\bnan\b|\binf\b", svg)
    for element in root.iter():
        for x, y in re.findall(r"([-\d.]+),([-\d.]+)", element.get("points", "")):
            assert 0 <= float(x) <= width
            assert 0 <= float(y) <= height
        for name, most in (("cx", width), ("x", width), ("cy", height), ("y", height)):
            assert 0 <= float(element.get(name, "0")) <= most


ODD: dict[str, Rows] = {
    "nothing": [],
    "only the start": [START],
    "one step without a start": [step_row(1)],
    "constant": [step_row(k, loss=2.9, eval_loss=2.9) for k in range(50)],
    "zero": [step_row(k, loss=0.0, eval_loss=0.0) for k in range(50)],
    "nothing but NaN": [
        step_row(k, loss=math.nan, eval_loss=math.nan, skipped=True) for k in range(9)
    ],
    "infinite": [START, step_row(1, loss=math.inf, eval_loss=math.inf)],
    "huge": [step_row(k, tokens=k * 10**13, eval_loss=3 - k / 99) for k in range(99)],
    "better than its base": [START | {"eval_loss": 2.0}, step_row(1, eval_loss=1.9)],
    "null": [START, step_row(1, loss=None, eval_loss=None)],
    "no loss": [{"step": 3, "tokens": 9}],
}


@pytest.mark.parametrize("name", ODD)
@pytest.mark.parametrize("base_loss", [2.9, None, math.nan])
def test_odd_runs_have_a_picture(name: str, base_loss: float | None) -> None:
    curve(ODD[name], base_loss)


def test_the_picture_names_scaled_base_and_the_first_measurement_at_the_base() -> None:
    rows = [
        START,
        *(
            step_row(k, eval_loss=loss)
            for k, loss in ((250, 3.0), (500, 2.9), (750, 2.95), (1000, 2.8))
        ),
    ]
    shown = texts(curve(rows))
    assert {"scaled 3.400", "base 2.900", "at the base after 2.05M tokens", "1M", "4M"} <= set(
        shown
    )
    assert "at the start 3.400" in texts(curve(rows, None))
    assert not any(
        "at the base" in text or text.startswith("base") for text in texts(curve(rows, None))
    )
    assert not any("at the base" in text for text in texts(curve(rows, 2.7)))


def test_the_picture_of_a_long_run_is_small() -> None:
    rows = run_rows(100_000, every=50)
    assert len(curve(rows)) < 40_000


def test_the_same_rows_give_the_same_bytes_and_a_step_twice_counts_once() -> None:
    rows = run_rows(300)
    again = [step_row(7, loss=99.0, tokens=7), START, *rows]
    assert curve(rows) == curve(list(rows)) == curve(again)


def test_skipped_steps_are_not_drawn() -> None:
    rows = run_rows(50)
    assert curve(rows) == curve([*rows, step_row(51, loss=80.0, skipped=True)])


def test_a_spike_does_not_flatten_a_long_run() -> None:
    rows = run_rows(1000)
    spiked = [row | {"loss": 90.0} if row["step"] == 500 else row for row in rows]
    ticks = [float(text) for text in texts(curve(spiked)) if re.fullmatch(r"\d\.\d+", text)]
    assert max(ticks) < 3.6


@pytest.mark.parametrize("num_steps", [90, 400])
def test_the_training_line_is_smooth_enough_that_the_held_out_one_shows(num_steps: int) -> None:
    chance = random.Random(0)
    rows = [
        row | {"loss": row.get("loss", 0.0) + chance.gauss(0, 0.4)}
        for row in run_rows(num_steps, 2)
    ]
    rows[0] = START
    svg = curve(rows)
    training, heldout = (
        [float(point.split(",")[1]) for point in points.split()]
        for points in re.findall(r'points="([^"]+)"', svg)
    )
    rough = statistics.mean(abs(a - b) for a, b in pairwise(training))
    assert rough < 0.15 * (max(heldout) - min(heldout))
    assert max(heldout) - min(heldout) > 100  # of 266 pixels


def test_titles_are_text_whatever_they_hold() -> None:
    svg = curve(run_rows(20), title='</svg><script>"&\x00' + "long " * 99)
    assert "<script" not in svg
    assert "…" in texts(svg)[0]


def test_light_and_dark_are_the_same_picture_in_other_colours() -> None:
    light, dark = (
        re.sub("#[0-9a-f]{6}", "#", curve(run_rows(200), dark=dark)) for dark in (False, True)
    )
    assert light == dark
    assert "#0d1117" in curve([], dark=True)


def test_eight_series_are_told_apart_and_nine_are_refused() -> None:
    series = {
        f"{k} is <the> name": [(0.0, 3.4), (1e6, 3 - k / 10), (2e6, math.nan)]
        for k in range(MAX_SERIES)
    }
    for dark in (False, True):
        svg = compare_curves(series, base_loss=2.9, title="All", dark=dark)
        check(svg)
        assert set(series) | {"base 2.900"} <= set(texts(svg))
        lines = re.findall(
            r'<polyline points="[^"]*" fill="none" stroke-linejoin="round" ([^/]*)/>', svg
        )
        assert len(set(lines)) == MAX_SERIES
    with pytest.raises(ValueError, match="at most 8"):
        compare_curves(series | {"one more": []}, base_loss=None, title="All")


def test_a_comparison_of_nothing_and_of_long_names_has_a_picture() -> None:
    check(compare_curves({}, base_loss=None, title="Nothing"))
    svg = compare_curves({"long name " * 20: [(0, 3.0)], "empty": []}, base_loss=None, title="Few")
    check(svg)
    assert any(text.endswith("…") for text in texts(svg))
