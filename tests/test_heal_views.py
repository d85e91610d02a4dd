"""What a person sees of a healing: the follower of metrics.jsonl, the lines, the pictures, the dry run's figures."""

from __future__ import annotations

import io
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest

from dus_cli.heal.curve import compare_curves, loss_curve
from dus_cli.heal.estimate import Shape, flops_per_token, memory_per_device, num_shards
from dus_cli.heal.live import LineView, LiveView, MetricsFollower, QuietView, sparkline, view_for
from dus_cli.heal.metrics import MetricsFile, read_metrics


def row(step: int, loss: float | None = None, **more: Any) -> dict[str, Any]:
    figures = {
        "lr": 1e-4,
        "grad_norm": 1.0,
        "tokens_per_second": 900.0,
        "mfu": 0.3,
        "peak_memory_bytes": 4_000_000_000,
        "seconds": {"forward": 1.0},
        "skipped": False,
    }
    head: dict[str, Any] = {"step": step, "tokens": step * 512}
    return head | ({"loss": loss} | figures if step else {"seconds": {}}) | more


START = row(0, eval_loss=3.4, base_loss=2.9)


def append(path: Path, *rows: dict[str, Any]) -> None:
    with path.open("a") as file:
        file.writelines(json.dumps(each) + "\n" for each in rows)


def test_the_follower_tells_each_row_once_and_waits_for_the_end_of_a_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    assert follower.poll() == []
    append(path, START, row(1, 3.3))
    assert [each["step"] for each in follower.poll()] == [0, 1]
    with path.open("a") as file:
        file.write(json.dumps(row(2, 3.2))[:20])
    assert follower.poll() == []
    with path.open("a") as file:
        file.write(json.dumps(row(2, 3.2))[20:] + "\n")
    assert [each["step"] for each in follower.poll()] == [2]


def test_after_a_restart_the_follower_tells_only_what_is_run_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = MetricsFollower(path)
    append(path, START, row(1, 3.3), row(2, 3.2), row(3, 3.1))
    follower.poll()
    metrics = MetricsFile(path, last_step=1)  # as a worker does that goes on from step 1
    assert follower.poll() == []
    assert [each["step"] for each in follower.rows] == [0, 1]
    metrics.write(row(2, 3.25))
    assert [each["loss"] for each in follower.poll()] == [3.25]
    metrics.close()


def test_metrics_have_null_for_what_is_not_finite_and_lose_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, last_step=-1)
    metrics.write(row(1, math.nan, grad_norm=math.inf))
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    (only,) = read_metrics(path)
    assert only["loss"] is None
    assert only["grad_norm"] is None
    assert "NaN" not in path.read_text()


def test_a_log_has_a_line_for_each_measurement_with_the_base_to_reach(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "metrics.jsonl"
    append(path, START, row(1, 3.3), row(2, 3.2, eval_loss=3.0), row(3, 3.1))
    with LineView() as view:
        view.begin(3, 512)
        view.status("loading the model")
        view.status("loading the model")
        view.update(MetricsFollower(path))
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "3 steps of 512 tokens",
        "loading the model …",
        "step 0/3: 0 tokens; held-out 3.4000 (scaled 3.4000 → base 2.9000, 0% of the way)",
        "step 2/3: 1,024 tokens; loss 3.2000; held-out 3.0000 (scaled 3.4000 → base 2.9000, 80% of the way); 900 tokens/s",  # noqa: E501
    ]


@pytest.mark.parametrize("columns", ["40", "80"])
def test_the_live_view_fits_the_terminal(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: str) -> None:
    pytest.importorskip("rich")
    monkeypatch.setenv("COLUMNS", columns)
    monkeypatch.setattr(sys, "stderr", io.StringIO())
    path = tmp_path / "metrics.jsonl"
    append(
        path, START, *(row(step, 3.3 - step / 100, eval_loss=3.0) for step in range(1, 90)), row(90, None, skipped=True)
    )
    view = LiveView()
    view.begin(100, 512)
    view.status("loading the model")
    view.update(MetricsFollower(path))
    from rich.console import Console

    text = io.StringIO()
    Console(file=text, width=int(columns)).print(view._picture())
    lines = text.getvalue().splitlines()
    assert len(lines) <= 8
    assert all(len(line) <= int(columns) for line in lines)
    assert "step 90/100" in text.getvalue()
    assert "held-out 3.0000" in text.getvalue()


