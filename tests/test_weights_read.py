"""Which weights are read: those that transformers loads. What was never fetched, or is no file,
is named.
"""

from __future__ import annotations

import json
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    Tensor,
    fill_with_layer,
    llama_config,
    llama_tensors,
    write_checkpoint,
    write_shard,
)
from forked import dus

from dus_cli.common.reference import ModelRef
from dus_cli.errors import CheckpointError, ConfigError, DusError
from dus_cli.planning.plan import Base, MapRequest, UpscalePlan, make_plan
from dus_cli.source.checkpoint import open_checkpoint
from dus_cli.verification.verb import verify
from dus_cli.writing.staging import Staging

INDEX = "model.safetensors.index.json"


def planned(folder: Path) -> UpscalePlan:
    return make_plan(
        Base(ModelRef(str(folder), path=folder)), open_checkpoint(folder), MapRequest(1)
    )


def read_from(folder: Path) -> list[str]:
    """The files of weights, and the index, that are read."""
    return open_checkpoint(folder).weight_files


def refused(folder: Path) -> str:
    with pytest.raises(DusError) as caught:
        planned(folder)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.fixture
def both(sharded: Path) -> Path:
    """A whole model.safetensors, and beside it an index with five shards of another save."""
    write_shard(sharded / "model.safetensors", llama_tensors(8), fill_with_layer)
    return sharded


# --- the choice ----------------------------------------------------------------------------------


def test_one_file_is_read_before_an_index_and_the_report_names_both(
    both: Path, tmp_path: Path
) -> None:
    report = dus("upscale", both, "--trim", "1", "-o", tmp_path / "out", "--json").report
    shards = [f"model-{number:05}-of-00005.safetensors" for number in range(1, 6)]
    assert report["base_weights"] == {"read": ["model.safetensors"], "not_read": [*shards, INDEX]}
    assert any(
        "read from model.safetensors" in warning and INDEX in warning
        for warning in report["warnings"]
    )
    assert sorted(path.name for path in (tmp_path / "out").glob("model*")) == ["model.safetensors"]
    shown = dus("upscale", both, "--trim", "1", "-o", tmp_path / "other").stdout
    assert "not read     model-00001-of-00005.safetensors" in shown


def test_a_stale_index_whose_shards_are_gone_is_in_nobodys_way(both: Path) -> None:
    for path in both.glob("model-*"):
        path.unlink()
    assert read_from(both) == ["model.safetensors"]


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (["model.safetensors", INDEX, "pytorch_model.bin"], "model.safetensors"),
        ([INDEX, "pytorch_model.bin"], INDEX),
        (["pytorch_model.bin", "pytorch_model.bin.index.json"], "pytorch_model.bin"),
        (
            ["pytorch_model.bin.index.json", "model.fp16.safetensors"],
            "pytorch_model.bin.index.json",
        ),
    ],
)
def test_the_choice_is_the_one_that_transformers_makes(
    tmp_path: Path, names: list[str], chosen: str
) -> None:
    """Held against the library's own function."""
    transformers = pytest.importorskip("transformers.modeling_utils")
    from dus_cli.source.weights import find_weights

    for name in names:
        (tmp_path / name).write_text('{"metadata": {}, "weight_map": {"a": "shard"}}')
    files, index = transformers._get_resolved_checkpoint_files(
        str(tmp_path), None, None, None, None, False
    )
    theirs = {"shard"} if index is not None else {chosen}
    assert {Path(file).name for file in files} == theirs
    assert find_weights(tmp_path, {}) == chosen


def test_a_file_that_the_config_names_is_read_and_the_output_has_no_such_field(
    base: Path, edit_config: Callable[..., None]
) -> None:
    (base / "model.safetensors").rename(base / "mine.safetensors")
    assert "mine.safetensors but neither model.safetensors" in refused(base)
    edit_config(base, transformers_weights="mine.safetensors")
    plan = planned(base)
    assert plan.checkpoint.weight_files == ["mine.safetensors"]
    assert "transformers_weights" not in plan.config
    edit_config(base, transformers_weights="other.safetensors")
    assert "names other.safetensors, which does not exist" in refused(base)
    edit_config(base, transformers_weights="mine.bin")
    assert "*.safetensors.index.json file there" in refused(base)


