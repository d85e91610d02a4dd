"""`--from dus.json`: a release made again, byte for byte, or one line that says why not."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from forked import dus
from tiny import digests

from dus_cli.common.reference import ModelRef
from dus_cli.errors import DusError
from dus_cli.evaluation.card import update_card
from dus_cli.maps.starts import StartRule
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import DEFAULT_SHARD_BYTES, MapRequest
from dus_cli.release.remaking import read_remaking
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.report import UpscaleReport
from dus_cli.upscaling.request import UpscaleRequest
from dus_cli.upscaling.verb import upscale


def release(
    base: Path,
    output: Path,
    request: MapRequest,
    *,
    size: int = DEFAULT_SHARD_BYTES,
    dtype: Dtype | None = None,
) -> Path:
    wanted = UpscaleRequest(ModelRef(str(base), path=base), request, size, dtype)
    upscale(wanted, output, UpscaleOptions(checksums=True))
    return output


def remake(lineage: Path, output: Path, model: str | None = None) -> UpscaleReport:
    remaking = read_remaking(lineage, model)
    return upscale(UpscaleRequest(*remaking.parts, remaking), output)


@pytest.fixture(scope="module")
def floats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eight layers in F32 and three shards, with a field that dus does not know, a tokenizer and
    a card.
    """
    config = llama_config(8) | {"strange_layers": [1] * 8}
    folder = tmp_path_factory.mktemp("floats") / "base"
    # Bits of random bytes may be no number: zeros are.
    write_checkpoint(
        folder,
        llama_tensors(8, dtype="F32"),
        config,
        num_shards=3,
        fill=lambda _name, size: bytes(size),
    )
    (folder / "tokenizer.json").write_text("{}")
    (folder / "README.md").write_text("---\nlicense: mit\nlanguage: [en, no]\n---\n")
    return folder


REQUESTS: dict[str, dict[str, Any]] = {
    "trim": {"request": MapRequest(3)},
    "the default trim": {"request": MapRequest()},
    "copies": {"request": MapRequest(1, copies=4)},
    "layers": {"request": MapRequest(layers="0:3,1,1,5:")},
    "recipe": {"request": MapRequest(recipe="llama-pro")},
    "recipe with a word too many": {"request": MapRequest(recipe="llama-pro", identity=True)},
    "recipe, as identities": {"request": MapRequest(recipe="solar", identity=True)},
    "identity": {"request": MapRequest(2, identity=True)},
    "start": {"request": MapRequest(2, start=StartRule.parse("fade:cosine"))},
    "start of a recipe": {
        "request": MapRequest(recipe="solar", start=StartRule.parse("scale:0.3"))
    },
    "doubled": {"request": MapRequest(double="1:3", start=StartRule.parse("half"))},
    "dtype": {"request": MapRequest(2), "dtype": Dtype.bfloat16},
    "max shard size": {"request": MapRequest(2), "size": 300_000},
}


@pytest.mark.parametrize("name", REQUESTS)
def test_a_release_is_made_again_byte_for_byte(name: str, floats: Path, tmp_path: Path) -> None:
    options = dict(REQUESTS[name])
    request = options.pop("request")
    assume: tuple[Any, ...] = (("strange_layers", "map" if request.trim == 3 else "keep"),)
    request = replace(request, assume=assume)
    out = release(floats, tmp_path / "out", request, **options)
    report = remake(out / "dus.json", tmp_path / "again")
    assert digests(tmp_path / "again") == digests(out)
    assert report.reproduced
    assert report.to_json()["from"] == str(out / "dus.json")


def test_from_is_the_whole_command_and_says_that_it_reproduced(base: Path, tmp_path: Path) -> None:
    out = release(base, tmp_path / "out", MapRequest(2, copies=3))
    command = ("upscale", "--from", out / "dus.json", "-o", tmp_path / "again", "--json")
    plan = dus(*command, "--dry-run").report
    assert (plan["layer_map"], plan["reproduced"], plan["from"]) == (
        [*range(6), *range(2, 6), *range(2, 8)],
        None,
        str(out / "dus.json"),
    )
    report = dus(*command).report
    assert (report["status"], report["reproduced"], report["model"]) == ("written", True, str(base))
    assert digests(tmp_path / "again") == digests(out)
    again = dus(*command).report
    assert (again["status"], again["reproduced"]) == ("unchanged", True)


