"""The Python API, frozen: names, signatures, results. A change here is one that its users must
hear of.
"""

from __future__ import annotations

import dataclasses
import inspect
import json
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from forked import dus

import dus_cli
from dus_cli import (
    BudgetOptions,
    DataOptions,
    DusError,
    Gates,
    ProbeOptions,
    PushOptions,
    RecipeOptions,
    SavingOptions,
    ScoringOptions,
    TextOptions,
    UpscaleOptions,
    UpscaleReport,
    UsageError,
    Verification,
    VerifyOptions,
    plan,
    upscale,
    verify,
)
from dus_cli.api import evaluate, heal, heal_options, probe, push
from dus_cli.heal.options import Distill, Span
from dus_cli.progress import NoProgress

ROOT = Path(__file__).parent.parent

UPSCALE = (
    "lineage: pathlib.Path | None = None, revision: str | None = None, token: str | None = None, "
    "trim: int | None = None, layers: str | None = None, double: str | None = None, copies: int = "
    "2, assume: tuple[tuple[str, typing.Literal['keep', 'map']], ...] = (), recipe: str | None = "
    "None, identity: bool = False, start: str | None = None, engines: tuple[str, ...] = (), dtype: "
    "dus_cli.planning.dtypes.Dtype | None = None, max_shard_size: int = 5000000000, copy_mode: "
    "dus_cli.writing.transfer.CopyMode = <CopyMode.auto: 'auto'>, stream: bool = False, jobs: int "
    "= 4, push_to: str | None = None, private: bool = False, branch: str | None = None, verify: "
    "dus_cli.verification.planned.VerifyMode = <VerifyMode.structure: 'structure'>, checksums: "
    "bool = False, overwrite: bool = False"
)

VERIFY = (
    "base: str | None = None, engines: tuple[str, ...] = (), token: str | None = None, jobs: int = "
    "4, read: bool = False, forward: bool = False, data: tuple[str, ...] = ()"
)

SIGNATURES: dict[Any, str] = {
    upscale: "(model: 'str | Path | None', output: 'str | Path', options: 'UpscaleOptions | None' = "
    f"None, *, progress: 'Progress | None' = None, {UPSCALE}) -> 'UpscaleReport'",
    plan: "(model: 'str | Path | None', output: 'str | Path', options: 'UpscaleOptions | None' = "
    f"None, *, {UPSCALE}) -> 'UpscaleReport'",
    probe: "(model: 'str | Path', options: 'ProbeOptions', *, revision: 'str | None' = None, "
    "token: 'str | None' = None, dry_run: 'bool' = False, "
    "progress: 'Progress | None' = None) -> 'Probe | ProbePlan'",
    evaluate: "(models: 'Sequence[str | Path]', *, text: 'TextOptions | None' = None, "
    "tasks: 'TaskOptions | None' = None, scoring: 'ScoringOptions | None' = None, "
    "gates: 'Gates | None' = None, with_base: 'bool' = False, "
    "token: 'str | None' = None, progress: 'Progress | None' = None) -> 'EvalReport'",
    push: "(output: 'str | Path', repo: 'str', options: 'PushOptions | None' = None, *, dry_run: 'bool' = False, "
    "progress: 'Progress | None' = None) -> 'PushReport'",
    heal: "(model: 'str | Path', output: 'str | Path | None' = None, *, data: 'DataOptions', "
    "budget: 'BudgetOptions | None' = None, recipe: 'RecipeOptions | None' = None, fit: 'FitOptions | None' = None, "
    "launch: 'LaunchOptions | None' = None, saving: 'SavingOptions | None' = None, dry_run: 'bool' = False, "
    "pilot_seconds: 'float | None' = None, view: 'View | None' = None) -> 'dict[str, Any]'",
    verify: "(folder: 'str | Path', options: 'VerifyOptions | None' = None, *, "
    "progress: 'Progress | None' = None, "
    f"{VERIFY}) -> 'Verification'",
}

