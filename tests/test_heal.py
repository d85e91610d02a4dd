"""`dus heal`: what comes out, what it proves, and that nothing depends on how many work at it."""

from __future__ import annotations

import itertools
import json
import shutil
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
from conftest import dus

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402

from dus_cli.evaluation.intervals import ratio  # noqa: E402
from dus_cli.models.compiled import has_compiler  # noqa: E402
from dus_cli.source.belonging import model_files, read_record  # noqa: E402

STEPS = 12
RECIPE = (
    "--steps 12 --seq-length 64 --batch-tokens 512 --lr 3e-3 --holdout 10% --eval-every 4 "
    "--eval-tokens 250K --seed 3"
).split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base that has learned its corpus a little, and two models scaled up from it."""
    torch.set_num_threads(1)  # tiny products on a shared machine: threads only wait for each other
    folder = tmp_path_factory.mktemp("heal")
    corpus = tiny.write_corpus(folder / "corpus.jsonl")
    base = tiny.train(tiny.write_base(folder / "base"), corpus)
    tiny.upscaled(base, folder / "scaled")
    untied = tiny.write_base(folder / "untied-base", shard="40KB", tie_word_embeddings=False)
    tiny.upscaled(
        tiny.train(untied, corpus, num_steps=30, shard="40KB"), folder / "untied", shard="60KB"
    )
    return folder


@pytest.fixture(scope="module")
def healed(home: Path) -> Path:
    """The scaled model, healed with the defaults by the command, which starts its worker."""
    before = tiny.digests(home / "scaled")
    run = tiny.forked_dus(
        "heal",
        home / "scaled",
        "--data",
        home / "corpus.jsonl",
        *RECIPE,
        "--json",
        OMP_NUM_THREADS="1",
    )
    (home / "report").write_text(json.dumps(run.report))
    assert tiny.digests(home / "scaled") == before, "the input was changed"
    return home / "scaled-healed"


def heal_in(
    home: Path,
    name: str,
    *arguments: str,
    model: str = "scaled",
    workers: int = 1,
    num_local: int | None = None,
) -> Path:
    """Heal in forked workers, into `name`; the output, once it is there."""
    out = home / name
    data = ("--data", home / "corpus.jsonl")
    failure = tiny.heal(
        home / model, out, *data, *RECIPE, *arguments, workers=workers, num_local=num_local
    )
    assert failure == ""
    assert (out / "config.json").is_file()
    return out


@pytest.fixture(scope="module")
def alone(home: Path) -> Path:
    """One worker, fp32: what others are held against."""
    return heal_in(home, "alone", "--precision", "fp32")


def assert_same_curve(one: Path, other: Path, within: float = 1e-4) -> None:
    """Losses and gradient norms of each step agree."""
    for a, b in zip(tiny.metrics(one), tiny.metrics(other), strict=True):
        names = {"loss", "eval_loss", "base_loss", "grad_norm", "lr", "kl"}
        assert a.keys() & names == b.keys() & names
        for name in a.keys() & names:
            assert a[name] == pytest.approx(b[name], rel=within, abs=within), (a["step"], name)


def assert_same_weights(one: Path, other: Path, within: float) -> None:
    """Final models agree closely: each weight is as near as this, or the next number of bf16, as
    which it is stored.
    """
    ours, theirs = tiny.weights(one), tiny.weights(other)
    assert ours.keys() == theirs.keys()
    for name, tensor in ours.items():
        twin = theirs[name]
        near = torch.isclose(tensor.float(), twin.float(), atol=within)
        if tensor.dtype == torch.bfloat16:
            near |= (tensor.view(torch.int16).int() - twin.view(torch.int16).int()).abs() <= 1
        assert near.all(), name


# --- what comes out ------------------------------------------------------------------------------


def test_held_out_loss_falls_and_the_report_says_from_where(home: Path, healed: Path) -> None:
    report = json.loads((healed / "report.json").read_text())
    places = {"model": str((home / "scaled").resolve()), "output": str(healed.resolve())}
    assert json.loads((home / "report").read_text()) == report | places
    assert report["base_loss"] < report["scaled_loss"]
    assert report["loss"] < report["scaled_loss"] - 0.2
    rows = tiny.metrics(healed)
    assert report["loss"] == rows[-1]["eval_loss"]
    assert report["scaled_loss"] == rows[0]["eval_loss"]
    assert report["base_loss"] == rows[0]["base_loss"]
    assert (report["steps"], report["tokens"], report["num_workers"]) == (STEPS, STEPS * 512, 1)
    assert report["skipped_steps"] == 0
    assert report["train_tokens"] > 10 * report["heldout_tokens"] / 2 > 0
    assert report["reached_base"] == (report["tokens_to_base"] is not None)


def test_metrics_have_a_row_for_each_step_with_every_figure(healed: Path) -> None:
    rows = tiny.metrics(healed)
    assert [row["step"] for row in rows] == list(range(STEPS + 1))
    assert [row["tokens"] for row in rows] == [512 * step for step in range(STEPS + 1)]
    assert [row["step"] for row in rows if "eval_loss" in row] == [0, 4, 8, 12]
    for row in rows[1:]:
        assert {
            "loss",
            "lr",
            "grad_norm",
            "tokens_per_second",
            "mfu",
            "peak_memory_bytes",
        } <= row.keys()
        assert set(row["seconds"]) == {"data", "forward", "backward", "optimizer", "eval"}
        assert row["mfu"] is None or 0 < row["mfu"] <= 1
        assert row["peak_memory_bytes"] > 10_000_000


def test_the_healed_model_loads_in_transformers_and_its_loss_is_the_reported_one(
    home: Path, healed: Path
) -> None:
    report = json.loads((healed / "report.json").read_text())
    assert reference_loss(healed, heldout(home, healed), torch.bfloat16) == pytest.approx(
        report["loss"], abs=0.01
    )


def test_a_healed_model_generates(healed: Path) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer, model = (
        AutoTokenizer.from_pretrained(healed),
        AutoModelForCausalLM.from_pretrained(healed),
    )
    ids = model.generate(
        **tokenizer("the seam", return_tensors="pt"), max_new_tokens=4, do_sample=False
    )
    assert tokenizer.decode(ids[0]).startswith("the seam")


@pytest.mark.parametrize(("source", "out"), [("scaled", "healed"), ("untied", "two")])
def test_names_shapes_dtypes_and_shards_are_the_sources(
    home: Path, source: str, out: str, request: pytest.FixtureRequest
) -> None:
    from dus_cli.source.checkpoint import open_checkpoint

    ours, theirs = (
        open_checkpoint(folder) for folder in (request.getfixturevalue(out), home / source)
    )
    assert [(s.name, s.header.tensors) for s in ours.shards] == [
        (s.name, s.header.tensors) for s in theirs.shards
    ]
    assert len(theirs.shards) == (1 if source == "scaled" else 6), "the fixture's shards"


@pytest.mark.parametrize(("source", "out"), [("scaled", "healed"), ("untied", "two")])
def test_dus_verify_finds_it_sound(
    home: Path, source: str, out: str, request: pytest.FixtureRequest
) -> None:
    run = tiny.forked_dus("verify", request.getfixturevalue(out), "--json")
    assert run.report["problems"] == []
    assert run.report["warnings"] == []


@pytest.mark.parametrize(("source", "out"), [("scaled", "healed"), ("untied", "two")])
def test_every_file_is_carried_changed_or_new_and_nothing_is_left_over(
    home: Path, source: str, out: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(out)
    before, after = tiny.digests(home / source), tiny.digests(folder)
    proof = {"run.json", "metrics.jsonl", "report.json", "healing-light.svg", "healing-dark.svg"}
    assert after.keys() - before.keys() == proof
    assert model_files(folder, read_record(folder)) & after.keys() == after.keys(), "what is pushed"
    assert before.keys() <= after.keys()
    changed = {name for name in before if before[name] != after[name]}
    assert changed == {
        "README.md",
        "dus.json",
        *(name for name in before if name.endswith(".safetensors")),
    }
    assert not [path.name for path in folder.parent.glob(".*")]


def test_the_proof_tells_nothing_of_the_makers_machine_but_what_things_are_called(
    home: Path, healed: Path
) -> None:
    said = {
        name: (healed / name).read_text(encoding="utf-8") for name in ("run.json", "report.json")
    }
    assert not [name for name, text in said.items() if str(home) in text]
    run, report = json.loads(said["run.json"]), json.loads(said["report.json"])
    assert run["model"] == report["model"] == "scaled"
    assert run["output"] == report["output"] == healed.name
    assert run["options"]["data.files"] == ["corpus.jsonl"]
    assert [source["name"] for source in run["data"]["sources"]] == ["corpus.jsonl"]


def test_dus_json_keeps_the_scaling_and_appends_the_healing(home: Path, healed: Path) -> None:
    before, after = (
        json.loads((folder / "dus.json").read_text()) for folder in (home / "scaled", healed)
    )
    report = json.loads((healed / "report.json").read_text())
    (healing,) = after.pop("healing")
    assert after.pop("files") == sorted({path.name for path in healed.iterdir()} - {"dus.json"})
    assert set(before.pop("files")) < {path.name for path in healed.iterdir()}
    assert after == before
    assert {
        key: healing[key] for key in ("base_loss", "scaled_loss", "loss", "steps", "tokens")
    } == {key: report[key] for key in ("base_loss", "scaled_loss", "loss", "steps", "tokens")}
    assert healing["recipe"]["lr"] == 3e-3


def test_the_card_tells_of_the_healing_and_shows_the_curve(home: Path, healed: Path) -> None:
    report, card = (
        json.loads((healed / "report.json").read_text()),
        (healed / "README.md").read_text(),
    )
    assert "This model is not healed.**" in (home / "scaled/README.md").read_text()
    assert "This model is not healed.**" not in card
    for name in ("base_loss", "scaled_loss", "loss"):
        assert f"{report[name]:.4f}" in card
    for name in ("healing-light.svg", "healing-dark.svg"):
        assert name in card
        assert "<svg" in (healed / name).read_text()


# --- the base's loss for free --------------------------------------------------------------------


def heldout(home: Path, out: Path, *, document_mask: bool = True) -> list[Any]:
    """The held-out rows of a run, tokenised anew by the launcher's own functions: those of the
    run are gone.
    """
    from dus_cli.data.streams import Prepared, heldout_rows
    from dus_cli.heal.run import read_run

    run = read_run(out / "run.json")
    again = home / f"{out.name}-again"
    if not again.exists():
        mask = () if document_mask else ("--no-document-mask",)
        data = ("--data", home / "corpus.jsonl")
        done = tiny.forked_dus(
            "heal", home / run.model, "-o", again, *data, *RECIPE, *mask, "--print-command", "-q"
        )
        assert done.returncode == 0, done.stderr
    return list(
        heldout_rows(
            Prepared.from_json(run.data),
            again / "tokens",
            run.seq_length,
            document_mask=document_mask,
            max_tokens=run.keeping.eval_tokens,
        )
    )


def reference_sums(
    model: Path, rows: list[Any], dtype: Any = None
) -> tuple[list[float], list[float]]:
    """By document the sums of cross-entropy and of labelled tokens, from full logits, each document
    run by itself: no mask, no packing, nothing of ours.
    """
    from transformers import AutoModelForCausalLM

    network = AutoModelForCausalLM.from_pretrained(model, dtype=dtype or torch.float32).eval()
    nats, counts, document = [0.0], [0.0], 0
    with torch.no_grad():
        for row in rows:
            starts = [i for i, position in enumerate(row.position_ids) if position == 0]
            for start, stop in zip(starts, [*starts[1:], len(row.input_ids)], strict=True):
                ids, labels = (
                    torch.from_numpy(array[start:stop]) for array in (row.input_ids, row.labels)
                )
                logits = network(input_ids=ids[None]).logits[0].float()
                nats[document] += float(
                    torch.nn.functional.cross_entropy(
                        logits, labels, ignore_index=-100, reduction="sum"
                    )
                )
                counts[document] += int((labels != -100).sum())
                if ids[-1] == tiny.EOS:  # else the next row goes on with it
                    nats, counts, document = [*nats, 0.0], [*counts, 0.0], document + 1
    return nats, counts


def reference_loss(model: Path, rows: list[Any], dtype: Any = None) -> float:
    """The mean cross-entropy of `reference_sums`."""
    nats, counts = reference_sums(model, rows, dtype)
    return sum(nats) / sum(counts)


@pytest.mark.parametrize(
    ("base", "scaled", "out"), [("base", "scaled", "alone"), ("untied-base", "untied", "two")]
)
def test_base_and_scaled_loss_are_those_of_the_two_models_in_transformers(
    home: Path, base: str, scaled: str, out: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(out)
    report, rows = json.loads((folder / "report.json").read_text()), heldout(home, folder)
    assert report["base_loss"] == pytest.approx(reference_loss(home / base, rows), rel=1e-5)
    assert report["scaled_loss"] == pytest.approx(reference_loss(home / scaled, rows), rel=1e-5)
    theirs, counts = reference_sums(home / base, rows)
    ours, _ = reference_sums(home / scaled, rows)
    differences = [a - b for a, b, count in zip(ours, theirs, counts, strict=True) if count]
    expected = ratio(differences, [count for count in counts if count]).interval
    assert len(differences) > 10
    assert tiny.metrics(folder)[0]["difference_interval"] == pytest.approx(expected, rel=1e-3)


# --- how many work at it changes nothing ---------------------------------------------------------


@pytest.fixture(scope="module")
def two(home: Path) -> Path:
    """Two workers under the real command and torchrun, from a model in six shards with untied
    embeddings.
    """
    out = home / "two"
    arguments = [*RECIPE, "--precision", "fp32", "--nproc-per-node", "2", "-q"]
    run = dus(
        "heal",
        home / "untied",
        "-o",
        out,
        "--data",
        home / "corpus.jsonl",
        *arguments,
        OMP_NUM_THREADS="1",
    )
    assert (run.returncode, run.stdout, run.stderr) == (0, "", "")
    return out


def test_two_workers_learn_what_one_learns_from_shards_with_untied_embeddings(
    home: Path, two: Path
) -> None:
    one = heal_in(home, "untied-one", "--precision", "fp32", model="untied")
    assert_same_curve(one, two)
    assert_same_weights(one, two, within=2e-3)


@pytest.mark.parametrize("workers", [3, 4])
def test_workers_learn_together_what_one_learns_alone(
    home: Path, alone: Path, workers: int
) -> None:
    """Eight rows a step: three workers have three, three and two."""
    out = heal_in(home, f"workers-{workers}", "--precision", "fp32", workers=workers)
    assert_same_curve(alone, out)
    assert_same_weights(alone, out, within=2e-3)
    shutil.rmtree(out)


@pytest.mark.parametrize(("sharding", "num_local"), [("none", 2), ("hsdp", 2)])
def test_sharding_changes_nothing(home: Path, alone: Path, sharding: str, num_local: int) -> None:
    name = f"{sharding}-{num_local}"
    workers = 2 if sharding == "none" else 4
    out = heal_in(
        home,
        name,
        "--precision",
        "fp32",
        "--sharding",
        sharding,
        workers=workers,
        num_local=num_local,
    )
    assert_same_curve(alone, out)
    assert_same_weights(alone, out, within=2e-3)
    shutil.rmtree(out)


@pytest.mark.parametrize("model", ["scaled", "untied"])
def test_before_step_1_a_sharded_models_logits_are_those_of_transformers(
    home: Path, model: str
) -> None:
    from transformers import AutoModelForCausalLM

    out = home / f"logits-{model}"
    data = ("--data", home / "corpus.jsonl")
    done = tiny.forked_dus(
        "heal", home / model, "-o", out, *data, *RECIPE, "--precision", "fp32", "--print-command"
    )
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        network = AutoModelForCausalLM.from_pretrained(home / model, dtype=torch.float32)
        expected = network(input_ids=torch.arange(48).reshape(2, 24)).logits
    for found in (*tiny.logits(out, 2), *tiny.logits(out, 1)):
        assert torch.allclose(found, expected, atol=1e-5)


# --- what learns, and how ------------------------------------------------------------------------


def changed_layers(home: Path, out: Path, model: str = "scaled") -> set[str]:
    """Layers of which a tensor changed; "rest" is what stands in none."""
    before, after = tiny.weights(home / model), tiny.weights(out)
    changed = [name.split(".") for name in before if not torch.equal(before[name], after[name])]
    return {parts[2] if parts[1] == "layers" else "rest" for parts in changed}


def test_only_the_new_layers_change(home: Path) -> None:
    """Base layers 0 1 2 1 2 3: the base is output layers 0 1 2 5."""
    out = heal_in(home, "train-new", "--train", "new", "--steps", "4", workers=2)
    assert changed_layers(home, out) == {"3", "4"}
    rows = tiny.metrics(out)
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]


def test_a_rate_of_0_freezes_and_what_is_left_learns_as_it_does_alone(home: Path) -> None:
    steps = ("--steps", "4", "--precision", "fp32")
    by_rate = heal_in(home, "by-rate", "--lr-scale", "base=0,embeddings=0", *steps)
    by_name = heal_in(home, "by-name", "--train", "new", *steps)
    assert tiny.curve(by_rate) == tiny.curve(by_name)
    assert changed_layers(home, by_rate) == {"3", "4"}
    options = json.loads((by_rate / "run.json").read_text())["options"]
    assert options["recipe.lr_scale"]["base"] == 0


def test_norms_have_a_rate_of_their_own_wherever_they_stand(home: Path) -> None:
    """Two workers: FSDP has what learns and what does not in one layer."""
    scales = ("--lr-scale", "new=0,base=0,embeddings=0,norms=1", "--lr", "3e-2")
    out = heal_in(home, "norms", *scales, "--steps", "2", workers=2)
    before, after = tiny.weights(home / "scaled"), tiny.weights(out)
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed == {name for name in before if "norm" in name}


@pytest.mark.parametrize(
    ("scales", "more", "said"),
    [
        ("old=1", (), "'old=1' is not GROUP=FACTOR; write new=1,base=0.1"),
        ("new=-1", (), "'new=-1': the factor is not a number from 0 to 1,000"),
        ("new=nan", (), "'new=nan': the factor is not a number"),
        ("new=1,new=2", (), "names new twice"),
        ("new=0,base=0,embeddings=0", (), "--lr-scale freezes everything"),
        ("base=0.5", ("--train", "new"), "leave base and embeddings out of --lr-scale"),
    ],
)
def test_rates_that_make_no_sense_are_refused_in_one_line(
    home: Path, scales: str, more: tuple[str, ...], said: str
) -> None:
    data = ("--data", home / "corpus.jsonl", "--dry-run", "-q")
    refused = tiny.forked_dus("heal", home / "scaled", *data, "--lr-scale", scales, *more)
    refused.assert_one_line_error(said, code=1 if more else 2)


def test_new_and_base_need_a_dus_json(home: Path) -> None:
    data = ("--data", home / "corpus.jsonl", "--dry-run", "-q", "--seq-length", "64")
    refused = tiny.forked_dus("heal", home / "base", *data, "--lr-scale", "base=0.5")
    refused.assert_one_line_error("cannot distinguish new and base")
    taken = tiny.forked_dus("heal", home / "base", *data, "--lr-scale", "embeddings=0")
    assert taken.returncode == 0, taken.stderr


def test_what_is_frozen_takes_no_room_in_plan_and_checkpoint(home: Path) -> None:
    length = ("--seq-length", "64", "--steps", "9")
    whole, part = dry(home, *length), dry(home, *length, "--lr-scale", "base=0,embeddings=0")
    for name in ("gradients", "optimizer"):
        assert part["memory_per_device"][name] < whole["memory_per_device"][name] / 2
    assert part["memory_per_device"]["weights"] == whole["memory_per_device"]["weights"]
    assert part["disk"]["checkpoint"] < whole["disk"]["checkpoint"] / 2


def test_an_identity_starts_at_its_bases_loss_and_its_new_layers_alone_are_trained(
    home: Path,
) -> None:
    """LLaMA Pro's recipe; and once more, for dus.json still tells the new layers of a model that
    was healed.
    """
    done = tiny.forked_dus(
        "upscale", home / "base", "--recipe", "llama-pro", "-o", home / "pro", "-q"
    )
    assert done.returncode == 0, done.stderr
    out = heal_in(home, "pro-healed", "--train", "new", model="pro")
    rows = tiny.metrics(out)
    assert rows[0]["eval_loss"] == rows[0]["base_loss"]
    assert rows[-1]["eval_loss"] < rows[0]["eval_loss"]
    assert changed_layers(home, out, "pro") == {"4"}
    assert "are not trained" not in (out / "README.md").read_text()
    again = heal_in(home, "pro-again", "--train", "new", "--steps", "2", model="pro-healed")
    assert changed_layers(home, again, "pro-healed") == {"4"}


def test_where_a_start_scaled_the_base_its_loss_is_measured_from_the_base(home: Path) -> None:
    """The base does not stand in the model: it is found by dus.json, and without it nothing is
    said of its loss.
    """
    run = tiny.forked_dus(
        "upscale", home / "base", "-t", "1", "--start", "half", "-o", home / "halves", "-q"
    )
    assert run.returncode == 0, run.stderr
    options = ("--steps", "1", "--train", "new", "--distill", "0.5")
    found, copies = (
        heal_in(home, f"from-{model}", *options, model=model) for model in ("halves", "scaled")
    )
    ours, theirs = (tiny.metrics(out)[0] for out in (found, copies))
    assert ours["base_loss"] == pytest.approx(theirs["base_loss"], abs=1e-5)
    assert ours["eval_loss"] != pytest.approx(theirs["eval_loss"], abs=1e-3)
    record = json.loads((home / "halves/dus.json").read_text())
    record["base"]["config_sha256"] = "0" * 64  # another model is there now
    (home / "halves/dus.json").write_text(json.dumps(record))
    plan = tiny.forked_dus(
        "heal",
        home / "halves",
        "--data",
        home / "corpus.jsonl",
        "-o",
        home / "x",
        "--dry-run",
        "--json",
    )
    assert plan.report["base_folder"] is plan.report["base_layers"] is None
    assert any("its loss is unknown" in warning for warning in plan.report["warnings"])
    done = tiny.forked_dus(
        "heal",
        home / "halves",
        "--data",
        home / "corpus.jsonl",
        "-o",
        home / "x",
        "--until",
        "base",
    )
    done.assert_one_line_error("--until base needs the base", "scaled the base's own layers")


def test_the_new_layers_are_those_that_dus_json_names(home: Path, tmp_path: Path) -> None:
    from dus_cli.errors import CheckpointError
    from dus_cli.heal.launch.resolve import open_model

    folder = shutil.copytree(home / "scaled", tmp_path / "model")
    record = json.loads((folder / "dus.json").read_text())
    assert open_model(folder).new_layers == tuple(record["new_layers"]) == (3, 4)
    (folder / "dus.json").write_text(json.dumps(record | {"new_layers": [4]}))
    assert open_model(folder).new_layers == (4,)
    del record["new_layers"]  # as an older dus wrote it
    (folder / "dus.json").write_text(json.dumps(record))
    assert open_model(folder).new_layers == (3, 4)
    (folder / "dus.json").write_text(json.dumps(record | {"new_layers": [6]}))
    with pytest.raises(CheckpointError, match="new_layers is not a list of output layers"):
        open_model(folder)


def test_all_layers_and_the_embeddings_change_by_default(home: Path, healed: Path) -> None:
    assert changed_layers(home, healed) == {"rest", *"012345"}


def first_rows(home: Path, out: Path, num_rows: int) -> list[Any]:
    """The rows of a run's first step."""
    from dus_cli.data.streams import Prepared, Rows
    from dus_cli.heal.run import read_run

    heldout(home, out)
    run = read_run(out / "run.json")
    folder = home / f"{out.name}-again/tokens"
    rows = Rows(Prepared.from_json(run.data), folder, run.seq_length, seed=run.recipe.seed)
    return [rows.row(i) for i in range(num_rows)]