@pytest.mark.parametrize(
    "option",
    """--trim 2|--layers 0:4|--copies 2|--recipe solar|--identity|--dtype float16|--assume x=keep|--max-shard-size 5GB
    --revision main|--start half|--double 1:2""".replace("\n    ", "|").split("|"),
)
def test_what_the_lineage_says_cannot_be_said_beside_it(
    option: str, base: Path, tmp_path: Path
) -> None:
    done = dus(
        "upscale", "--from", tmp_path / "dus.json", "-o", tmp_path / "again", *option.split()
    )
    done.assert_one_line_error("--from", option.split(maxsplit=1)[0], code=2)


def test_without_model_and_lineage_there_is_nothing_to_do(tmp_path: Path) -> None:
    dus("upscale", "-o", tmp_path / "out").assert_one_line_error("MODEL", code=2)


def test_a_base_that_moved_is_given_beside_the_lineage(
    floats: Path, base: Path, tmp_path: Path
) -> None:
    """As on another machine: neither the path nor the folder's name is what it was."""
    here = shutil.copytree(base, tmp_path / "here")
    out = release(here, tmp_path / "out", MapRequest(2))
    here.rename(tmp_path / "elsewhere")
    with pytest.raises(DusError, match="where there is no directory; give its place now"):
        read_remaking(out / "dus.json")
    assert remake(out, tmp_path / "again", str(tmp_path / "elsewhere")).reproduced
    assert digests(tmp_path / "again") == digests(out)
    with pytest.raises(
        DusError, match=r"is not the base that .* records: it has another config.json and"
    ):
        remake(out, tmp_path / "third", str(floats))


def test_a_base_that_was_typed_as_a_dot_keeps_the_name_that_it_had(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)
    out = release(Path(), tmp_path / "out", MapRequest(2))
    monkeypatch.chdir(tmp_path)
    assert remake(out, tmp_path / "again", str(base)).reproduced


CHANGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "its config": (
        lambda b: (b / "config.json").write_text((b / "config.json").read_text() + "\n"),
        "config.json",
    ),
    "its shards": (
        lambda b: write_checkpoint(
            b, llama_tensors(8, hidden=32), json.loads((b / "config.json").read_text())
        ),
        "shards of other",
    ),
    "a byte of its weights": (
        lambda b: (b / "model.safetensors").write_bytes(
            (b / "model.safetensors").read_bytes()[:-1] + b"x"
        ),
        "not reproduced: model.safetensors",
    ),
    "a new small file": (
        lambda b: (b / "vocab.txt").write_text("x"),
        "not reproduced: dus.json, vocab.txt",
    ),
    "its licence": (
        lambda b: (b / "README.md").write_text("---\nlicense: mit\n---\n"),
        "not reproduced: README.md",
    ),
}


@pytest.mark.parametrize("what", CHANGES)
def test_a_base_that_changed_is_told_and_nothing_is_published(
    what: str, base: Path, tmp_path: Path
) -> None:
    out = release(base, tmp_path / "out", MapRequest(2))
    change, message = CHANGES[what]
    change(base)
    with pytest.raises(DusError, match=message):
        remake(out, tmp_path / "again")
    assert {path.name for path in tmp_path.iterdir()} == {"base", "out"}


def test_without_sums_nothing_is_compared_and_nothing_claimed(base: Path, tmp_path: Path) -> None:
    out = release(base, tmp_path / "out", MapRequest(2))
    (out / "SHA256SUMS").unlink()
    assert remake(out, tmp_path / "again").reproduced is None
    assert digests(tmp_path / "again") == digests(out)


def test_sums_that_are_damaged_are_no_sums(base: Path, tmp_path: Path) -> None:
    out = release(base, tmp_path / "out", MapRequest(2))
    (out / "SHA256SUMS").write_text("nonsense\n")
    with pytest.raises(DusError, match="a line that is not a sum: nonsense"):
        read_remaking(out)