def test_a_variant_and_the_parts_of_workers_are_named(base: Path) -> None:
    single = base / "model.safetensors"
    single.rename(base / "model.fp16.safetensors")
    assert "only weights of a variant (fp16)" in refused(base)
    (base / "model.fp16.safetensors").rename(base / "shard-00000-model-00001-of-00001.safetensors")
    assert "consolidate_distributed_checkpoint" in refused(base)


def test_verify_reads_the_file_that_transformers_loads(both: Path) -> None:
    found = verify(both)
    assert found.is_sound
    assert (
        f"model.safetensors was read, as transformers does, and {INDEX} was not" in found.warnings
    )
    (both / "model.safetensors").write_bytes(b"")
    assert "model.safetensors is empty" in verify(both).problems[0]


def test_a_lineage_of_the_shards_says_what_stands_beside_them(
    sharded: Path, tmp_path: Path
) -> None:
    assert dus("upscale", sharded, "-o", tmp_path / "out", "-q").returncode == 0
    write_shard(sharded / "model.safetensors", llama_tensors(8), fill_with_layer)
    again = dus("upscale", "--from", tmp_path / "out/dus.json", "-o", tmp_path / "again", "-q")
    again.assert_one_line_error(
        "made from model-00001-of-00005.safetensors", "move model.safetensors away"
    )


# --- an index and the headers --------------------------------------------------------------------


def change_index(folder: Path, **names: str | None) -> None:
    path = folder / INDEX
    index: dict[str, Any] = json.loads(path.read_text())
    weight_map = index["weight_map"] | {
        name.replace("__", "."): shard for name, shard in names.items()
    }
    index["weight_map"] = {name: shard for name, shard in weight_map.items() if shard is not None}
    path.write_text(json.dumps(index))


FIRST, SECOND = "model-00001-of-00005.safetensors", "model-00002-of-00005.safetensors"


@pytest.mark.parametrize(
    ("name", "part"),
    [
        ("model__layers__0__ghost__weight", "model.layers.0.ghost.weight, which no shard holds"),
        ("model__rotary__inv_freq", "model.rotary.inv_freq, which no shard holds"),
    ],
)
def test_an_index_may_name_what_no_shard_holds(sharded: Path, name: str, part: str) -> None:
    change_index(sharded, **{name: FIRST})
    plan = planned(sharded)
    assert any(part in warning for warning in plan.warnings)
    assert name.replace("__", ".") not in plan.text_files().get(INDEX, "")


def test_a_tensor_that_the_index_does_not_name_or_places_elsewhere_is_read(sharded: Path) -> None:
    change_index(sharded, lm_head__weight=None, model__norm__weight=FIRST)
    plan = planned(sharded)
    names = {placement.name for placement in plan.placements}
    assert {"lm_head.weight", "model.norm.weight"} <= names
    assert any("does not name lm_head.weight" in warning for warning in plan.warnings)
    assert any("names model.norm.weight, in other shards" in warning for warning in plan.warnings)


@pytest.mark.parametrize(
    "lost", ["model.layers.3.mlp.up_proj.weight", "model.norm.weight", "lm_head.weight", "up"]
)
def test_a_tensor_that_the_model_needs_is_not_let_go(tmp_path: Path, lost: str) -> None:
    def is_kept(tensor: Tensor) -> bool:
        return "up_proj" not in tensor[0] if lost == "up" else tensor[0] != lost

    tensors = llama_tensors(8)
    folder = write_checkpoint(
        tmp_path / "m", list(filter(is_kept, tensors)), llama_config(8), num_shards=2
    )
    path = folder / INDEX
    index = json.loads(path.read_text())
    shard = next(iter(index["weight_map"].values()))
    path.write_text(
        json.dumps({"weight_map": {tensor[0]: shard for tensor in tensors} | index["weight_map"]})
    )
    assert "which no shard holds and the model needs" in refused(folder)