def logits_of(network: Any, row: Any) -> Any:
    """Full logits of a row, (length, vocabulary), each document run by itself."""
    starts = [i for i, position in enumerate(row.position_ids) if position == 0]
    ids = torch.from_numpy(row.input_ids)
    with torch.no_grad():
        parts = [network(input_ids=part[None]).logits[0] for part in ids.tensor_split(starts[1:])]
    return torch.cat(parts).float()


def test_distillation_measures_the_kl_from_the_base_and_fades_away(home: Path, alone: Path) -> None:
    from transformers import AutoModelForCausalLM

    out = heal_in(home, "distilled", "--precision", "fp32", "--distill", "0.8:50%", workers=2)
    rows = tiny.metrics(out)
    assert ["kl" in row for row in rows] == [False] + [True] * 6 + [False] * 6
    teacher, student = (
        AutoModelForCausalLM.from_pretrained(home / name, dtype=torch.float32).eval()
        for name in ("base", "scaled")
    )
    divergence, cross_entropy, count = 0.0, 0.0, 0
    for row in first_rows(home, out, 8):
        labels = torch.from_numpy(row.labels)
        counted = labels != -100
        theirs, ours = (
            torch.log_softmax(logits_of(network, row), -1) for network in (teacher, student)
        )
        divergence += float((theirs.exp() * (theirs - ours)).sum(-1)[counted].sum())
        cross_entropy -= float(ours[counted].gather(1, labels[counted][:, None]).sum())
        count += int(counted.sum())
    assert rows[1]["kl"] == pytest.approx(divergence / count, rel=1e-4)
    assert rows[1]["loss"] == pytest.approx(cross_entropy / count, rel=1e-5)
    assert rows[1]["loss"] == pytest.approx(tiny.metrics(alone)[1]["loss"], rel=1e-5)
    assert rows[2]["loss"] != tiny.metrics(alone)[2]["loss"]


