"""`dus upscale`, run as a user runs it."""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from checkpoints import (
    fill_with_layer,
    llama_config,
    llama_tensors,
    write_checkpoint,
    write_mistral,
)
from conftest import dus as started_dus
from forked import dus
from safetensors import safe_open
from written import folder_digest, layer_bytes, names_and_bytes

from dus_cli.source.headers import read_header


def test_each_output_layer_holds_the_bytes_of_its_base_layer(base: Path, tmp_path: Path) -> None:
    report = dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "--json").report
    assert report["layer_map"] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert layer_bytes(tmp_path / "out") == {j: {k} for j, k in enumerate(report["layer_map"])}


def test_what_is_outside_the_layers_is_there_once(base: Path, tmp_path: Path) -> None:
    dus("upscale", base, "-o", tmp_path / "out", "-q")
    ours, theirs = names_and_bytes(tmp_path / "out"), names_and_bytes(base)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert ours[name] == theirs[name]
    assert len(ours) == 3 + 12 * 9


def test_the_report_says_what_was_done(base: Path, tmp_path: Path) -> None:
    report = dus("upscale", base, "-t", "2", "-o", tmp_path / "out", "--json").report
    assert report["schema"] == 1
    assert report["model"] == str(base)
    assert report["output"] == str(tmp_path / "out")
    assert report["num_layers"] == {"base": 8, "output": 12}
    assert report["trim"] == 2
    assert report["seams"] == [{"output_layers": [5, 6], "base_layers": [5, 2], "distance": 3}]
    per_layer = 2 * 64 + 3 * 64 * 128 + 2 * 32 * 64 + 2 * 64 * 64
    outside = 2 * 256 * 64 + 64
    assert report["parameters"] == {
        "base": outside + 8 * per_layer,
        "output": outside + 12 * per_layer,
    }
    assert report["bytes"] == 2 * report["parameters"]["output"]
    assert report["tensors"] == 12 * 9 + 3
    (shard,) = report["shards"]
    assert shard == {
        "name": "model.safetensors",
        "bytes": (tmp_path / "out/model.safetensors").stat().st_size,
    }
    assert report["bytes_cloned"] + report["bytes_copied"] == report["bytes"]
    assert report["seconds"] >= 0
    assert report["warnings"] == []