# --- what stands in a file's place ---------------------------------------------------------------

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a21\nsize 12345\n"
PAGE = b"<!DOCTYPE html>\n<html><head><title>Sign in</title></head></html>\n"

IN_PLACE_OF_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "pointer": (POINTER, "is a Git LFS pointer, not the file itself; run `git lfs pull`"),
    "page": (PAGE, "is a web page"),
    "xml": (
        b"<?xml version='1.0'?><Error><Code>AccessDenied</Code></Error>",
        "a server's error in XML",
    ),
    "answer": (b'{"error":"Repository not found"}', "is a server's answer"),
    "text": (b"Entry not found", "is text (Entry not found)"),
    "empty": (b"", "is empty"),
    "zeros": (bytes(10_000), "begins with nothing but zeros"),
    "gzip": (b"\x1f\x8b\x08" + bytes(range(200)), "compressed with gzip"),
    "gguf": (b"GGUF\3\0\0\0" + bytes(100), "is a GGUF file"),
    "archive": (b"PK\3\4" + bytes(range(200)), "is a zip archive"),
}


@pytest.mark.parametrize("case", IN_PLACE_OF_WEIGHTS)
def test_what_stands_in_the_place_of_weights_is_named(base: Path, case: str) -> None:
    content, part = IN_PLACE_OF_WEIGHTS[case]
    (base / "model.safetensors").write_bytes(content)
    assert f"model.safetensors {part}" in refused(base) or part in refused(base)


@pytest.mark.parametrize(
    "case", ["pointer", "page", "answer", "text", "empty", "zeros", "gzip", "gguf"]
)
def test_what_stands_in_the_place_of_a_pickle_is_named(base: Path, case: str) -> None:
    content, part = IN_PLACE_OF_WEIGHTS[case]
    (base / "model.safetensors").unlink()
    (base / "pytorch_model.bin").write_bytes(content)
    assert part in refused(base)


def test_safetensors_under_the_name_of_a_pickle_are_told(base: Path) -> None:
    (base / "model.safetensors").rename(base / "pytorch_model.bin")
    assert "safetensors file under the name of a pickled one" in refused(base)


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", "tokenizer.model", INDEX])
def test_a_pointer_or_a_page_in_the_place_of_a_small_file_is_named(
    sharded: Path, name: str
) -> None:
    for content, part in ((POINTER, "Git LFS pointer"), (PAGE, "web page")):
        (sharded / name).write_bytes(content)
        message = refused(sharded)
        assert message.startswith(f"{name} is a {part}")


def test_a_servers_answer_in_the_place_of_the_config_is_named(base: Path) -> None:
    (base / "config.json").write_text('{"error": "Invalid username or password."}')
    assert "config.json is a server's answer" in refused(base)


# --- JSON that a person has to mend --------------------------------------------------------------


@pytest.mark.parametrize(
    ("old", "new", "part"),
    [
        (b"{", b"\xef\xbb\xbf{", "begins with a byte-order mark"),
        (b"{", b"{ // mine\n", "a comment in line 1 (// mine)"),
        (b'"vocab_size": 256\n}', b'"vocab_size": 256,\n}', "a comma before the closing }"),
        (b'"silu"', b"'silu'", "a text in single quotes in line"),
        (b"false", b"False", "a Python constant in line"),
        (
            b"{",
            b'{"vocab_size": 7,',
            "the name 'vocab_size' occurs twice (7, then 256); readers differ",
        ),
        (b'"vocab_size": 256\n}', b"", "ends in the middle"),
        (
            b'"num_hidden_layers": 8',
            b'"num_hidden_layers": "8"',
            'num_hidden_layers is the text "8", not a number',
        ),
        (
            b'"num_hidden_layers": 8',
            b'"num_hidden_layers": NaN',
            "num_hidden_layers is nan, not a number",
        ),
        (
            b'"num_hidden_layers": 8',
            b'"num_hidden_layers": true',
            "num_hidden_layers is true, not a number",
        ),
    ],
)
def test_what_is_wrong_with_a_config_is_said(base: Path, old: bytes, new: bytes, part: str) -> None:
    path = base / "config.json"
    raw = path.read_bytes()
    assert old in raw
    path.write_bytes(raw.replace(old, new, 1).rstrip(b"\n"))
    message = refused(base)
    assert "config.json" in message
    assert part in message
    assert "fetch it again" not in message