def test_a_lineage_of_another_dus_works_with_a_warning_that_names_both(
    base: Path, tmp_path: Path
) -> None:
    out = release(base, tmp_path / "out", MapRequest(2))
    record = json.loads((out / "dus.json").read_text()) | {"dus_version": "0.0.9"}
    del record["assume"]  # as if that dus had not known it
    (out / "dus.json").write_text(json.dumps(record))
    report = remake(out, tmp_path / "again")
    assert report.reproduced
    assert any(
        "0.0.9" in warning and "0.1.0" in warning for warning in report.to_json()["warnings"]
    )
    assert "0.0.9" not in (tmp_path / "again/README.md").read_text()


def test_of_a_healed_model_the_model_before_its_healing_is_made(base: Path, tmp_path: Path) -> None:
    out = release(base, tmp_path / "out", MapRequest(2))
    before = digests(out)
    record = json.loads((out / "dus.json").read_text()) | {"healing": [{"steps": 1}]}
    (out / "dus.json").write_text(json.dumps(record))
    report = remake(out, tmp_path / "again")
    assert report.reproduced is None
    assert any("was healed since" in warning for warning in report.warnings)
    assert digests(tmp_path / "again") == {
        name: total for name, total in before.items() if name != "SHA256SUMS"
    }


RESULT = {
    "task": {"type": "text-generation"},
    "dataset": {"name": "a", "type": "json"},
    "metrics": [{"value": 2.5}],
}


def test_a_card_with_results_is_made_without_them_and_its_rest_compared(
    floats: Path, tmp_path: Path
) -> None:
    out = release(floats, tmp_path / "out", MapRequest(2))
    before = digests(out)
    assert update_card(out, "out", [RESULT])
    assert digests(out) != before
    report = remake(out, tmp_path / "again")
    assert report.reproduced
    assert any("has evaluation results" in warning for warning in report.warnings)
    assert digests(tmp_path / "again") == before
    # A person's edit beside the results is a difference, as without them.
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMore.\n")
    update_card(out, "out", [RESULT])  # its sum
    with pytest.raises(DusError, match=r"not reproduced: README\.md differ"):
        remake(out, tmp_path / "edited")
    assert not (tmp_path / "edited").exists()


@pytest.mark.parametrize(
    "card",
    [b"\xff", b"---\n{[\n---\n", b"---\nmodel-index: [\n---\n"],
    ids=["bytes", "no YAML", "cut"],
)
def test_a_card_that_cannot_be_read_is_a_difference(
    card: bytes, floats: Path, tmp_path: Path
) -> None:
    out = release(floats, tmp_path / "out", MapRequest(2))
    sums = (out / "SHA256SUMS").read_text()
    old = next(line for line in sums.splitlines() if line.endswith("README.md"))
    (out / "README.md").write_bytes(card)
    (out / "SHA256SUMS").write_text(
        sums.replace(old, f"{hashlib.sha256(card).hexdigest()}  README.md")
    )
    with pytest.raises(DusError, match=r"not reproduced: README\.md differ"):
        remake(out, tmp_path / "again")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base", None),
        ("base", {"repo_id": "../../etc", "commit": "1" * 40}),
        ("base", {"repo_id": "org/name", "commit": "main"}),
        ("base", {"repo_id": ["org/name"], "commit": "1" * 40}),
        ("base", {"path": 7}),
        ("base", {"path": "a\0b"}),
        ("trim", 10**9),
        ("trim", "two"),
        ("num_layers", {"base": 10**9}),
        ("layer_map", [0, 1]),
        ("recipe", ["solar"]),
        ("recipe", "of my own"),
        ("dtype", "float8"),
        ("max_shard_size", -1),
        ("assume", {"x": "maybe"}),
        ("schema", 99),
    ],
)
def test_a_damaged_lineage_is_one_line(
    field: str, value: object, base: Path, tmp_path: Path
) -> None:
    out = release(base, tmp_path / "out", MapRequest(2))
    record = json.loads((out / "dus.json").read_text()) | {field: value}
    (out / "dus.json").write_text(json.dumps(record))
    with pytest.raises(DusError) as caught:
        remake(out, tmp_path / "again")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "again").exists()


def test_what_records_no_upscale_is_refused(tmp_path: Path) -> None:
    (tmp_path / "dus.json").write_text('{"schema": 1, "dus_version": "0.1.0", "healing": []}')
    with pytest.raises(DusError, match="records no upscale"):
        read_remaking(tmp_path)
    with pytest.raises(DusError, match="cannot read"):
        read_remaking(tmp_path / "nowhere.json")