def test_until_base_ends_after_two_measurements_and_says_how_sure_it_is(home: Path) -> None:
    from dus_cli.heal.launch.report import heal_text
    from dus_cli.heal.proof.card import healed_card

    out = heal_in(
        home,
        "until",
        "--until",
        "base",
        "--steps",
        "400",
        "--eval-every",
        "2",
        "--schedule",
        "constant",
    )
    report = json.loads((out / "report.json").read_text())
    losses = [row["eval_loss"] for row in tiny.metrics(out) if "eval_loss" in row]
    at_base = [loss <= report["base_loss"] for loss in losses]
    twice = [index for index, pair in enumerate(itertools.pairwise(at_base)) if all(pair)]
    assert twice == [len(at_base) - 2]
    assert report["steps"] < 400
    assert report["reached_base"]
    assert report["status"] == "healed"
    assert report["tokens_to_base"] == 2 * at_base.index(True) * 512
    assert report["fraction_of_pretraining"] > 0
    card = (out / "README.md").read_text()
    assert "This model is healed" in card
    low, high = report["difference_interval"]
    assert low < report["loss"] - report["base_loss"] < high
    assert f"{(low + high) / 2:+.4f} ± {(high - low) / 2:.4f} to the base, 95% interval" in card
    assert ("may be chance" in card) == (high > 0)
    for interval, why in (
        ([-0.03, -0.01], ""),
        (
            [-0.03, 0.01],
            "not with 95% confidence: the difference is -0.0100 ± 0.0200 over 17 held-out",
        ),
        (None, "a single held-out document has no interval"),
    ):
        other = report | {"difference_interval": interval}
        summary, card = heal_text(other, out), healed_card("", other, "out")
        assert ("warning: the base's loss is reached, but" in summary) == bool(why)
        assert ("That may be chance: the base's loss is reached, but" in card) == bool(why)
        assert why in summary
        assert why in card


