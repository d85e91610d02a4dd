"""Results in the model card: what changes, what stays byte for byte, that the Hub's own library
reads it. Pictures.
"""

from __future__ import annotations

import hashlib
import subprocess
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any
from xml.etree import ElementTree as ET

import pytest
import yaml
from forked import dus
from pictures import check_labels

from dus_cli.common.reference import ModelRef
from dus_cli.errors import EvaluationError, OutputError
from dus_cli.evaluation import card
from dus_cli.evaluation.intervals import Estimate
from dus_cli.evaluation.options import ScoringOptions, TaskOptions
from dus_cli.evaluation.picture import eval_svg
from dus_cli.evaluation.report import EvalReport, LossReport, ModelResult
from dus_cli.evaluation.tasks import TaskReport, TaskResult, TaskScore

BODY = (
    "# A model\n\nText with --- in it, ünïcode and trailing spaces.   \n\n---\n\nThe end, without "
    "a newline"
)

CARD = f"""\
---
base_model: org/base   # a comment
library_name: transformers
tags:
- depth-up-scaling

license: "apache-2.0"
---
{BODY}"""

INDEXED = f"""\
---
license: mit
model-index:
- name: theirs
  results:
  - task: {{type: text-generation}}
    dataset: {{name: Their set, type: org/set}}
    metrics:
    - {{type: acc, value: 0.5}}   # by hand
# about the tags
tags: [a, b]
---
{BODY}"""


def result(value: float = 17.25, name: str = "heldout.jsonl", **data: Any) -> dict[str, Any]:
    metrics = [{"type": "perplexity", "value": value, "name": "perplexity"}]
    return card._entry({"name": name, "type": "json", **data}, metrics)


def front(text: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(text.split("---")[1])
    return found


def results(text: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = front(text)["model-index"][0]["results"]
    return found


def test_only_the_lines_of_the_index_are_added_and_the_hub_reads_them() -> None:
    changed = card.updated(CARD, "healed", [result()])
    before, _, rest = CARD.partition("---\n# A model")
    assert changed.startswith(before + "model-index:\n- name: healed\n")
    assert changed.endswith("---\n# A model" + rest)
    from huggingface_hub import ModelCard

    (read,) = vars(ModelCard(changed).data)["eval_results"]
    assert (read.task_type, read.dataset_name, read.metric_type, read.metric_value) == (
        "text-generation",
        "heldout.jsonl",
        "perplexity",
        17.25,
    )
    assert read.source_name == "dus eval"


def test_the_same_again_changes_nothing_and_another_value_takes_its_place() -> None:
    once = card.updated(CARD, "healed", [result(), result(3, "other.jsonl")])
    assert card.updated(once, "healed", [result()]) == once
    twice = card.updated(once, "healed", [result(16.5)])
    assert [entry["metrics"][0]["value"] for entry in results(twice)] == [16.5, 3]
    assert card.updated(twice, "healed", [result()]) == once


def test_results_of_others_and_every_other_byte_stay() -> None:
    changed = card.updated(INDEXED, "healed", [result()])
    head, tail = (
        INDEXED.split("model-index:", maxsplit=1)[0],
        INDEXED[INDEXED.index("# about the tags") :],
    )
    assert changed.startswith(head)
    assert changed.endswith(tail)
    theirs, ours = results(changed)
    assert theirs == {
        "task": {"type": "text-generation"},
        "dataset": {"name": "Their set", "type": "org/set"},
        "metrics": [{"type": "acc", "value": 0.5}],
    }
    assert ours["metrics"][0]["value"] == 17.25
    assert front(changed)["model-index"][0]["name"] == "theirs"


def test_the_same_task_with_other_shots_or_by_another_is_another_result() -> None:
    other = result() | {"source": {"name": "A leaderboard", "url": "https://example.org"}}
    index = yaml.safe_dump({"model-index": [{"name": "m", "results": [other]}]})
    changed = card.updated(
        f"---\n{index}---\n",
        "m",
        [result(args={"num_few_shot": 5}), result(args={"num_few_shot": 0})],
    )
    assert len(results(changed)) == 3
    assert results(changed)[0] == other


@pytest.mark.parametrize(
    "text",
    [
        "",
        "no metadata\n",
        "---\n---\n",
        "---\n# only a comment\n---\nbody",
        "---\nmodel-index:\ntags: [a]\n---\nbody",
        "---\nmodel-index: null # none yet\n---\n",
        "\ufeff---\nlicense: mit\n---\nbody",
        CARD.replace("\n", "\r\n"),
        INDEXED.replace("\n", "\r\n"),
        "---\nmodel-index: [{name: m, results: [{task: {type: x}}]}]\nz: 1\n---\n",
    ],
)
def test_cards_of_any_make_take_results_once(text: str) -> None:
    changed = card.updated(text, "m", [result()])
    assert card.updated(changed, "m", [result()]) == changed
    assert results(changed.replace("\r\n", "\n"))[-1]["metrics"][0]["value"] == 17.25
    assert changed.startswith("\ufeff") == text.startswith("\ufeff")
    if "\r\n" in text:
        assert "\n" not in changed.replace("\r\n", "")
    assert changed.endswith("body") == text.endswith("body")


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("---\n: [\n---\n", "is not YAML"),
        ("---\n- a\n- b\n---\n", "is not a list of fields"),
        ("---\nmodel-index: {a: 1}\n---\n", "is not in the Hub's format"),
        ("---\nmodel-index: [7]\n---\n", "is not in the Hub's format"),
        ("---\n{license: mit}\n---\n", "cannot be changed in one place"),
        (
            "---\nmodel-index: [&x {name: m}]\nother: *x\n---\n",
            "cannot be changed in one place|is not YAML",
        ),
        ("---\na: !!python/object/apply:os.system [ls]\n---\n", "is not YAML"),
    ],
)
def test_what_cannot_be_edited_is_refused_in_one_line(text: str, problem: str) -> None:
    with pytest.raises(EvaluationError, match=problem) as raised:
        card.updated(text, "m", [result()])
    assert "\n" not in str(raised.value)