FIELDS: dict[Any, dict[str, str]] = {
    UpscaleReport: {
        "plan": "UpscalePlan",
        "output": "Path",
        "status": "Literal['written', 'planned', 'unchanged']",
        "space": "Space",
        "tally": "ByteCounts",
        "verified": "str",
        "seconds": "float",
        "notes": "tuple[str, ...]",
        "remaking": "Remaking | None",
        "published": "str | None",
        "push": "PushReport | None",
        "streamed": "Streamed | None",
    },
    Verification: {
        "model": "str",
        "problems": "list[str]",
        "warnings": "list[str]",
        "num_tensors": "int",
        "num_parameters": "int",
        "num_layers": "int | None",
        "bytes_compared": "int",
        "bytes_shared": "int",
        "files_summed": "int",
        "engines": "list[dict[str, Any]]",
        "forward": "Forward | None",
    },
}


def test_the_package_exports_these_names() -> None:
    options = (
        "UpscaleOptions VerifyOptions ProbeOptions TextOptions TaskOptions ScoringOptions Gates PushOptions DataOptions "
        "BudgetOptions RecipeOptions FitOptions LaunchOptions SavingOptions"
    )
    reports = "UpscaleReport Verification Probe ProbePlan EvalReport PushReport"
    names = f"{options} {reports} DusError UsageError Progress".split()
    verbs = "evaluate heal plan probe push upscale verify".split()
    assert dus_cli.__all__ == [*sorted(names), "__version__", *verbs]
    assert set(dus_cli.__all__) <= set(dir(dus_cli))
    with pytest.raises(AttributeError, match="no attribute 'downscale'"):
        _ = dus_cli.downscale  # type: ignore[attr-defined]


@pytest.mark.parametrize("function", SIGNATURES, ids=lambda function: function.__name__)
def test_a_signature_is_what_it_was(function: Any) -> None:
    assert str(inspect.signature(function)) == SIGNATURES[function]


@pytest.mark.parametrize("result", FIELDS, ids=lambda result: result.__name__)
def test_a_result_has_the_fields_that_it_had(result: Any) -> None:
    assert {field.name: field.type for field in dataclasses.fields(result)} == FIELDS[result]