def test_python_dash_m_and_dus_are_the_same_command(tmp_path: Path) -> None:
    version = started_dus("--version").stdout
    assert version.startswith("dus 0.")
    assert (
        subprocess.run(
            [Path(sys.executable).parent / "dus", "--version"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout
        == version
    )


@pytest.mark.parametrize("mode", ["auto", "copy"])
@pytest.mark.parametrize("jobs", ["1", "4"])
def test_two_runs_write_identical_bytes_whatever_mode_jobs_and_place(
    sharded: Path, tmp_path: Path, mode: str, jobs: str
) -> None:
    dus(
        "upscale",
        sharded,
        "-o",
        tmp_path / "first",
        "--max-shard-size",
        "100KB",
        "--checksums",
        "-q",
    )
    other = tmp_path / "elsewhere"
    other.mkdir()
    options = (
        "--max-shard-size",
        "100KB",
        "--checksums",
        "--copy-mode",
        mode,
        "--jobs",
        jobs,
        "-q",
    )
    assert dus("upscale", sharded, "-o", other / "second", *options).returncode == 0
    assert folder_digest(tmp_path / "first") == folder_digest(other / "second")


def test_one_file_and_five_shards_give_the_same_tensors(
    base: Path, sharded: Path, tmp_path: Path
) -> None:
    for source, out in ((base, "a"), (sharded, "b")):
        assert (
            dus(
                "upscale", source, "-o", tmp_path / out, "-q", "--max-shard-size", "60KB"
            ).returncode
            == 0
        )
    assert names_and_bytes(tmp_path / "a") == names_and_bytes(tmp_path / "b")


def test_shards_stay_under_the_size_and_the_index_names_every_tensor(
    sharded: Path, tmp_path: Path
) -> None:
    report = dus(
        "upscale", sharded, "-o", tmp_path / "out", "--max-shard-size", "100KB", "--json"
    ).report
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert len(report["shards"]) > 3
    total = len(report["shards"])
    assert [s["name"] for s in report["shards"]] == [
        f"model-{i:05}-of-{total:05}.safetensors" for i in range(1, total + 1)
    ]
    assert all(shard["bytes"] <= 100_000 for shard in report["shards"])
    assert index["metadata"] == {
        "total_size": report["bytes"],
        "total_parameters": report["parameters"]["output"],
    }
    assert list(index["weight_map"]) == sorted(names_and_bytes(tmp_path / "out"))
    for shard in report["shards"]:
        with safe_open(tmp_path / "out" / shard["name"], "np") as opened:
            assert opened.metadata() == {"format": "pt"}
            assert all(index["weight_map"][name] == shard["name"] for name in opened.keys())  # noqa: SIM118


def test_a_model_that_fits_is_one_file_without_an_index(sharded: Path, tmp_path: Path) -> None:
    dus("upscale", sharded, "-o", tmp_path / "out", "-q")
    assert (tmp_path / "out/model.safetensors").exists()
    assert not (tmp_path / "out/model.safetensors.index.json").exists()


@pytest.mark.parametrize("dtype", ["F32", "F16", "BF16", "F8_E4M3", "I8", "F4"])
def test_bytes_are_kept_whatever_the_dtype(tmp_path: Path, dtype: str) -> None:
    tensors = llama_tensors(4, dtype=dtype)
    source = write_checkpoint(
        tmp_path / "m", tensors, llama_config(4), fill=lambda _n, size: os.urandom(size)
    )
    assert (
        dus(
            "upscale", source, "-o", tmp_path / "out", "--trim", "1", "--verify", "full", "-q"
        ).returncode
        == 0
    )
    ours, theirs = names_and_bytes(tmp_path / "out"), names_and_bytes(source)
    for output, base_layer in enumerate((0, 1, 2, 1, 2, 3)):
        name = "mlp.up_proj.weight"
        assert ours[f"model.layers.{output}.{name}"] == theirs[f"model.layers.{base_layer}.{name}"]
        assert ours[f"model.layers.{output}.{name}"][0] == dtype


def test_mixed_dtypes_of_odd_sizes_stay_aligned_to_their_elements(tmp_path: Path) -> None:
    tensors = llama_tensors(5, hidden=12, intermediate=20, kv=4, vocab=7)
    for layer in range(5):
        tensors += [
            (f"model.layers.{layer}.scale", "F32", (3,)),
            (f"model.layers.{layer}.zeros", "U8", (5,)),
        ]
    source = write_checkpoint(tmp_path / "m", tensors, llama_config(5), num_shards=3)
    assert dus("upscale", source, "-o", tmp_path / "out", "--trim", "1", "-q").returncode == 0
    path = tmp_path / "out/model.safetensors"
    header = read_header(path)
    widths = {"F32": 4, "BF16": 2, "U8": 1}
    assert header.data_start % 8 == 0
    assert all((t.start - header.data_start) % widths[t.dtype] == 0 for t in header.tensors)


def test_metadata_of_the_source_is_kept_beside_the_format(tmp_path: Path) -> None:
    source = write_checkpoint(
        tmp_path / "m", llama_tensors(4), llama_config(4), metadata={"trained_by": "us"}
    )
    dus("upscale", source, "-o", tmp_path / "out", "-q")
    assert read_header(tmp_path / "out/model.safetensors").metadata == {
        "format": "pt",
        "trained_by": "us",
    }


def test_config_keeps_everything_but_the_depth(base: Path, tmp_path: Path) -> None:
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    before = json.loads((base / "config.json").read_text())
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert list(after) == list(before)
    assert after == before | {"num_hidden_layers": 12}


def test_other_files_come_along_and_other_weights_do_not(base: Path, tmp_path: Path) -> None:
    carried = [
        "tokenizer.json",
        "generation_config.json",
        "modeling_x.py",
        "LICENSE",
        "chat_templates/tool.jinja",
    ]
    left = [
        "pytorch_model.bin", "model.gguf", "original/params.json", "onnx/config.json", ".gitattributes",
        ".git/HEAD", "README.md", "tf_model.h5", "consolidated.safetensors", "adapter.pt", ".cache/x",
    ]  # fmt: skip
    for name in carried + left:
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(name)
    report = dus("upscale", base, "-o", tmp_path / "out", "--json").report
    written = {
        p.relative_to(tmp_path / "out").as_posix()
        for p in (tmp_path / "out").rglob("*")
        if p.is_file()
    }
    pictures = {"layer-map-light.svg", "layer-map-dark.svg"}
    assert written == {
        *carried,
        *pictures,
        "README.md",
        "dus.json",
        "config.json",
        "model.safetensors",
    }
    assert set(report["files"]) == set(carried)
    assert "not healed" in (tmp_path / "out/README.md").read_text()


def test_modes_follow_the_umask(base: Path, tmp_path: Path) -> None:
    (base / "tokenizer.json").write_text("{}")
    (base / "tokenizer.json").chmod(0o600)
    old = os.umask(0o027)
    try:
        dus("upscale", base, "-o", tmp_path / "out", "-q")
    finally:
        os.umask(old)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o750
    assert {path.stat().st_mode & 0o777 for path in (tmp_path / "out").iterdir()} == {0o640}


def test_lineage_tells_the_base_the_map_and_the_chain(base: Path, tmp_path: Path) -> None:
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "once", "-q")
    dus("upscale", tmp_path / "once", "--trim", "4", "-o", tmp_path / "twice", "-q")
    once = json.loads((tmp_path / "once/dus.json").read_text())
    twice = json.loads((tmp_path / "twice/dus.json").read_text())
    assert once["schema"] == 1
    assert once["base"]["path"] == str(base)
    assert (
        once["base"]["config_sha256"]
        == hashlib.sha256((base / "config.json").read_bytes()).hexdigest()
    )
    assert once["layer_map"] == [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    assert once["chain"] == []
    assert twice["chain"] == [{key: value for key, value in once.items() if key != "chain"}]
    assert len(twice["layer_map"]) == 16


def test_the_command_in_the_card_makes_the_same_bytes_again(sharded: Path, tmp_path: Path) -> None:
    dus(
        "upscale",
        sharded,
        "--copies",
        "3",
        "--max-shard-size",
        "100KB",
        "-o",
        tmp_path / "out",
        "-q",
    )
    card = (tmp_path / "out/README.md").read_text()
    (command,) = [line for line in card.splitlines() if line.startswith("dus upscale")]
    assert dus(*shlex.split(command)[1:], cwd=tmp_path).returncode == 0  # it writes to OUT
    assert folder_digest(tmp_path / "OUT") == folder_digest(tmp_path / "out")


def test_a_dus_of_a_dus_holds_the_layers_of_the_first_base(base: Path, tmp_path: Path) -> None:
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "once", "-q")
    dus("upscale", tmp_path / "once", "--trim", "3", "-o", tmp_path / "twice", "-q")
    once = [0, 1, 2, 3, 4, 5, 2, 3, 4, 5, 6, 7]
    twice = [*once[:9], *once[3:]]
    assert layer_bytes(tmp_path / "twice") == {j: {k} for j, k in enumerate(twice)}
    assert dus("verify", tmp_path / "twice", "--base", tmp_path / "once", "-q").returncode == 0


def test_three_copies_trim_at_each_seam(base: Path, tmp_path: Path) -> None:
    report = dus(
        "upscale", base, "--copies", "3", "--trim", "2", "-o", tmp_path / "out", "--json"
    ).report
    assert report["layer_map"] == [*range(6), *range(2, 6), *range(2, 8)]
    assert layer_bytes(tmp_path / "out") == {j: {k} for j, k in enumerate(report["layer_map"])}


def test_an_odd_map_is_written_as_typed_and_a_shallower_one_is_reported(
    base: Path, tmp_path: Path
) -> None:
    report = dus(
        "upscale", base, "--layers", "6:8,1,1,0:2", "-o", tmp_path / "out", "--json"
    ).report
    assert report["layer_map"] == [6, 7, 1, 1, 0, 1]
    assert report["trim"] is None
    assert layer_bytes(tmp_path / "out") == {j: {k} for j, k in enumerate(report["layer_map"])}
    assert any("not deeper than the base" in warning for warning in report["warnings"])
    assert dus("verify", tmp_path / "out", "--base", base, "-q").returncode == 0


def test_the_mistral_oracle_without_writing_a_byte(tmp_path: Path) -> None:
    """Mistral-7B-v0.1 at trim 8: 435 tensors, 10,731,524,096 parameters, 21,463,048,192 bytes."""
    source = write_mistral(tmp_path / "mistral", fill=None)  # a hole: 14.48 GB that take no disk
    report = dus(
        "upscale", source, "--trim", "8", "-o", tmp_path / "out", "--dry-run", "--json"
    ).report
    assert (report["tensors"], report["parameters"]["output"]) == (435, 10_731_524_096)
    assert report["bytes"] == 21_463_048_192
    assert report["num_layers"] == {"base": 32, "output": 48}
    assert report["seams"] == [{"output_layers": [23, 24], "base_layers": [23, 8], "distance": 15}]
    assert not (tmp_path / "out").exists()


def test_a_dry_run_writes_nothing_and_agrees_with_the_run(sharded: Path, tmp_path: Path) -> None:
    before = sorted(tmp_path.rglob("*"))
    options = ("--max-shard-size", "90KB", "--json", "-o", tmp_path / "out")
    plan = dus("upscale", sharded, *options, "--dry-run").report
    assert sorted(tmp_path.rglob("*")) == before
    done = dus("upscale", sharded, *options).report
    changing = {
        "dry_run",
        "status",
        "seconds",
        "bytes_cloned",
        "bytes_copied",
        "verified",
        "published",
        "space",
    }
    assert {k: v for k, v in plan.items() if k not in changing} == {
        k: v for k, v in done.items() if k not in changing
    }
    assert plan["dry_run"]
    assert plan["space"]["needed"] > 0


def test_the_same_command_again_leaves_a_finished_output_as_it_is(
    sharded: Path, tmp_path: Path
) -> None:
    command = ("upscale", sharded, "-o", tmp_path / "out", "--trim", "1")
    assert dus(*command, "--json").report["status"] == "written"
    before = {
        path: path.stat().st_mtime_ns for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]
    }
    again = dus(*command, "--json").report
    assert (again["status"], again["bytes_copied"]) == ("unchanged", 0)
    assert "nothing was done" in dus(*command).stdout
    assert any(
        "already what this" in warning
        for warning in dus(*command, "--dry-run", "--json").report["warnings"]
    )
    assert {
        path: path.stat().st_mtime_ns for path in [tmp_path / "out", *(tmp_path / "out").iterdir()]
    } == before
    assert dus(*command, "--verify", "full", "--json").report["status"] == "unchanged"