def test_a_model_without_dus_json_is_trained_and_has_no_base(home: Path) -> None:
    out = heal_in(home, "plain", "--steps", "4", model="base")
    report = json.loads((out / "report.json").read_text())
    assert (report["base_loss"], report["reached_base"], report["status"]) == (
        None,
        None,
        "trained",
    )
    assert report["loss"] < report["scaled_loss"]
    assert tiny.forked_dus("verify", out, "--json").report["problems"] == []
    data = ("--data", home / "corpus.jsonl", "-q")
    for option in (("--distill", "0.5"), ("--until", "base"), ("--train", "new")):
        tiny.forked_dus(
            "heal", home / "base", "-o", home / "no", *data, *option
        ).assert_one_line_error("dus.json")
    assert not (home / "no").exists()


def test_a_healed_model_can_be_healed_again_with_no_base_in_it(home: Path, healed: Path) -> None:
    out = heal_in(home, "again", "--steps", "2", model=healed.name)
    assert len(json.loads((out / "dus.json").read_text())["healing"]) == 2
    assert (out / "README.md").read_text().count("<!-- dus heal -->") == 1
    assert tiny.forked_dus("verify", out, "--json").report["problems"] == []


# --- how it fits changes nothing -----------------------------------------------------------------

FITS = {
    "rows by themselves": ("--micro-batch", "1"),
    "three rows at once": ("--micro-batch", "3"),
    "full checkpointing": ("--activation-checkpointing", "full"),
    "selective checkpointing": ("--activation-checkpointing", "selective"),
}