def test_importing_the_package_loads_nothing_and_the_functions_nothing_heavy() -> None:
    code = (
        "import sys, dus_cli\n"
        "assert not [name for name in sys.modules if name.startswith('dus_cli.')]\n"
        "from dus_cli import upscale, plan, verify\n"
        "print(*sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(done.stdout.split()) & {"torch", "numpy", "huggingface_hub", "typer", "rich"}


def test_the_functions_return_what_the_commands_print(
    base: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    planned = plan(base, tmp_path / "out", trim=1, max_shard_size="200KB")
    assert (planned.status, planned.dry_run) == ("planned", True)
    assert not (tmp_path / "out").exists()
    written = upscale(
        base, tmp_path / "out", trim=1, max_shard_size=200_000, verify="full", checksums=True
    )
    assert written.status == "written"
    assert written.plan.layer_map.sources == (*range(7), *range(1, 8))
    again = upscale(str(base), str(tmp_path / "out"), trim=1, max_shard_size="200KB")
    assert again.status == "unchanged"
    sound = verify(tmp_path / "out", base=base)
    assert sound.is_sound
    assert capfd.readouterr() == ("", "")
    typed = dus(
        "upscale",
        base,
        "-o",
        tmp_path / "out",
        "--trim",
        "1",
        "--max-shard-size",
        "200KB",
        "--json",
    ).report
    assert typed == again.to_json() | {"seconds": typed["seconds"], "space": typed["space"]}
    found = dus("verify", tmp_path / "out", "--base", base, "--json").report
    assert found["bytes_compared"] == sound.bytes_compared
    assert set(planned.to_json()) == set(written.to_json()) == set(typed)


def test_options_may_be_an_object_its_fields_or_both(base: Path, tmp_path: Path) -> None:
    options = UpscaleOptions(trim=1, start="half", assume=(("rms_norm_eps", "keep"),))
    planned = plan(base, tmp_path / "out", options)
    of_fields = plan(base, tmp_path / "out", trim=1, start="half", assume={"rms_norm_eps": "keep"})
    assert planned.plan.layer_map == of_fields.plan.layer_map
    assert len(plan(base, tmp_path / "out", options, trim=2).plan.layer_map) == 12
    with pytest.raises(TypeError, match="trims"):
        plan(base, tmp_path / "out", trims=1)
    upscale(base, tmp_path / "out", options)
    assert verify(tmp_path / "out", VerifyOptions(base=str(base)), jobs=1).bytes_compared


def test_problems_are_listed_and_no_exception(base: Path, tmp_path: Path) -> None:
    upscale(base, tmp_path / "out")
    (tmp_path / "out/config.json").write_text("{}")
    found = verify(tmp_path / "out")
    assert not found.is_sound
    assert found.problems


@pytest.mark.parametrize(
    ("options", "kind", "why"),
    [
        ({"trim": 4}, DusError, "use 0 to 3"),
        ({"trim": 1, "recipe": "solar"}, UsageError, "--recipe gives the whole map"),
        ({"layers": "0:8", "copies": 3}, UsageError, "--layers gives the whole map"),
        ({"recipe": "lunar"}, UsageError, "there is no recipe 'lunar'"),
        ({"layers": "a:b"}, DusError, "neither START:END nor a layer number"),
        ({"dtype": "bf17"}, UsageError, "dtype: 'bf17' is not one of bfloat16, float16, float32"),
        ({"max_shard_size": "much"}, UsageError, "max_shard_size: 'much' is not a size"),
        (
            {"copy_mode": "teleport"},
            UsageError,
            "copy_mode: 'teleport' is not one of auto, clone, copy",
        ),
    ],
    ids=str,
)
def test_known_failures_raise_one_line(
    base: Path, tmp_path: Path, options: Any, kind: type[DusError], why: str
) -> None:
    for function in (plan, upscale):
        with pytest.raises(kind) as raised:
            function(base, tmp_path / "out", **options)
        assert why in str(raised.value)
        assert "\n" not in str(raised.value)
    assert not (tmp_path / "out").exists()
    with pytest.raises(UsageError, match="jobs: 0 is not a whole number from 1 to 64"):
        upscale(base, tmp_path / "out", jobs=0)


def test_a_path_is_a_directory_also_where_its_text_would_be_a_hub_id(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "org").mkdir()
    base.rename(tmp_path / "org/name")
    monkeypatch.chdir(tmp_path)
    report = upscale(Path("org/name"), Path("out"))
    assert report.to_json()["model"] == "./org/name"
    assert verify("out", base=report.to_json()["model"]).is_sound
    with pytest.raises(DusError, match="org/none does not exist"):
        plan(Path("org/none"), "out")


def test_progress_is_told_what_happens(base: Path, tmp_path: Path) -> None:
    class Heard(NoProgress):
        stages: list[tuple[str, int | None]]
        num_bytes = 0

        def __init__(self) -> None:
            self.stages = []

        def start(self, what: str, total: int | None, unit: str = "bytes") -> None:
            self.stages.append((f"{what} {unit}", total))

        def advance(self, amount: int) -> None:
            self.num_bytes += amount

    heard = Heard()
    report = upscale(base, tmp_path / "out", jobs=1, progress=heard)
    assert heard.stages == [("writing bytes", report.plan.num_data_bytes)]
    assert heard.num_bytes == report.plan.num_data_bytes


def test_a_result_is_short_in_a_notebook_and_a_summary_as_text(base: Path, tmp_path: Path) -> None:
    report = plan(base, tmp_path / "out")
    assert len(repr(report)) < 500
    assert "Dry run: nothing was written" in str(report)
    upscale(base, tmp_path / "out")
    assert ": sound (12 layers" in str(verify(tmp_path / "out"))


@pytest.mark.parametrize("num_times", [1, 3])
def test_ctrl_c_in_a_notebook_leaves_nothing_behind(tmp_path: Path, num_times: int) -> None:
    tensors = llama_tensors(8, hidden=1024, intermediate=2048, kv=256, vocab=256)
    write_checkpoint(tmp_path / "base", tensors, llama_config(8), fill=fill_randomly)
    code = (
        "import signal, sys\n"
        "from dus_cli import upscale\n"
        "before = signal.getsignal(signal.SIGINT)\n"
        "try: upscale('./base', 'out', copy_mode='copy', verify='full', checksums=True)\n"
        "except KeyboardInterrupt: print('interrupted')\n"
        "assert signal.getsignal(signal.SIGINT) is before\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=tmp_path, stdout=subprocess.PIPE, text=True
    )
    while not (tmp_path / ".out.partial").exists():
        time.sleep(0.001)
        assert process.poll() is None
    for _ in range(num_times):
        process.send_signal(signal.SIGINT)
    assert process.communicate()[0] == "interrupted\n"
    assert [path.name for path in tmp_path.iterdir()] == ["base"]


# --- heal, probe, evaluate and push ---------------------------------------------------------------


@pytest.mark.parametrize(
    "order", ["", "import dus_cli.heal.options, dus_cli.probe.maps, dus_cli.push.target; "]
)
def test_a_verb_with_the_name_of_its_room_is_both(order: str) -> None:
    code = (
        f"{order}from dus_cli import heal, probe, push, evaluate\n"
        "import inspect, dus_cli.api as api\n"
        "for verb in (heal, probe, push):\n"
        "    function = getattr(api, verb.__name__.rpartition('.')[2])\n"
        "    assert inspect.signature(verb) == inspect.signature(function)\n"
        "import dus_cli.probe.maps as maps\n"
        "assert evaluate is api.evaluate and maps.Cost\n"
        "try: push('nowhere', 'no id')\n"
        "except api.UsageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == ""
    assert "no id is not a valid id of a repo" in done.stdout


def test_options_from_python_may_be_values_or_what_would_be_typed() -> None:
    typed: dict[str, Any] = {
        "warmup": "10%",
        "distill": "0.5:80%",
        "schedule": "constant",
        "betas": "0.8,0.9",
    }
    found = heal_options(
        "~/out",
        data=DataOptions(files="a.jsonl", eval_files=[Path("b.txt")]),  # type: ignore[arg-type]
        budget=BudgetOptions(tokens="10M", until="base"),  # type: ignore[arg-type]
        recipe=RecipeOptions(**typed),
    )
    assert found.model == Path("~/out").expanduser()
    assert found.output.name == "out-healed"
    assert (found.data.files, found.data.eval_files) == (("a.jsonl",), ("b.txt",))
    assert (found.budget.tokens, found.budget.until) == (10_000_000, "base")
    assert (found.recipe.warmup, found.recipe.betas) == (Span(share=0.1), (0.8, 0.9))
    assert found.recipe.distill == Distill(0.5, Span(share=0.8))
    same = heal_options(
        Path("out"),
        "healed",
        data=DataOptions(files=("a",)),
        recipe=RecipeOptions(warmup=Span(share=0.1)),
    )
    assert same.recipe.warmup == found.recipe.warmup


WRONG: list[tuple[Any, str]] = [
    (
        lambda: heal_options("out", data=DataOptions(files=("a",)), budget=BudgetOptions(steps=0)),
        "steps: 0 is not a whole",
    ),
    (
        lambda: heal_options("out", data=DataOptions(files=("a",), holdout="9x")),  # type: ignore[arg-type]
        "holdout: 9x is not a share",
    ),
    (
        lambda: heal_options("out", data=DataOptions(files=("a",), special_tokens=1)),  # type: ignore[arg-type]
        "special_tokens: 1 is no bool",
    ),
    (
        lambda: heal_options(
            "out",
            data=DataOptions(files=("a",)),
            saving=SavingOptions(track="x"),  # type: ignore[arg-type]
        ),
        "track: 'x' is not",
    ),
    (
        lambda: heal_options("out", data=DataOptions(files=("a",)), recipe=RecipeOptions(lr=None)),  # type: ignore[arg-type]
        "lr: None is no value",
    ),
    (lambda: probe("out", ProbeOptions(data=("a",), layers=("a:b",))), "layers: "),
    (
        lambda: push("out", "org/name", PushOptions(jobs=65)),
        "jobs: 65 is not a whole number from 1 to 64",
    ),
    (lambda: evaluate(["out"]), "--data: there is nothing to evaluate on"),
    (lambda: evaluate([], text=TextOptions(data=("a",))), "models: there is none"),
    (
        lambda: evaluate(["a", "b"], text=TextOptions(data=("a",)), gates=Gates(max_drop=1)),
        "--max-drop: it is a limit",
    ),
]


@pytest.mark.parametrize(("call", "says"), WRONG, ids=[says for _, says in WRONG])
def test_an_option_that_is_no_value_of_its_kind_is_one_line(call: Any, says: str) -> None:
    with pytest.raises(UsageError) as raised:
        call()
    assert str(raised.value).startswith(says)
    assert "\n" not in str(raised.value)


def test_probe_evaluate_and_heal_return_what_the_commands_print(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("torch")
    pytest.importorskip("transformers")
    import tiny

    from dus_cli.probe.report import probe_json

    monkeypatch.chdir(tmp_path)
    tiny.write_corpus(tmp_path / "text.jsonl")
    tiny.upscaled(tiny.write_base(tmp_path / "base"), tmp_path / "scaled")
    here = f"import os; os.chdir({str(tmp_path)!r})"
    capfd.readouterr()
    options = ProbeOptions(data=("text.jsonl",), tokens=500, trims=(1, 2))
    found = probe_json(probe(Path("base"), options))
    typed = tiny.forked_dus(
        *("probe", "./base", "--data", "text.jsonl", "--tokens", "500", "--trims", "1:2", "--json"),
        first=here,
    ).report
    assert found["maps"] == typed["maps"]
    report = evaluate(
        ["./base", Path("scaled")],
        text=TextOptions(data=("text.jsonl",)),
        scoring=ScoringOptions(seq_length=32),
    )
    assert report.losses is not None
    assert [model.name for model in report.losses.models] == ["base", "scaled"]
    data = DataOptions(files=("text.jsonl",), seq_length=64)
    planned = heal("scaled", data=data, budget=BudgetOptions(steps=3), dry_run=True)
    assert (planned["dry_run"], planned["steps"]) == (True, 3)
    done = heal(
        "scaled",
        "healed",
        data=data,
        budget=BudgetOptions(steps=3),
        recipe=RecipeOptions(batch_tokens=256),
    )
    assert done["status"] in ("healed", "trained")
    assert done == json.loads((tmp_path / "healed/report.json").read_text()) | {
        "model": str(tmp_path / "scaled"),
        "output": str(tmp_path / "healed"),
    }
    assert capfd.readouterr() == ("", "")


def test_the_example_of_the_docs_runs(base: Path, tmp_path: Path) -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    code = "\n".join(block.split("```")[0] for block in page.split("```python\n")[1:])
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads((tmp_path / "out/config.json").read_text())["num_hidden_layers"] == 12


def test_every_field_and_argument_is_documented() -> None:
    page = (ROOT / "docs/api.md").read_text(encoding="utf-8")
    for function in SIGNATURES:
        assert f"`{function.__name__}(" in page
        for name in inspect.signature(function).parameters:
            assert f"`{name}`" in page, name
    for result, fields in FIELDS.items():
        assert f"`{result.__name__}`" in page
        for name in fields:
            assert f"`{name}`" in page, name