@pytest.mark.parametrize(
    "change", ["other options", "a shard is gone", "a byte is another", "no sums yet", "no record"]
)
def test_an_output_that_is_not_what_the_command_writes_is_in_the_way(
    change: str, sharded: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ["upscale", str(sharded), "-o", str(out), "-q"]
    assert dus(*command).returncode == 0
    shard = min(out.glob("*.safetensors"))
    if change == "other options":
        command += ["--trim", "1"]
    elif change == "a shard is gone":
        shard.unlink()
    elif change == "a byte is another":
        shard.write_bytes(shard.read_bytes()[:-1] + b"x")
        assert dus(*command).returncode == 0  # the headers are what they should be
        command += ["--verify", "full"]
    elif change == "no sums yet":
        command += ["--checksums"]
    else:
        (out / "dus.json").unlink()
    dus(*command).assert_one_line_error("not empty", "--overwrite")


def test_a_dry_run_warns_of_what_would_stop_the_run(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out/mine").write_text("x")
    report = dus("upscale", base, "-o", tmp_path / "out", "--dry-run", "--json").report
    assert any("not empty" in warning for warning in report["warnings"])


def test_sha256sum_accepts_the_sums_and_they_cover_every_file(base: Path, tmp_path: Path) -> None:
    (base / "a file.txt").write_text("x")
    dus("upscale", base, "-o", tmp_path / "out", "--checksums", "-q")
    done = subprocess.run(
        ["sha256sum", "-c", "--strict", "SHA256SUMS"],
        cwd=tmp_path / "out",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    files = {p.name for p in (tmp_path / "out").iterdir()}
    assert done.stdout.count(": OK") == len(files) - 1


def test_overwrite_replaces_an_output_and_without_it_the_output_stays(
    base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dus("upscale", base, "-o", out, "-q")
    first = folder_digest(out)
    dus("upscale", base, "-o", out, "--trim", "1", "-q").assert_one_line_error(
        "not empty", "--overwrite"
    )
    assert folder_digest(out) == first
    report = dus("upscale", base, "-o", out, "--trim", "1", "--overwrite", "--json").report
    assert report["num_layers"]["output"] == 14
    assert dus("verify", out, "--base", base, "-q").returncode == 0
    assert [p.name for p in tmp_path.iterdir() if p.name.startswith(".")] == []


def test_an_empty_directory_is_a_free_name(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").mkdir()
    assert dus("upscale", base, "-o", tmp_path / "out", "-q").returncode == 0


def test_quiet_says_nothing_and_json_says_only_json(base: Path, tmp_path: Path) -> None:
    quiet = dus("upscale", base, "-o", tmp_path / "a", "-q")
    assert (quiet.stdout, quiet.stderr) == ("", "")
    as_json = dus("upscale", base, "-o", tmp_path / "b", "--json")
    assert as_json.stderr == ""
    assert as_json.stdout.count("\n") == 1


def test_piped_output_is_plain_lines_with_results_on_stdout(base: Path, tmp_path: Path) -> None:
    done = dus("upscale", base, "-o", tmp_path / "out")
    assert "\x1b" not in done.stdout + done.stderr
    assert "\r" not in done.stdout + done.stderr
    assert "dus heal" in done.stdout
    assert "feeds layer" in done.stderr


def test_a_numbered_stack_keeps_numbers_of_experts(tmp_path: Path) -> None:
    tensors = llama_tensors(4)
    tensors += [
        (f"model.layers.{k}.mlp.experts.{e}.w.weight", "BF16", (8, 8))
        for k in range(4)
        for e in range(3)
    ]
    source = write_checkpoint(tmp_path / "m", tensors, llama_config(4), fill=fill_with_layer)
    assert dus("upscale", source, "--trim", "1", "-o", tmp_path / "out", "-q").returncode == 0
    names = names_and_bytes(tmp_path / "out")
    assert {f"model.layers.5.mlp.experts.{e}.w.weight" for e in range(3)} < set(names)
    assert names["model.layers.5.mlp.experts.2.w.weight"][2] == b"\3" * 128


def test_multi_token_prediction_layers_keep_their_place_after_the_last(tmp_path: Path) -> None:
    tensors = llama_tensors(5)  # layer 4 is the extra one
    config = llama_config(4) | {"num_nextn_predict_layers": 1}
    source = write_checkpoint(tmp_path / "m", tensors, config)
    report = dus("upscale", source, "--trim", "1", "-o", tmp_path / "out", "--json").report
    assert any("multi-token-prediction" in warning for warning in report["warnings"])
    assert layer_bytes(tmp_path / "out") == {0: {0}, 1: {1}, 2: {2}, 3: {1}, 4: {2}, 5: {3}, 6: {4}}


def test_encoders_of_a_multimodal_model_stay_as_they_are(tmp_path: Path) -> None:
    tensors = [(f"language_model.{t[0]}", t[1], t[2]) for t in llama_tensors(4)]
    tensors += [(f"vision_tower.encoder.layers.{k}.w.weight", "BF16", (8,)) for k in range(4)]
    config = {
        "model_type": "llava",
        "text_config": llama_config(4),
        "vision_config": {"num_hidden_layers": 4},
    }
    source = write_checkpoint(tmp_path / "m", tensors, config)
    assert dus("upscale", source, "--trim", "1", "-o", tmp_path / "out", "-q").returncode == 0
    after = json.loads((tmp_path / "out/config.json").read_text())
    assert after["text_config"]["num_hidden_layers"] == 6
    assert after["vision_config"] == {"num_hidden_layers": 4}
    vision = {name for name in names_and_bytes(tmp_path / "out") if name.startswith("vision_tower")}
    assert len(vision) == 4
    assert len(layer_bytes(tmp_path / "out", "language_model.model.layers")) == 6


def test_a_folder_whose_name_is_not_utf8_is_deepened_verified_and_named_by_its_bytes(
    base: Path, tmp_path: Path
) -> None:
    strange = base.rename(tmp_path / os.fsdecode(b"caf\xe9"))
    out = tmp_path / os.fsdecode(b"d\xe9eper")
    report = dus("upscale", strange, "-o", out, "--json", "--checksums").report
    assert report["status"] == "written"
    assert dus("verify", out, "--base", strange, "-q").returncode == 0
    assert (
        dus("upscale", strange, "-o", out, "--checksums", "--json").report["status"] == "unchanged"
    )
    assert "caf\\udce9" in (out / "README.md").read_text(encoding="utf-8")
    assert "\\udc" not in (out / "dus.json").read_text(encoding="utf-8").replace("\\\\udc", "")