@pytest.mark.parametrize("options", FITS.values(), ids=FITS.keys())
def test_how_it_fits_changes_nothing(
    home: Path, alone: Path, tmp_path: Path, options: tuple[str, ...]
) -> None:
    out = heal_in(home, f"fit{'-'.join(options)}", "--precision", "fp32", *options)
    assert_same_curve(alone, out, within=1e-5)


needs_compiler = pytest.mark.skipif(
    not has_compiler(), reason="torch.compile needs a C++ compiler on a CPU"
)


@needs_compiler
def test_compiled_layers_learn_the_same(home: Path) -> None:
    # rows of one shape, so that two workers find the kernels that one has compiled
    short = ("--precision", "fp32", "--steps", "2", "--eval-every", "1", "--micro-batch", "4")
    plain = heal_in(home, "not-compiled", *short, "--no-compile")
    compiled = heal_in(home, "compiled", *short, "--compile")
    assert_same_curve(plain, compiled)
    assert_same_curve(compiled, heal_in(home, "compiled-by-two", *short, "--compile", workers=2))
    # what is measured before training does not depend on a compiler
    assert tiny.metrics(plain)[0]["eval_loss"] == tiny.metrics(compiled)[0]["eval_loss"]


def _planned_compile(home: Path, name: str, *options: str, **environment: str) -> bool | None:
    """What run.json says of compiling."""
    data = ("--data", home / "corpus.jsonl", "--print-command", "-q")
    done = tiny.forked_dus(
        "heal", home / "scaled", "-o", home / name, *data, *RECIPE, *options, **environment
    )
    assert done.returncode == 0, done.stderr
    compiles: bool | None = json.loads((home / name / "run.json").read_text())["fit"]["compile"]
    return compiles


@needs_compiler
@pytest.mark.skipif(torch.accelerator.is_available(), reason="compiled by default on a CPU only")
def test_long_runs_are_compiled_where_a_compiler_is_there(home: Path, tmp_path: Path) -> None:
    long = ("--steps", "10000000")
    assert _planned_compile(home, "planned-short") is False
    assert _planned_compile(home, "planned-long", *long) is None
    assert _planned_compile(home, "planned-no", *long, "--no-compile") is False
    assert _planned_compile(home, "planned-yes", "--compile") is True
    assert _planned_compile(home, "planned-bare", *long, CXX=str(tmp_path / "none")) is False
    # a run that goes on keeps what it began with
    assert _planned_compile(home, "planned-long", *long, CXX=str(tmp_path / "none")) is None


@pytest.mark.parametrize("compiles", [True, None], ids=["asked for", "tried"])
def test_a_compiler_that_fails_ends_a_run_only_if_it_was_asked_for(
    home: Path, tmp_path: Path, compiles: bool | None
) -> None:
    out = home / f"compiler-fails-{compiles}"
    _planned_compile(home, out.name, "--steps", "2", "--precision", "fp32")
    run = json.loads((out / "run.json").read_text())
    run["fit"]["compile"] = compiles
    (out / "run.json").write_text(json.dumps(run))
    # what CXX=false would set, which is read when the module is imported
    false = "import torch._inductor.config as config\nconfig.cpp.cxx = ('false',)\n"
    empty = {"TORCHINDUCTOR_CACHE_DIR": str(tmp_path)}
    ((worker, log),) = tiny.start_workers(out, extra=empty, first=false)
    code, stderr = tiny.wait(worker), Path(f"{log}.err").read_text(encoding="utf-8")
    if compiles:
        assert code == 1
        failure = json.loads((out / "failure.json").read_text())["error"]
        assert failure.startswith("torch.compile failed: ")
        assert failure.endswith("; leave --compile out")
    else:
        assert code == 0, stderr
        assert "not compiled: torch.compile failed: " in stderr
        assert (out / "config.json").is_file()


