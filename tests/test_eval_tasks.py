"""`dus eval --tasks`: local tasks through the real lm-evaluation-harness. Skipped where it is not
installed.

It brings forty packages, scikit-learn and pandas among them, so CI does without; make stack runs
it.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest
from conftest import Run, dus

torch = pytest.importorskip("torch")

import tiny  # noqa: E402

from dus_cli.errors import MissingExtraError  # noqa: E402
from dus_cli.evaluation import h6  # noqa: E402
from dus_cli.evaluation.options import TaskOptions  # noqa: E402
from dus_cli.evaluation.report import EvalReport, Gates, tasks_text  # noqa: E402
from dus_cli.evaluation.tasks import TaskReport, TaskResult, TaskScore, open_harness  # noqa: E402
from dus_cli.progress import NoProgress  # noqa: E402


def score(plan: h6.TaskPlan, value: float, **fields: Any) -> TaskScore:
    settings: dict[str, Any] = {
        "label": plan.label,
        "task": plan.task,
        "metric": plan.metric or "acc",
        "filter": plan.filter,
        "value": value,
        "stderr": 0.01,
        "higher_is_better": True,
        "num_fewshot": plan.num_fewshot,
        "samples": 100,
        "version": "1.0",
    }
    return TaskScore(**(settings | fields))


def h6_report(*values: float) -> TaskReport:
    results = tuple(
        TaskResult(f"model-{value}", "model", None, tuple(score(plan, value) for plan in h6.PLANS))
        for value in values
    )
    return TaskReport(TaskOptions(tasks=("h6",)), "0.4.13", results)


# --- without the harness -------------------------------------------------------------------------


def test_h6_is_the_papers_six_with_its_figures() -> None:
    assert [(plan.label, plan.num_fewshot) for plan in h6.PLANS] == [
        ("ARC-Challenge", 25),
        ("HellaSwag", 10),
        ("MMLU", 5),
        ("TruthfulQA", 0),
        ("Winogrande", 5),
        ("GSM8K", 5),
    ]
    assert round(h6.average(h6.PUBLISHED["SOLAR 10.7B"]), 2) == 66.04
    assert round(h6.average(h6.PUBLISHED["SOLAR 10.7B-Instruct"]), 2) == 74.20


def test_h6_stands_beside_the_published_figures_in_80_columns() -> None:
    text = tasks_text(h6_report(0.5), 80)
    assert max(map(len, text.splitlines())) <= 80
    (row,) = (line.split() for line in text.splitlines() if line.startswith("GSM8K"))
    assert row == ["GSM8K", "50.00", "±", "1.00", "55.50", "64.75"]
    (mean,) = (line.split() for line in text.splitlines() if line.startswith("H6"))
    assert mean == ["H6", "50.00", "66.04", "74.20"]
    many = tasks_text(h6_report(0.5, 0.25, 0.75, 0.1, 0.2), 80)
    assert max(map(len, many.splitlines())) <= 80
    assert many.count("ARC-Challenge") > 1
    assert all(f"model-{value}" in many for value in (0.5, 0.25, 0.75, 0.1, 0.2))


def test_a_drop_below_the_baseline_is_a_gate() -> None:
    report = h6_report(0.5, 0.495, 0.4)
    missed = EvalReport(None, report, Gates(max_drop=1.0)).missed
    assert len(missed) == 6
    assert (
        missed[0]
        == "model-0.4: ARC-Challenge 40.00 is more than --max-drop 1 points below model-0.5's 50.00"
    )
    assert EvalReport(None, report, Gates(max_drop=10.5)).missed == []
    assert EvalReport(None, h6_report(0.4, 0.5), Gates(max_drop=0.0)).missed == []


def test_without_the_harness_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'dus-cli\[eval\]'"):
        open_harness(TaskOptions(tasks=("h6",)), NoProgress())


# --- with it -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models, and tasks of three kinds with their data beside them: a choice, a group of
    two, a generation.
    """
    pytest.importorskip("lm_eval", reason="needs the eval extra; make stack runs it")
    pytest.importorskip("yaml")
    folder = tmp_path_factory.mktemp("tasks")
    corpus = tiny.write_corpus(folder / "corpus.jsonl", num_documents=60)
    tiny.train(tiny.write_base(folder / "base"), corpus, num_steps=120)
    tiny.write_base(folder / "random", seed=5)
    tiny.write_tasks(folder)
    return folder


