"""`dus heal --eval-tasks`: local tasks through the real lm-evaluation-harness on the model under
training. Skipped where it is not installed; make stack runs it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import dus

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("lm_eval")

import tiny  # noqa: E402

RECIPE = (
    "--steps 8 --seq-length 64 --batch-tokens 512 --lr 3e-3 --holdout 10% --eval-every 2 "
    "--precision fp32"
).split()

OFFLINE: Any = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A scaled model, and tasks."""
    torch.set_num_threads(1)
    folder = tmp_path_factory.mktemp("tasks")
    corpus = tiny.write_corpus(folder / "corpus.jsonl")
    base = tiny.train(tiny.write_base(folder / "base"), corpus, num_steps=60)
    tiny.upscaled(base, folder / "scaled")
    tiny.write_tasks(folder)
    return folder


def options(home: Path) -> tuple[str | Path, ...]:
    return ("--data", home / "corpus.jsonl", *RECIPE)


def tasks(home: Path, names: str = "words,all_words") -> tuple[str | Path, ...]:
    return ("--eval-tasks", names, "--include-path", home / "tasks", "--eval-tasks-every", "2")


@pytest.fixture(scope="module")
def healed(home: Path) -> Path:
    out = home / "healed"
    failure = tiny.heal(
        home / "scaled", out, *options(home), *tasks(home), "--export-every", "4", **OFFLINE
    )
    assert failure == ""
    return out


def scores_of(home: Path, model: Path) -> dict[str, Any]:
    """What `dus eval` measures."""
    names = ("--tasks", "words,all_words", "--include-path", home / "tasks")
    report = dus("eval", model, *names, "--precision", "fp32", "--json", **OFFLINE).report
    return {score["label"]: score["value"] for score in report["models"][0]["scores"]}


def test_scores_are_those_of_dus_eval_on_the_export_of_the_step(home: Path, healed: Path) -> None:
    rows: dict[int, Any] = {row["step"]: row.get("tasks") for row in tiny.metrics(healed)}
    assert [step for step, scores in rows.items() if scores] == [0, 4, 8]
    export = home / "healed-step-4"
    assert rows[4] == pytest.approx(scores_of(home, export))
    assert rows[0] == pytest.approx(scores_of(home, home / "scaled"))
    report = json.loads((healed / "report.json").read_text())
    card = (healed / "README.md").read_text()
    for score in report["tasks"]:
        label = score["label"]
        assert (score["start"], score["value"]) == (rows[0][label], rows[8][label])
        assert f"- {label} {score['value']:.4f} ± " in card
        assert f"(at the start {score['start']:.4f})" in card


def test_tasks_change_nothing_that_is_learned_and_two_workers_score_the_same(
    home: Path, healed: Path
) -> None:
    assert tiny.heal(home / "scaled", home / "without", *options(home)) == ""
    assert tiny.curve(home / "without") == tiny.curve(healed)
    failure = tiny.heal(
        home / "scaled", home / "two", *options(home), *tasks(home), workers=2, **OFFLINE
    )
    assert failure == ""
    for one, two in zip(tiny.metrics(healed), tiny.metrics(home / "two"), strict=True):
        assert one.get("tasks") == pytest.approx(two.get("tasks"))


def test_the_plan_counts_the_tokens_of_the_tasks(home: Path) -> None:
    out = ("-o", home / "planned", "--dry-run")
    plan = tiny.forked_dus("heal", home / "scaled", *options(home), *tasks(home), *out, "--json")
    without = tiny.forked_dus("heal", home / "scaled", *options(home), *out, "--json")
    found = plan.report["tasks"]
    words = ("seam", "layer", "model", "text")
    request = sum(len(f"the {word} joins {other}") for word in words for other in words)
    assert found["num_tokens"] == 3 * 3 * request  # a task, and two in the group
    assert plan.report["evaluation_share"] > without.report["evaluation_share"]


def test_tasks_that_cannot_be_run_are_refused_in_one_line(home: Path) -> None:
    out = ("-o", home / "refused", "-q")
    command = ("heal", home / "scaled", *options(home), *out)
    path = ("--include-path", home / "tasks")
    for arguments, part in (
        (("--eval-tasks", "nothing", *path), "has no task 'nothing'"),
        (("--eval-tasks", "says", *path), "task says generates text"),
        (path, "--include-path is about --eval-tasks"),
    ):
        tiny.forked_dus(*command, *arguments, **OFFLINE).assert_one_line_error(part)