def test_nan_in_a_config_goes_along_as_transformers_reads_it(base: Path, tmp_path: Path) -> None:
    raw = (base / "config.json").read_text()
    (base / "config.json").write_text(raw.replace('"rms_norm_eps": 1e-05', '"rms_norm_eps": NaN'))
    assert dus("upscale", base, "-o", tmp_path / "out", "-q").returncode == 0
    assert '"rms_norm_eps": NaN' in (tmp_path / "out/config.json").read_text()
    assert dus("verify", tmp_path / "out", "--base", base, "-q").returncode == 0


# --- what is no regular file ---------------------------------------------------------------------


def put(path: Path, kind: str) -> None:
    path.unlink(missing_ok=True)
    if kind == "a named pipe":
        os.mkfifo(path)
    elif kind == "a socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))
    elif kind == "a device":
        path.symlink_to("/dev/zero")
    else:
        path.mkdir()


@pytest.mark.parametrize("kind", ["a named pipe", "a socket", "a directory"])
@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
        "README.md",
        "dus.json",
        "SHA256SUMS",
        "INCOMPLETE",
    ],
)
def test_what_is_no_file_is_not_waited_for(
    base: Path, name: str, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(base)  # a socket's path may not be long
    put(base / name, kind)
    if name == "tokenizer.json" and kind == "a directory":
        return  # then it is a folder, which goes along
    what = f"{name}: it is {kind}, not a regular file"
    if name == "README.md":
        assert any(
            f"the base's {name} cannot be read: it is {kind}" in warning
            for warning in planned(base).warnings
        )
    elif name == "INCOMPLETE":
        assert what in refused(base)
    elif name in ("dus.json", "SHA256SUMS"):
        assert any(what in problem for problem in verify(base).problems)
    else:
        assert name in refused(base)


def test_a_pipe_as_config_is_one_line_of_the_command(base: Path, tmp_path: Path) -> None:
    put(base / "config.json", "a named pipe")
    message = "cannot read config.json: it is a named pipe, not a regular file"
    dus("upscale", base, "-o", tmp_path / "out", "-q").assert_one_line_error(message)


def test_a_device_is_not_read(base: Path) -> None:
    put(base / "config.json", "a device")
    assert "leaves the model's folder" in refused(base)


# --- a source that cannot be read ----------------------------------------------------------------


def test_a_small_file_that_cannot_be_read_is_no_failure_to_write(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As root every file may be read: the operating system's answer is given here."""
    (base / "tokenizer.json").write_text("{}")
    real = os.open

    def denied(path: Any, *arguments: Any, **options: Any) -> int:
        if str(path).endswith("tokenizer.json"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path, *arguments, **options)

    monkeypatch.setattr(os, "open", denied)
    with pytest.raises(
        CheckpointError, match=r"cannot read tokenizer\.json: Permission denied; check its owner"
    ):
        planned(base)
    with (
        pytest.raises(CheckpointError, match=r"cannot read tokenizer\.json: Permission denied"),
        Staging(tmp_path / "out", overwrite=False) as staging,
    ):
        staging.copy_file("tokenizer.json", base / "tokenizer.json")


def test_the_depth_as_text_is_a_config_error(base: Path, edit_config: Callable[..., None]) -> None:
    edit_config(base, num_hidden_layers="8")
    with pytest.raises(ConfigError, match='the text "8"'):
        planned(base)