def test_no_terminal_gets_lines_and_quiet_gets_nothing() -> None:
    assert isinstance(view_for(speaks=False), QuietView)
    assert type(view_for(speaks=True)) is (LiveView if os.isatty(2) else LineView)


def test_a_sparkline_is_as_wide_as_asked_and_flat_where_nothing_changes() -> None:
    assert len(sparkline([float(i) for i in range(1000)], 40)) == 40
    assert sparkline([2.0, 2.0, 2.0], 10) == "▁▁▁"
    assert sparkline([], 10) == sparkline([math.nan], 10) == ""


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize(
    "rows",
    [
        [],
        [START],
        [row(0, eval_loss=3.4), row(1, None, skipped=True)],
        [START, *(row(step, 3.0 + 1 / step, eval_loss=2.8) for step in range(1, 5000))],
        [row(0, eval_loss=2.0), row(1, 2.0, eval_loss=2.0)],
        [START, row(1, 3e9)],
    ],
    ids=["nothing", "start", "no-base", "long", "constant", "spike"],
)
def test_a_loss_curve_is_well_formed_and_small_whatever_the_run(rows: list[dict[str, Any]], dark: bool) -> None:
    base = rows[0].get("base_loss") if rows else None
    picture = loss_curve(rows, base_loss=base, title="Healing <out> & more", dark=dark)
    root = ET.fromstring(picture)  # noqa: S314  (our own text)
    assert root.get("viewBox") == "0 0 720 360"
    assert len(picture) < 500_000
    assert "nan" not in picture.replace("nats", "").lower()
    for x, y in re.findall(r"[ML](-?[\d.]+) (-?[\d.]+)", picture):
        assert 0 <= float(x) <= 720
        assert 0 <= float(y) <= 360
    assert ("base 2.900" in picture) == (base is not None)


def test_the_first_measurement_at_the_base_is_marked() -> None:
    rows = [START, row(1, 3.0, eval_loss=3.0), row(2, 2.8, eval_loss=2.8)]
    assert 'r="6"' in loss_curve(rows, base_loss=2.9, title="t")
    assert 'r="6"' not in loss_curve(rows[:2], base_loss=2.9, title="t")


def test_a_comparison_names_every_curve() -> None:
    series = {f"recipe {i}": [(0.0, 3.4), (100.0 * i, 3.0)] for i in range(9)}
    picture = compare_curves(series, base_loss=2.9, title="t")
    ET.fromstring(picture)  # noqa: S314  (our own text)
    assert all(f">{name}<" in picture for name in series)


# SOLAR 10.7B: 48 layers of Mistral's shape.
SOLAR = Shape(10_731_524_096, 10_731_524_096 - 32000 * 4096, 48, 4096, 4096, 32000)


def test_a_10_7b_model_makes_about_6000_tokens_a_second_on_an_h100() -> None:
    per_token = flops_per_token(SOLAR, 4096)
    assert per_token == pytest.approx(7.33e10, rel=0.01)
    assert 0.45 * 989e12 / per_token == pytest.approx(6070, rel=0.01)


def test_memory_on_paper_is_what_the_docs_say() -> None:
    def estimate(checkpointing: str) -> Any:
        return memory_per_device(
            SOLAR,
            num_shards=8,
            micro_batch_tokens=4096,
            weight_bytes=2,
            has_fp32_masters=True,
            activation_checkpointing=checkpointing,
            teacher_layers=0,
        )

    plain = estimate("none")
    assert plain.weights + plain.gradients + plain.optimizer == pytest.approx(24.1e9, rel=0.01)
    assert plain.total == pytest.approx(55e9, rel=0.02)
    assert estimate("full").total == pytest.approx(30e9, rel=0.03)


def test_hsdp_splits_over_a_node_and_none_over_nobody() -> None:
    assert [num_shards(how, 16, 8) for how in ("fsdp", "hsdp", "none")] == [16, 8, 1]
