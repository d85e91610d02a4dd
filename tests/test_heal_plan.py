"""A run says before it starts what it will measure, what it needs, and where its proof would be
thin.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import tiny

pytest.importorskip("torch")
pytest.importorskip("transformers")

from dus_cli.heal.launch import plan as planning
from dus_cli.heal.launch.resolve import _measuring, _recipe
from dus_cli.heal.options import RecipeOptions, SavingOptions, Train


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_home(tmp_path_factory.mktemp("plan"))


def dry(home: Path, *arguments: str) -> dict[str, Any]:
    data = ("--data", home / "corpus.jsonl", "--seq-length", "64", "--batch-tokens", "512")
    return tiny.forked_dus("heal", home / "scaled", *data, *arguments, "--dry-run", "--json").report


def measuring(
    steps: int, tokens_per_step: int, num_heldout: int, train: str = "all", **keeping: Any
) -> tuple[int, int]:
    class Model:
        new_layers, num_layers = (3,), 6

    recipe = _recipe(RecipeOptions(train=Train(train)), Model(), steps, tokens_per_step)  # type: ignore[arg-type]
    return _measuring(SavingOptions(**keeping), recipe, steps, tokens_per_step, num_heldout)


@pytest.mark.parametrize("train", ["all", "new"])
@pytest.mark.parametrize("num_heldout", [500, 20_000, 310_000, 10**9])
@pytest.mark.parametrize(
    ("steps", "tokens_per_step"), [(1, 4096), (15, 4096), (39, 512), (400, 4096), (9000, 262_144)]
)
def test_measurements_take_a_tenth_of_a_run_unless_more_was_asked_for(
    steps: int, tokens_per_step: int, num_heldout: int, train: str
) -> None:
    every, tokens = measuring(steps, tokens_per_step, num_heldout, train)
    forward = 1 / 3 if train == "all" else 2 / 3
    took = (-(-steps // every) + 2) * min(tokens, num_heldout) * forward
    assert took <= 0.1 * (took + steps * tokens_per_step)
    assert 1 <= every <= steps
    assert tokens <= 250_000
    assert -(-steps // every) <= 20
    assert measuring(steps, tokens_per_step, num_heldout, train, eval_tokens=77) == (
        max(1, steps // 20),
        77,
    )
    often, fewer = measuring(steps, tokens_per_step, num_heldout, train, eval_every=1)
    assert often == 1
    assert (steps + 2) * fewer * forward <= 0.1 / 0.9 * steps * tokens_per_step


def test_a_long_run_measures_as_much_as_it_ever_did() -> None:
    assert measuring(9000, 262_144, 310_000) == (450, 250_000)


def test_the_plan_tells_what_is_measured_of_what_is_held_out(home: Path) -> None:
    plan = dry(home, "--holdout", "30%", "--steps", "20")
    assert plan["heldout_tokens"] < plan["available_heldout_tokens"] / 5
    assert 0 < plan["heldout_documents"] < plan["available_heldout_documents"]
    assert plan["evaluation_share"] <= 0.1
    whole = dry(home, "--holdout", "30%", "--steps", "20", "--eval-tokens", "250K")
    assert (
        whole["heldout_documents"]
        == whole["available_heldout_documents"]
        == plan["available_heldout_documents"]
    )
    # With the mask nothing predicts a document's first token.
    assert (
        whole["heldout_tokens"]
        == whole["available_heldout_tokens"] - whole["available_heldout_documents"]
    )
    assert whole["evaluation_share"] > plan["evaluation_share"]
    assert whole["epochs"] == pytest.approx(20 * 8 / ((whole["train_tokens"] - 1) // 64))


def test_a_thin_proof_is_warned_of(home: Path) -> None:
    plan = dry(home, "--steps", "4000", "--eval-tokens", "250K")
    assert plan["available_heldout_documents"] < 20
    thin, many = plan["warnings"]
    assert "held out are too few to prove much; give more with --holdout or --eval-data" in thin
    assert f"the budget is {plan['epochs']:,.1f} epochs" in many
    few = dry(home, "--holdout", "30%", "--steps", "20")
    assert ["measure more of it with --eval-tokens 250K" in text for text in few["warnings"]] == [
        True
    ]


def test_the_plan_says_how_often_each_part_of_a_mixture_is_read(home: Path) -> None:
    """An epoch is over when the smallest part ends; what then comes again is told and warned of."""
    small = tiny.write_corpus(home / "small.jsonl", 12, seed=5)
    parts = ("--data", f"{home / 'corpus.jsonl'}:3", "--data", f"{small}:1")
    fixed = ("--seq-length", "32", "--tokens", "64K", "--holdout", "10%", "--dry-run")
    plan = tiny.forked_dus("heal", home / "scaled", *parts, *fixed, "--json").report
    large, little = plan["mixture"]
    assert (large["name"], large["share"]) == ("corpus.jsonl:3", 0.75)
    assert (little["name"], little["share"]) == ("small.jsonl:1", 0.25)
    sizes = [plan["tokens"] * each["share"] / each["epochs"] for each in (large, little)]
    assert sum(sizes) == pytest.approx(plan["train_tokens"])
    assert little["epochs"] > 4 > large["epochs"]
    (warning,) = [text for text in plan["warnings"] if "memorises" in text]
    assert warning.startswith(f"the budget reads small.jsonl:1 {little['epochs']:.2f} times")
    told = tiny.forked_dus("heal", home / "scaled", *parts, *fixed).stdout
    assert "documents, read as a mixture\n" in told
    assert f"25.0% of the rows from small.jsonl:1, read {little['epochs']:.2f} times\n" in told


def test_sources_of_one_name_are_told_apart_by_their_folders(home: Path) -> None:
    parts: list[str] = []
    for weight, folder in enumerate(("code", "math"), start=1):
        (home / folder).mkdir()
        path = tiny.write_corpus(home / folder / "a.jsonl", 40, seed=10 + weight)
        parts += ["--data", f"{path}:{weight}"]
    fixed = ("--seq-length", "32", "--tokens", "4K", "--holdout", "10%", "--dry-run", "--json")
    plan = tiny.forked_dus("heal", home / "scaled", *parts, *fixed).report
    names = ["code/a.jsonl:1", "math/a.jsonl:2"]
    assert [each["name"] for each in plan["mixture"]] == plan["data"] == names


def test_the_plan_warns_of_a_text_that_is_given_twice(home: Path) -> None:
    twice = dry(home, "--data", str(home / "corpus.jsonl"))["warnings"]
    (warning,) = [text for text in twice if "same text" in text]
    assert warning.startswith("corpus.jsonl, corpus.jsonl have the same text")
    assert not any("same text" in text for text in dry(home)["warnings"])


def test_compiled_layers_keep_as_much_in_fp32_as_in_bf16(home: Path) -> None:
    """A CPU takes half as many tokens at once in fp32; a smaller step has fewer."""

    def kept(*options: str) -> float:
        memory = dry(home, "--compile", "--nproc-per-node", "1", *options)["memory_per_device"]
        return float(memory["activations"])

    in_bf16 = kept("--batch-tokens", "4096", "--precision", "bf16")
    assert kept("--batch-tokens", "4096", "--precision", "fp32") == in_bf16
    assert kept("--batch-tokens", "1024", "--precision", "fp32") == in_bf16
    assert kept("--batch-tokens", "1024", "--precision", "bf16") == in_bf16 / 2


def test_memory_that_is_not_there_is_warned_of(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plan = dry(home)
    assert plan["fits"]
    assert plan["device"] == "cpu"
    assert plan["host_memory"] > plan["memory_per_device"]["total"]
    assert 0 < plan["memory_available_per_device"] == plan["host_memory_available"]
    assert plan["seconds"] > 0
    short = plan | {"fits": False, "memory_available_per_device": 1000}
    assert "a worker needs" in planning._warnings(short)[-1]
    assert (
        "a node needs"
        in planning._warnings(plan | {"fits": False, "host_memory_available": 1000})[-1]
    )


def test_text_has_the_same_and_a_run_tells_it_at_its_start(home: Path) -> None:
    data = (
        "--data",
        home / "corpus.jsonl",
        "--seq-length",
        "64",
        "--batch-tokens",
        "512",
        "--steps",
        "2",
    )
    text = tiny.forked_dus("heal", home / "scaled", *data, "--dry-run").stdout
    for label in ("data", "held out", "measured", "memory", "time"):
        assert f"\n{label:<13}" in text
    assert "warning: " in text
    done = tiny.forked_dus(
        "heal", home / "scaled", *data, "-o", home / "out", "--progress", "json", "--json"
    )
    (plan,) = [
        json.loads(line) for line in done.stderr.splitlines() if json.loads(line)["event"] == "plan"
    ]
    report = done.report
    for name in (
        "data",
        "heldout_tokens",
        "heldout_documents",
        "available_heldout_tokens",
        "train_documents",
    ):
        assert plan[name] == report[name], name
    assert report["data"] == ["corpus.jsonl"]
    card = (home / "out/README.md").read_text(encoding="utf-8")
    assert (
        f"`corpus.jsonl`: {report['train_tokens']:,} tokens of {report['train_documents']:,} "
        "documents" in card
    )
    assert report["heldout_documents"] == 1
    assert f"over {report['heldout_tokens']:,} tokens of 1 document " in card


def test_a_run_begun_when_a_run_had_phases_goes_on_if_it_has_one(home: Path) -> None:
    out = home / "earlier"
    command = (
        "heal",
        home / "scaled",
        "-o",
        out,
        "--data",
        home / "corpus.jsonl",
        "--seq-length",
        "64",
    )
    arguments = (*command, "--batch-tokens", "512", "--train", "new", "--print-command", "-q")
    assert tiny.forked_dus(*arguments).returncode == 0
    path = out / "run.json"
    now = json.loads(path.read_text())
    then = json.loads(path.read_text())
    assert now["recipe"]["train_layers"] == [3, 4]
    then["recipe"]["phases"] = [{"start": 0, "layers": then["recipe"].pop("train_layers")}]
    then["options"]["recipe.phases"] = [
        {"train": then["options"].pop("recipe.train"), "length": None}
    ]
    path.write_text(json.dumps(then))
    assert tiny.forked_dus(*arguments).returncode == 0
    assert json.loads(path.read_text()) == now
    then["recipe"]["phases"].append({"start": 5, "layers": None})
    path.write_text(json.dumps(then))
    tiny.forked_dus(*arguments).assert_one_line_error("several training phases", "remove it")


def test_data_that_are_not_there_leave_nothing_behind(home: Path) -> None:
    for more in ((), ("--stream", "--tokens", "8k")):
        done = tiny.forked_dus(
            "heal", home / "scaled", "--data", "none.jsonl", *more, "-o", home / "nowhere", "-q"
        )
        done.assert_one_line_error("none.jsonl is not a file, a folder or a pattern")
        assert not (home / "nowhere").exists()
    (home / "empty").mkdir()
    done = tiny.forked_dus(
        "heal", home / "scaled", "--data", "none.jsonl", "-o", home / "empty", "-q"
    )
    assert done.returncode == 1
    assert (home / "empty").is_dir(), "dus did not make it"