@pytest.mark.parametrize(
    "options", [(), ("--master-weights", "bf16")], ids=["masters", "no masters"]
)
def test_bf16_learns_nearly_the_same_with_one_worker_and_with_two(
    home: Path, alone: Path, options: tuple[str, ...]
) -> None:
    for workers in (1, 2):
        out = heal_in(home, f"bf16-{len(options)}-{workers}", *options, workers=workers)
        for a, b in zip(tiny.metrics(alone), tiny.metrics(out), strict=True):
            for name in a.keys() & {"loss", "eval_loss"}:
                assert a[name] == pytest.approx(b[name], abs=0.06), (workers, a["step"], name)


def test_without_the_document_mask_attention_crosses_documents(home: Path, alone: Path) -> None:
    out = heal_in(home, "unmasked", "--precision", "fp32", "--no-document-mask", "--steps", "2")
    report, rows = (
        json.loads((out / "report.json").read_text()),
        heldout(home, out, document_mask=False),
    )
    assert all((row.position_ids == range(64)).all() for row in rows)
    assert report["base_loss"] == pytest.approx(reference_loss(home / "base", rows), rel=1e-5)
    assert (
        abs(report["base_loss"] - json.loads((alone / "report.json").read_text())["base_loss"])
        > 1e-3
    )


def test_a_loss_that_cannot_be_helped_skips_steps_and_ends_the_run_with_the_batch_named(
    home: Path,
) -> None:
    out, data = home / "spoiled", ("--data", home / "corpus.jsonl")
    options = ("--max-skipped", "3", "--save-every", "1", "--warmup", "0", "--schedule", "constant")
    done = tiny.forked_dus(
        "heal", home / "scaled", "-o", out, *data, *RECIPE, *options, "--print-command", "-q"
    )
    assert done.returncode == 0, done.stderr
    run = json.loads((out / "run.json").read_text())
    run["recipe"]["lr"] = 1e30  # which no command line takes
    (out / "run.json").write_text(json.dumps(run))
    failure = tiny.ended(out, tiny.start_workers(out))
    assert "3 steps in a row" in failure
    assert "step 4 (rows 24 to 31" in failure
    assert "last good checkpoint is kept" in failure
    rows = tiny.metrics(out)
    assert [row.get("skipped") for row in rows] == [None, False, True, True, True]
    assert [path.name for path in (out / "checkpoints").iterdir()] == ["step-00000001"]
    assert not (out / "config.json").exists()


# --- architectures -------------------------------------------------------------------------------

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "qwen3": {"head_dim": 8},
    "mistral": {"sliding_window": 16},
    "gemma2": {"head_dim": 8, "sliding_window": 16, "query_pre_attn_scalar": 8},
    "granite": {"logits_scaling": 4.0, "residual_multiplier": 0.5, "embedding_multiplier": 2.0},
    "cohere": {"logit_scale": 0.25},
    "gpt2": {},
    "gpt_bigcode": {},
    "gpt_neox": {"tie_word_embeddings": False},
    "phi": {"tie_word_embeddings": False},
}

# Why each is refused: its experts are stored one by one and computed as one tensor; it has no
# document mask.
REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "mixtral": ({"num_local_experts": 4}, "does not heal this architecture yet"),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 32}, "give --no-document-mask"),
    "bloom": ({}, "give --no-document-mask"),
}


