"""metrics.jsonl as the worker writes it, and what a run costs on paper."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest

from dus_cli.heal.estimate import memory_per_device, num_shards
from dus_cli.heal.launch.plan import TYPICAL_MFU
from dus_cli.heal.metrics import MetricsFile, read_metrics
from dus_cli.maps.shape import Shape, flops_per_token


def test_metrics_have_null_for_what_is_not_finite_and_lose_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    metrics = MetricsFile(path, last_step=-1)
    metrics.write({"step": 1, "loss": math.nan, "grad_norm": math.inf})
    metrics.close()
    with path.open("a") as file:
        file.write('{"step": 2, "lo')
    (only,) = read_metrics(path)
    assert only["loss"] is None
    assert only["grad_norm"] is None
    assert "NaN" not in path.read_text()


def test_metrics_forget_the_steps_that_are_run_again(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    for last in (-1, 2, -1):
        metrics = MetricsFile(path, last_step=last)
        assert [row["step"] for row in read_metrics(path)] == list(range(last + 1))
        for step in range(last + 1, 5):
            metrics.write({"step": step})
        metrics.close()
    assert [row["step"] for row in read_metrics(path)] == [0, 1, 2, 3, 4]


# SOLAR 10.7B: 48 layers of Mistral's shape.
SOLAR = Shape(10_731_524_096, 10_731_524_096 - 32000 * 4096, 48, 4096, 4096, 32000)


def test_a_10_7b_model_makes_about_5400_tokens_a_second_on_an_h100() -> None:
    per_token = flops_per_token(SOLAR, 4096)
    assert per_token == pytest.approx(7.33e10, rel=0.01)
    assert TYPICAL_MFU * 989e12 / per_token == pytest.approx(5396, rel=0.01)


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
    assert plain.weights + plain.gradients + plain.optimizer == pytest.approx(21.5e9, rel=0.01)
    assert plain.total == pytest.approx(52e9, rel=0.02)
    assert estimate("full").total == pytest.approx(27e9, rel=0.03)


def test_hsdp_splits_over_a_node_and_none_over_nobody() -> None:
    assert [num_shards(how, 16, 8) for how in ("fsdp", "hsdp", "none")] == [16, 8, 1]