@pytest.fixture(scope="module")
def done(home: Path) -> Run:
    names = ("--tasks", "words,says", "--tasks", "all_words", "--include-path", home / "tasks")
    # the second process of a job, to which the harness would tell nothing
    job: Any = {"LOCAL_RANK": "1", "HF_HOME": str(home / "hub")}
    offline: Any = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1"}
    data = ("--data", home / "corpus.jsonl", "--max-documents", "5")
    return dus(
        "eval",
        home / "base",
        home / "random",
        *names,
        *data,
        "--json",
        "--precision",
        "fp32",
        **job,
        **offline,
    )


def test_scores_are_the_harness_own(home: Path, done: Run) -> None:
    report = done.report
    assert done.stderr == ""
    assert report["tasks"] == ["words", "says", "all_words"]
    assert report["published"] is None
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    for model in report["models"]:
        manager = TaskManager(include_path=str(home / "tasks"), include_defaults=False)
        lm = HFLM(pretrained=str(home / model["name"]), device="cpu", dtype="float32", batch_size=2)
        expected = simple_evaluate(
            model=lm, tasks=["words", "all_words", "says"], task_manager=manager
        )
        by_label = {score["label"]: score for score in model["scores"]}
        assert list(by_label) == report["tasks"]
        words, says, group = by_label["words"], by_label["says"], by_label["all_words"]
        assert words["value"] == expected["results"]["words"]["acc_norm,none"]
        assert words["metrics"]["acc,none"] == expected["results"]["words"]["acc,none"]
        assert words["stderr"] == pytest.approx(
            expected["results"]["words"]["acc_norm_stderr,none"]
        )
        assert (words["metric"], words["samples"], words["num_fewshot"], words["version"]) == (
            "acc_norm",
            12,
            0,
            "2.0",
        )
        assert (says["metric"], says["value"]) == (
            "exact_match",
            expected["results"]["says"]["exact_match,none"],
        )
        assert (group["metric"], group["samples"]) == ("acc", 24)
        assert group["value"] == expected["groups"]["all_words"]["acc,none"]
        assert model["h6"] is None
        assert model["loss"] > 0
    first, other = (
        {score["label"]: score["metrics"] for score in model["scores"]}
        for model in report["models"]
    )
    assert first != other, "the second model was given the first one's answers"


def test_every_field_of_the_scores_is_documented(done: Run) -> None:
    layout = (Path(__file__).parent.parent / "docs/layout.md").read_text(encoding="utf-8")
    model = done.report["models"][0]
    for field in [*done.report, *model, *model["scores"][0], *done.report["gates"]]:
        assert f"`{field}`" in layout, field


def test_a_table_of_tasks_alone_and_shots_and_limits(home: Path) -> None:
    shown = ("--include-path", home / "tasks", "--limit", "4", "--num-fewshot", "1")
    run = dus("eval", home / "random", "--tasks", "words", *shown, HF_DATASETS_OFFLINE="1")
    assert run.returncode == 0, run.stderr
    lines = run.stdout.splitlines()
    assert (lines[0].split(), lines[1].split()[0]) == (["random"], "words")
    assert "the first 4 examples" in lines[-1]
    report = dus(
        "eval", home / "random", "--tasks", "words", *shown, "--json", HF_DATASETS_OFFLINE="1"
    ).report
    (score,) = report["models"][0]["scores"]
    assert (score["num_fewshot"], score["samples"], report["limit"]) == (1, 4, 4)


def test_unknown_tasks_and_data_that_cannot_be_had_are_one_line(home: Path, tmp_path: Path) -> None:
    run = dus("eval", home / "base", "--tasks", "no_such_task", "-q")
    run.assert_one_line_error("lm-evaluation-harness has no task 'no_such_task'")
    offline: Any = {"HF_DATASETS_OFFLINE": "1", "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    dus("eval", home / "base", "--tasks", "arc_challenge", "-q", **offline).assert_one_line_error(
        "task arc_challenge: lm-evaluation-harness fails with"
    )


def test_h6_is_defined_by_tasks_that_the_harness_has_with_these_metrics_and_shots() -> None:
    pytest.importorskip("lm_eval", reason="needs the eval extra; make stack runs it")
    from lm_eval.tasks import TaskManager

    index = TaskManager().task_index
    for plan in h6.PLANS:
        config = index[plan.task].cfg
        metrics = config.get("metric_list") or config["aggregate_metric_list"]
        assert plan.metric in {metric["metric"] for metric in metrics}, plan
        filters = [entry["name"] for entry in config.get("filter_list") or []]
        assert plan.filter in (filters or ["none"]), plan
        # The harness does not let go of a task's own 0, and whatever else is replaced.
        assert config.get("num_fewshot") in {None, plan.num_fewshot}, plan
    assert len(index["mmlu"].cfg["task"]) == 4