def scaled_up(home: Path, model_type: str, fields: dict[str, Any]) -> None:
    tiny.write_base(home / f"{model_type}-base", model_type=model_type, **fields)
    done = tiny.forked_dus(
        "upscale", home / f"{model_type}-base", "-o", home / model_type, "--trim", "1", "-q"
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_an_architecture_is_measured_as_in_transformers_and_learns_with_two_workers_as_with_one(
    home: Path, model_type: str
) -> None:
    """Few steps: small gradients are all rounding, and Adam makes as much of them as of large
    ones.
    """
    scaled_up(home, model_type, ARCHITECTURES[model_type])
    options = ("--precision", "fp32", "--steps", "2", "--eval-every", "2")
    one = heal_in(home, f"{model_type}-1", *options, model=model_type)
    two = heal_in(home, f"{model_type}-2", *options, model=model_type, workers=2)
    report, rows = json.loads((one / "report.json").read_text()), heldout(home, one)
    assert report["base_loss"] == pytest.approx(
        reference_loss(home / f"{model_type}-base", rows), rel=1e-5
    )
    assert report["scaled_loss"] == pytest.approx(reference_loss(home / model_type, rows), rel=1e-5)
    assert report["loss"] == pytest.approx(reference_loss(one, rows), abs=0.03), (
        "of weights that were rounded to bf16"
    )
    assert report["loss"] < report["scaled_loss"] - 0.1
    assert_same_curve(one, two, within=1e-3)
    assert tiny.forked_dus("verify", one, "--json").report["problems"] == []


@pytest.mark.parametrize("model_type", REFUSED)
def test_an_architecture_that_would_be_healed_wrongly_is_refused_before_the_first_step(
    home: Path, model_type: str
) -> None:
    fields, reason = REFUSED[model_type]
    scaled_up(home, model_type, fields)
    out = home / f"{model_type}-out"
    failure = tiny.heal(home / model_type, out, "--data", home / "corpus.jsonl", *RECIPE)
    assert reason in failure
    assert "\n" not in failure
    assert not (out / "metrics.jsonl").exists()


# --- refused before a worker starts --------------------------------------------------------------


def refuse(
    home: Path, *arguments: str | Path, code: int = 1, parts: tuple[str, ...], **environment: str
) -> None:
    """One line; and no output was begun, or no more than its token files."""
    out = home / "refused"
    done = tiny.forked_dus("heal", *arguments, "-o", out, "-q", **environment)
    done.assert_one_line_error(*parts, code=code)
    left = sorted(path.name for path in out.iterdir()) if out.exists() else []
    assert set(left) <= {"tokens", "run.json"}
    shutil.rmtree(out, ignore_errors=True)


def test_what_cannot_be_healed_is_one_line(home: Path, tmp_path: Path) -> None:
    data = ("--data", home / "corpus.jsonl")
    scaled = home / "scaled"
    refuse(home, home / "nowhere", *data, parts=("nowhere is not a directory",))
    refuse(home, home, *data, parts=("no config.json",))
    refuse(home, scaled, "--data", home / "no.jsonl", parts=("no.jsonl",))
    refuse(
        home,
        scaled,
        *data,
        "--seq-length",
        "4096",
        parts=("--seq-length 4096", "context length, 128"),
    )
    refuse(
        home,
        scaled,
        *data,
        "--batch-tokens",
        "64",
        parts=("--batch-tokens 64", "row of 128 tokens"),
    )
    refuse(
        home,
        scaled,
        *data,
        "--batch-tokens",
        "1M",
        parts=("give more text", "smaller --batch-tokens"),
    )
    refuse(home, scaled, *data, "--steps", "2", "--epochs", "1", parts=("--steps and --epochs",))
    refuse(home, scaled, *data, "--nnodes", "2", parts=("--rdzv-endpoint",))
    refuse(home, scaled, *data, "--node-rank", "1", parts=("--node-rank 1 of 1",))
    refuse(home, scaled, *data, "--offload", parts=("--offload",))
    if find_spec("wandb") is None:
        lacking = ("--track wandb needs wandb; pip install wandb",)
        refuse(home, scaled, *data, "--track", "wandb", parts=lacking)
    group = ("--track", "tensorboard", "--track-group", "trims")
    refuse(home, scaled, *data, *group, parts=("--track-group is for wandb and trackio",))
    for text, part in (
        ("", "no documents"),
        ('{"text": "a"}\n{"text": \n', "2"),
        ('{"txt": "a"}\n', "text"),
    ):
        corpus = tmp_path / "bad.jsonl"
        corpus.write_text(text)
        refuse(
            home, scaled, "--data", corpus, parts=("bad.jsonl", part) if text else ("bad.jsonl",)
        )


def test_a_tokenizer_that_does_not_match_the_model_is_one_line(home: Path, tmp_path: Path) -> None:
    small = tiny.write_base(
        tmp_path / "small", vocab_size=200, eos_token_id=None, bos_token_id=None
    )
    refuse(
        home, small, "--data", home / "corpus.jsonl", parts=("gives id 256", "vocabulary has 200")
    )


def test_an_output_that_is_not_ours_or_not_apart_is_one_line(home: Path, tmp_path: Path) -> None:
    data = ("--data", home / "corpus.jsonl", "-q")
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken/thesis.tex").write_text("mine")
    (tmp_path / "file").write_text("mine")
    cases = {
        tmp_path / "taken": "thesis.tex",
        tmp_path / "file": "not a directory",
        tmp_path / "no/parent": "create it first",
        home / "scaled/out": "contain each other",
        home / "scaled": "contain each other",
    }
    before = tiny.digests(home / "scaled")
    for out, part in cases.items():
        tiny.forked_dus("heal", home / "scaled", *data, "-o", out).assert_one_line_error(part)
    assert tiny.digests(home / "scaled") == before
    assert (tmp_path / "taken/thesis.tex").read_text() == "mine"


def test_usage_errors_exit_with_2(home: Path) -> None:
    data = ("--data", home / "corpus.jsonl")
    refuse(home, home / "scaled", code=2, parts=("data",))
    for option, value in (
        ("--steps", "0"),
        ("--tokens", "many"),
        ("--train", "some"),
        ("--train", "seam:1"),  # these three were once there
        ("--phase", "all"),
        ("--schedule", "cosine"),
        ("--distill", "2"),
        ("--betas", "1"),
        ("--save-every", "soon"),
        ("--holdout", "200%"),
        ("--precision", "int8"),
        ("--nproc-per-node", "0"),
        ("--nonsense", "1"),
    ):
        refuse(home, home / "scaled", *data, option, value, code=2, parts=(option,))


def test_without_torch_it_says_what_to_install(home: Path, tmp_path: Path) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "import importlib.util, sys\nfind = importlib.util.find_spec\nsys.modules['torch'] = None\n"
        "importlib.util.find_spec = lambda name, *_: None if name == 'torch' else find(name, *_)\n"
    )
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    arguments = ("--data", home / "corpus.jsonl", "-o", home / "refused", "-q")
    run = dus("heal", home / "scaled", *arguments, PYTHONPATH=path)
    run.assert_one_line_error("needs torch", "pip install 'dus-cli[heal]'")


# --- the dry run, and trackers -------------------------------------------------------------------


def dry(home: Path, *arguments: str) -> dict[str, Any]:
    out = home / "dry"
    done = tiny.forked_dus(
        "heal",
        home / "scaled",
        "-o",
        out,
        "--data",
        home / "corpus.jsonl",
        *arguments,
        "--dry-run",
        "--json",
    )
    assert not out.exists()
    return done.report