# --- in a directory ------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "README.md").write_text(CARD, encoding="utf-8")
    (tmp_path / "README.md").chmod(0o640)
    (tmp_path / "other").write_text("x")
    sums = subprocess.run(
        ["sha256sum", "README.md", "other"], cwd=tmp_path, capture_output=True, check=True
    ).stdout
    (tmp_path / "SHA256SUMS").write_bytes(sums)
    return tmp_path


def test_checksums_hold_after_the_update(folder: Path) -> None:
    other = (folder / "SHA256SUMS").read_text().splitlines()[1]
    assert card.update_card(folder, "m", [result()])
    assert (
        subprocess.run(
            ["sha256sum", "-c", "SHA256SUMS"], cwd=folder, capture_output=True, check=False
        ).returncode
        == 0
    )
    assert (folder / "SHA256SUMS").read_text().splitlines()[1] == other
    assert not card.update_card(folder, "m", [result()])
    assert (folder / "README.md").stat().st_mode & 0o777 == 0o640
    assert sorted(path.name for path in folder.iterdir()) == ["README.md", "SHA256SUMS", "other"]
    # A run that was killed between the two files: the next one puts the sum right.
    (folder / "README.md").write_text(card.updated(CARD, "m", [result(3)]), encoding="utf-8")
    assert card.update_card(folder, "m", [result(3)])
    total = hashlib.sha256((folder / "README.md").read_bytes()).hexdigest()
    assert (folder / "SHA256SUMS").read_text().startswith(total)