def test_a_dry_run_counts_tokens_and_steps_and_writes_nothing(home: Path, tmp_path: Path) -> None:
    length = ("--seq-length", "64", "--batch-tokens", "512")
    whole = dry(home, *length)
    assert whole["steps"] == (whole["train_tokens"] - 1) // 64 * 64 // 512
    assert dry(home, *length, "--epochs", "2.5")["steps"] == int(
        2.5 * ((whole["train_tokens"] - 1) // 64) / 8
    )
    assert dry(home, *length, "--tokens", "1025")["steps"] == 3
    assert dry(home, *length, "--steps", "7")["tokens"] == 7 * 512
    assert dry(home, *length)["base_layers"] == [0, 1, 2, 5]
    held = dry(home, *length, "--holdout", "20%")
    assert held["available_heldout_tokens"] > 3 * whole["available_heldout_tokens"]
    other = tiny.write_corpus(tmp_path / "other.jsonl", 20, seed=9)
    own = dry(home, *length, "--eval-data", str(other), "--holdout", "0")
    assert own["available_heldout_documents"] == 20
    assert own["train_documents"] == 200


# --- several held-out sets ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def sets(home: Path) -> tuple[str, ...]:
    """Two held-out sets by name, as options."""
    docs = tiny.write_corpus(home / "docs.jsonl", 30, seed=8)
    code = tiny.write_corpus(home / "code.jsonl", 20, seed=9)
    return ("--eval-data", f"docs={docs}", "--eval-data", f"code={code}")


@pytest.fixture(scope="module")
def with_sets(home: Path, sets: tuple[str, ...]) -> Path:
    return heal_in(home, "with-sets", *sets, "--steps", "4")


def test_each_held_out_set_has_the_losses_that_it_has_alone(home: Path, with_sets: Path) -> None:
    rows = [row for row in tiny.metrics(with_sets) if "eval_loss" in row]
    alone = {
        name: heal_in(home, f"only-{name}", "--eval-data", str(home / f"{name}.jsonl"), "--steps=4")
        for name in ("docs", "code")
    }
    assert tiny.curve(with_sets) == tiny.curve(alone["docs"]), "the first set is the run's"
    for name, folder in alone.items():
        of_one = [row for row in tiny.metrics(folder) if "eval_loss" in row]
        assert [row["eval_losses"][name] for row in rows] == [row["eval_loss"] for row in of_one]
        assert rows[0]["base_losses"][name] == of_one[0]["base_loss"]
    assert rows[0]["eval_losses"]["docs"] != rows[0]["eval_losses"]["code"]


def test_report_card_and_summary_name_each_held_out_set(with_sets: Path) -> None:
    from dus_cli.heal.launch.report import heal_text

    report = json.loads((with_sets / "report.json").read_text())
    docs, code = report["heldout_sets"]
    assert [(each["name"], each["documents"]) for each in (docs, code)] == [
        ("docs", 30),
        ("code", 20),
    ]
    assert docs["tokens"] + code["tokens"] == report["heldout_tokens"]
    assert (docs["base_loss"], docs["loss"]) == (report["base_loss"], report["loss"])
    card, summary = (with_sets / "README.md").read_text(), heal_text(report, with_sets)
    for each in (docs, code):
        assert f"{each['tokens']:,} tokens of {each['documents']} documents" in summary
        for field in ("base_loss", "scaled_loss", "loss"):
            assert f"{each[field]:.4f}" in card
            assert f"{each[field]:.4f}" in summary
    assert "held-out loss on `code`" in card
    assert str(with_sets.parent) not in (with_sets / "run.json").read_text()


def test_the_plan_counts_each_held_out_set_and_warns_of_a_thin_one(
    home: Path, sets: tuple[str, ...]
) -> None:
    plan = dry(home, "--seq-length", "64", "--steps", "9", *sets, "--eval-tokens", "400")
    counts = {each["name"]: each["tokens"] for each in plan["heldout_sets"]}
    assert all(300 < 2 * count <= 400 for count in counts.values()), "they share --eval-tokens"
    assert [text.partition(":")[0] for text in plan["warnings"][:2]] == ["docs", "code"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("docs={docs}", "{docs}"), "has no name but others have; give all of them a name"),
        (("docs={docs}", "none={empty}"), "has no documents to evaluate on"),
        (("docs=missing.jsonl",), "missing.jsonl is not a file, a folder or a pattern"),
    ],
)
def test_a_held_out_set_that_is_none_is_refused_in_one_line(
    home: Path, sets: tuple[str, ...], given: tuple[str, ...], said: str
) -> None:
    (home / "empty.jsonl").write_text("")
    places = {"docs": home / "docs.jsonl", "empty": home / "empty.jsonl"}
    options = [word for text in given for word in ("--eval-data", text.format(**places))]
    data = ("--data", home / "corpus.jsonl")
    done = tiny.forked_dus("heal", home / "scaled", *data, *options, "--dry-run", "-q")
    assert done.returncode in (1, 2)
    assert said in done.stderr
    assert done.stderr.count("\n") == 1


# --- exports --------------------------------------------------------------------------------------


def test_an_export_is_the_model_after_its_step_and_changes_nothing(home: Path, alone: Path) -> None:
    """Two workers, and a run of as many steps to hold it against."""
    options = ("--precision", "fp32", "--schedule", "constant")
    heal_in(home, "exporting", *options, "--export-every", "4", "--steps", "10", workers=2)
    short = heal_in(home, "of-four", *options, "--steps", "4", "--warmup", "0", workers=2)
    assert len(list(home.glob("exporting-step-*"))) == 2
    export = home / "exporting-step-4"
    assert_same_weights(export, short, within=1e-6)
    assert tiny.forked_dus("verify", export, "--json").report["problems"] == []
    report = json.loads((export / "report.json").read_text())
    assert (report["steps"], report["output"]) == (4, "exporting-step-4")
    assert [row["step"] for row in tiny.metrics(export)] == [0, 1, 2, 3, 4]
    assert not (export / "checkpoints").exists()
    assert not (home / "exporting-step-12").exists()


def test_what_stands_where_an_export_goes_is_kept(home: Path, tmp_path: Path) -> None:
    (tmp_path / "out-step-4").mkdir()
    (tmp_path / "out-step-4/mine.txt").write_text("mine")
    arguments = (
        "-o",
        tmp_path / "out",
        "--data",
        home / "corpus.jsonl",
        "--export-every",
        "4",
        "-q",
    )
    refused = tiny.forked_dus("heal", home / "scaled", *arguments)
    refused.assert_one_line_error("out-step-4 exists and dus did not write it")
    assert (tmp_path / "out-step-4/mine.txt").read_text() == "mine"


def test_tensorboard_gets_every_figure(home: Path) -> None:
    pytest.importorskip("tensorboard")
    out = heal_in(home, "boarded", "--track", "tensorboard", "--steps", "3")
    (events,) = (out / "tensorboard").iterdir()
    assert f"tensorboard/{events.name}" in model_files(out, read_record(out)), "what is pushed"
    raw = events.read_bytes()
    for name in (b"loss", b"eval_loss", b"base_loss", b"seconds/forward"):
        assert name in raw


@pytest.mark.parametrize("library", ["wandb", "trackio"])
def test_other_trackers_get_each_row_once(home: Path, tmp_path: Path, library: str) -> None:
    (tmp_path / f"{library}.py").write_text(
        "import json, os\n"
        "def _note(*what):\n"
        "    with open(os.environ['CALLS'], 'a') as file:\n"
        "        file.write(json.dumps(what) + '\\n')\n"
        "class Begun: starting_step = _next_step = 0\n"
        "def init(**options): return _note('init', options['project'], options['name']) or Begun\n"
        "def log(figures, step): _note('log', step, figures.get('loss'))\n"
        "def finish(): _note('finish')\n"
    )
    calls = tmp_path / "calls"
    arguments = [*RECIPE, "--steps", "3", "--track", library]
    where = {"PYTHONPATH": str(tmp_path), "CALLS": str(calls)}
    data = ("--data", home / "corpus.jsonl")
    failure = tiny.heal(
        home / "scaled", home / library, *data, *arguments, workers=1, num_local=None, **where
    )
    assert failure == ""
    noted = [json.loads(line) for line in calls.read_text().splitlines()]
    rows = tiny.metrics(home / library)
    assert noted[0] == ["init", "dus-heal", library]
    assert noted[1:-1] == [["log", row["step"], row.get("loss")] for row in rows]
    assert noted[-1] == ["finish"]