def test_updates_at_once_lose_nothing(folder: Path) -> None:
    threads = [
        threading.Thread(target=card.update_card, args=(folder, "m", [result(k, f"set-{k}")]))
        for k in range(12)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(results((folder / "README.md").read_text(encoding="utf-8"))) == 12


def test_a_failure_to_write_leaves_the_card_as_it_was(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OutputError, match=r"cannot write README\.md: No space left on device"):
        card.update_card(folder, "m", [result()])
    assert (folder / "README.md").read_text(encoding="utf-8") == CARD
    assert not list(folder.glob(".*"))


def test_models_without_a_card_of_their_own_are_told_before_anything_is_measured(
    tmp_path: Path,
) -> None:
    (tmp_path / "model").mkdir()
    more = ("--data", tmp_path / "none.jsonl", "--update-card", "-q")
    dus("eval", tmp_path / "model", *more).assert_one_line_error("has no README.md for the results")
    dus("eval", tmp_path / "model", "org/name", *more).assert_one_line_error(
        "org/name is on the Hub"
    )
    (tmp_path / "model/README.md").symlink_to(tmp_path / "elsewhere")
    dus("eval", tmp_path / "model", *more).assert_one_line_error("is a symbolic link")


def report(*names: str, same: bool = True, margin: float | None = 0.02) -> EvalReport:
    """An evaluation of models by these names on a text and in a task."""
    models = tuple(
        ModelResult(
            name,
            name,
            None,
            is_base=False,
            tokens=9,
            unknown_tokens=0,
            loss=Estimate(2.8 + k, margin),
            bits_per_byte=Estimate(0.9 + k, margin),
            difference=Estimate(float(k), margin) if k else None,
            difference_bits=Estimate(k / 3, margin) if k else None,
            has_same_tokens=same or not k,
            seconds=1.0,
        )
        for k, name in enumerate(names)
    )
    losses = LossReport(
        "held<out>.jsonl", ("x",), 5, 60, {}, 5 if margin else 1, ScoringOptions(), "cpu", models
    )
    scores = [
        TaskScore("ARC", "arc", "acc", "none", 0.3 + k / 10, margin, True, 5, 9, "1")
        for k in range(len(names))
    ]
    results = tuple(
        TaskResult(name, name, None, (score,)) for name, score in zip(names, scores, strict=True)
    )
    return EvalReport(losses, TaskReport(TaskOptions(tasks=("arc",)), "0.4.13", results))


@pytest.mark.parametrize("margin", [0.02, None])
def test_the_picture_shows_every_model_with_its_interval(margin: float | None) -> None:
    found = report("base", "<script>", "h" * 60, margin=margin)
    for dark in (False, True):
        text = eval_svg(found, dark=dark)
        root = ET.fromstring(text)  # noqa: S314  (our own)
        assert "script" not in {element.tag.rpartition("}")[2] for element in root.iter()}
        shown = " ".join(root.itertext())
        assert "held<out>.jsonl" in shown
        assert "<script>" in shown
        assert "3.8000" in shown
        assert ("+1.0000 ± 0.0200" in shown) == (margin is not None)
        circles = [element for element in root.iter() if element.tag.endswith("circle")]
        assert len(circles) == 3 + 3 + 3  # losses, scores, legend
        xs = [float(circle.attrib["cx"]) for circle in circles[:3]]
        assert xs == sorted(xs)
        assert xs[1] - xs[0] == pytest.approx(xs[2] - xs[1], abs=0.2)
        assert all(34 <= x <= 500 for x in xs)
        assert "h" * 60 in check_labels(text)
    assert "Bits per byte: base 0.9000" in eval_svg(report("base", "other", same=False))


def test_the_picture_of_many_models_with_long_names_cuts_none_and_puts_none_on_another() -> None:
    names = [f"an-organisation/a-model-with-a-name-{'that-goes-on-' * k}{k}" for k in range(8)]
    found = report(*names)
    assert found.losses is not None
    text = check_labels(
        eval_svg(replace(found, losses=replace(found.losses, text_name="held-out " * 20)))
    )
    shown = "".join(text)
    assert all(name in shown for name in names)
    assert shown.replace(" ", "").startswith("Evaluationon" + "held-out" * 20)
    assert "30.0 40.0 50.0" in text
    assert "90.0 100.0" in text
    assert "healed" in check_labels(eval_svg(report("base", "scaled", "healed")))


def test_what_is_written_of_losses_and_tasks() -> None:
    estimate, ref = Estimate(2.84517, 0.02), ModelRef.parse("out")
    figures = {
        "loss": estimate,
        "bits_per_byte": Estimate(0.89123, 0.01),
        "seconds": 1.0,
        "has_same_tokens": True,
    }
    common: dict[str, Any] = figures | {
        "commit": None,
        "tokens": 9,
        "unknown_tokens": 0,
        "difference_bits": None,
    }
    models = tuple(
        ModelResult(name=name, model="out", is_base=is_base, difference=None, **common)
        for name, is_base in (("base of out", True), ("out", False))
    )
    options = ScoringOptions(seq_length=512, stride=256)
    losses = LossReport(
        "heldout.jsonl", ("heldout.jsonl",), 51, 60000, {}, 51, options, "cpu", models
    )
    score = TaskScore(
        "ARC-Challenge",
        "arc_challenge",
        "acc_norm",
        "none",
        0.61951,
        0.01,
        True,
        25,
        9,
        "1",
        "allenai/ai2_arc",
    )
    tasks = TaskReport(
        TaskOptions(tasks=("b",)), "0.4.13", (TaskResult("out", "out", None, (score,)),)
    )
    text, task = card.results_of(EvalReport(losses, tasks), ref)
    assert [metric["value"] for metric in text["metrics"]] == [2.8452, 17.2045, 0.8912]
    assert text["dataset"] == {
        "name": "heldout.jsonl",
        "type": "json",
        "args": {"documents": 51, "bytes": 60000, "seq_length": 512, "stride": 256},
    }
    assert task["dataset"] == {
        "name": "ARC-Challenge",
        "type": "allenai/ai2_arc",
        "args": {"num_few_shot": 25},
    }
    assert task["metrics"] == [{"type": "acc_norm", "value": 61.95, "name": "acc norm"}]
