"""Faults and bad input: one clear line, nothing lost, nothing half-written."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import struct
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from checkpoints import (
    Tensor,
    fill_randomly,
    header_bytes,
    llama_config,
    llama_tensors,
    write_checkpoint,
)
from conftest import DUS
from forked import dus

from dus_cli.common.reference import ModelRef
from dus_cli.errors import CheckpointError, DusError, OutputError
from dus_cli.planning.plan import MapRequest
from dus_cli.progress import NoProgress, PlannedUpscale, Progress
from dus_cli.upscaling import space, verb
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.request import UpscaleRequest
from dus_cli.verification.planned import VerifyMode
from dus_cli.writing import staging, transfer
from dus_cli.writing.staging import Staging


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """About 130 MB: writing it takes long enough to be interrupted."""
    tensors = llama_tensors(8, hidden=1024, intermediate=2048, kv=256, vocab=256)
    return write_checkpoint(
        tmp_path_factory.mktemp("large") / "base", tensors, llama_config(8), fill=fill_randomly
    )


def start(*arguments: str | Path) -> subprocess.Popen[str]:
    command = [*DUS, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def beside(out: Path) -> list[str]:
    """What a run may have left in the parent directory."""
    return sorted(p.name for p in out.parent.iterdir() if p.name.startswith("."))


# --- killed, interrupted, raced ------------------------------------------------------------------


def test_kill_9_at_50_moments_leaves_nothing_half_written_and_a_rerun_succeeds(
    large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("upscale", large, "-o", out, "--copy-mode", "copy", "-q")
    before = time.monotonic()
    assert dus(*command).returncode == 0
    duration = time.monotonic() - before
    shutil.rmtree(out)
    rng = random.Random(50)
    left = 0
    for moment in range(50):
        process = start(*command)
        if moment % 2:  # from the first byte on, however long this machine takes to come to it
            while process.poll() is None and not beside(out):
                time.sleep(0.001)
        time.sleep(
            rng.uniform(0, duration * 1.1) if moment % 2 == 0 else rng.uniform(0, duration / 10)
        )
        process.kill()
        process.communicate()
        left += bool(beside(out))
        if out.exists():  # then it is whole
            assert dus("verify", out, "--base", large, "-q").returncode == 0
            shutil.rmtree(out)
    assert left, "no kill hit the writing: the test shows nothing"
    assert dus(*command).returncode == 0
    assert dus("verify", out, "--base", large, "-q").returncode == 0
    assert beside(out) == []


def test_kill_9_while_overwriting_leaves_the_old_or_the_new_one_whole(
    large: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    command = ("upscale", large, "-o", out, "--overwrite", "--copy-mode", "copy", "-q")
    before = time.monotonic()
    assert dus(*command, "--trim", "1").returncode == 0
    duration = time.monotonic() - before
    rng = random.Random(7)
    for _ in range(12):
        process = start(*command, "--trim", rng.choice("0123"))
        time.sleep(rng.uniform(duration / 2, duration * 1.2))
        process.kill()
        process.communicate()
        assert dus("verify", out, "--base", large, "-q").returncode == 0
    assert dus(*command).returncode == 0
    assert beside(out) == []


@pytest.mark.parametrize(
    ("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143), (signal.SIGHUP, 129)], ids=str
)
def test_a_signal_cleans_up_and_exits_with_its_code(
    large: Path, tmp_path: Path, signum: int, code: int
) -> None:
    out = tmp_path / "out"
    process = start(
        "upscale", large, "-o", out, "--copy-mode", "copy", "--verify", "full", "--checksums", "-q"
    )
    while not beside(out):
        time.sleep(0.001)
        assert process.poll() is None
    process.send_signal(signum)
    stdout, stderr = process.communicate()
    assert process.returncode == code, stderr
    assert stdout == ""
    assert stderr.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_signal_between_making_the_folder_and_locking_it_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: object) -> None:
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(Staging, "_lock", interrupted)
    with pytest.raises(KeyboardInterrupt):
        Staging(tmp_path / "out", overwrite=False).__enter__()
    assert list(tmp_path.iterdir()) == []


def test_of_two_runs_at_once_one_wins_and_the_other_says_so(large: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    processes = [start("upscale", large, "-o", out, "--copy-mode", "copy", "-q") for _ in range(4)]
    ends = [(process.communicate()[1], process.returncode) for process in processes]
    # 0 also for one that came when all was done, and found it so
    assert {code for _, code in ends} <= {0, 1}
    assert any(code == 0 for _, code in ends)
    for stderr, code in ends:
        if code:
            assert stderr.count("\n") == 1
            assert "another run is writing" in stderr or "not empty" in stderr
    assert dus("verify", out, "--base", large, "-q").returncode == 0
    assert beside(out) == []


def test_what_a_killed_run_left_is_cleared_by_the_next(base: Path, tmp_path: Path) -> None:
    left = tmp_path / ".out.partial"
    (left / "deep").mkdir(parents=True)
    (left / "deep/model.safetensors").write_text("half")
    (left / staging.MARK).touch()  # as dus leaves it
    assert dus("upscale", base, "-o", tmp_path / "out", "-q").returncode == 0
    assert not (tmp_path / "out/deep").exists()
    assert beside(tmp_path / "out") == []


def test_a_replacement_killed_between_two_renames_is_undone(base: Path, tmp_path: Path) -> None:
    """On file systems that cannot exchange names: OUT was moved aside and its successor is not
    there.
    """
    assert dus("upscale", base, "-o", tmp_path / "out", "-q").returncode == 0
    (tmp_path / "out").rename(tmp_path / ".out.replaced")
    dus("upscale", base, "-o", tmp_path / "out", "-q").assert_one_line_error("not empty")
    assert beside(tmp_path / "out") == []


def test_where_names_cannot_be_exchanged_two_renames_do(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    run_verb(base, out)
    monkeypatch.setattr(staging, "_exchange", lambda *_: False)
    run_verb(base, out, trim=1, overwrite=True)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 14
    assert beside(out) == []


# --- the disk ------------------------------------------------------------------------------------


def run_verb(
    base: Path,
    out: Path,
    *,
    trim: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> None:
    verb.upscale(
        UpscaleRequest(ModelRef(str(base), path=base), MapRequest(trim)),
        out,
        UpscaleOptions(**options),
        progress=progress,
    )


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A tmpfs of 20 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", folder],
        capture_output=True,
        check=False,
    )
    if mounted.returncode:
        pytest.skip("mounting needs root")
    yield folder
    subprocess.run(["umount", folder], check=True)


def test_a_disk_too_small_is_refused_before_the_first_byte(large: Path, small_disk: Path) -> None:
    dus("upscale", large, "-o", small_disk / "out", "-q").assert_one_line_error("needs", "free")
    assert list(small_disk.iterdir()) == []


def test_a_disk_that_fills_midway_is_one_line_and_nothing_stays(
    large: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(space, "free_bytes", lambda _: 10**12)
    with pytest.raises(OutputError, match="No space left on device"):
        run_verb(large, small_disk / "out")
    assert list(small_disk.iterdir()) == []


def test_a_read_only_parent_is_one_line(base: Path, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", small_disk], check=True)
    dus("upscale", base, "-o", small_disk / "out", "-q").assert_one_line_error(
        "cannot be written to"
    )


def test_a_missing_parent_is_one_line(base: Path, tmp_path: Path) -> None:
    dus("upscale", base, "-o", tmp_path / "no/such/out", "-q").assert_one_line_error("mkdir -p")
    assert not (tmp_path / "no").exists()


def test_the_output_is_apart_from_the_model_and_the_current_directory(
    base: Path, tmp_path: Path
) -> None:
    for out in (base, base / "out"):
        dus("upscale", base, "-o", out, "--overwrite", "-q").assert_one_line_error(
            "contain each other"
        )
    dus("upscale", base, "-o", tmp_path, "--overwrite", "-q").assert_one_line_error(
        "holds base/config.json"
    )
    (tmp_path / "here").mkdir()
    dus("upscale", base, "-o", ".", "-q", cwd=tmp_path / "here").assert_one_line_error(
        "holds the current directory"
    )
    assert len(list(base.iterdir())) == 2


def test_an_output_that_is_a_file_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "out").write_text("mine")
    dus("upscale", base, "-o", tmp_path / "out", "--overwrite", "-q").assert_one_line_error(
        "not a directory"
    )
    assert (tmp_path / "out").read_text() == "mine"


class Meddler(NoProgress):
    """Does something to the source at the first bytes written."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.actions = [action]

    def planned(self, plan: PlannedUpscale) -> None:
        pass

    def advance(self, num_bytes: int) -> None:  # noqa: ARG002  (the protocol's name)
        with contextlib.suppress(IndexError):  # called from several threads: only one gets it
            self.actions.pop()()


@pytest.mark.parametrize("fault", ["truncated", "rewritten", "replaced"])
def test_a_source_that_changes_meanwhile_is_noticed(
    large: Path, tmp_path: Path, fault: str
) -> None:
    source = tmp_path / "base"
    shutil.copytree(large, source)
    shard = source / "model.safetensors"

    def meddle() -> None:
        if fault == "truncated":
            os.truncate(shard, 1 << 20)
        elif fault == "rewritten":
            with shard.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
        else:
            shutil.copyfile(shard, tmp_path / "other")
            (tmp_path / "other").rename(shard)

    with pytest.raises(CheckpointError, match=r"became shorter|changed while it was read"):
        run_verb(
            source, tmp_path / "out", progress=Meddler(meddle), copy_mode=transfer.CopyMode.copy
        )
    assert not (tmp_path / "out").exists()
    assert beside(tmp_path / "out") == []


def test_a_disk_error_in_the_source_is_one_line(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    monkeypatch.setattr(os, "preadv", broken)
    with pytest.raises(CheckpointError, match="Input/output error"):
        run_verb(base, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert beside(tmp_path / "out") == []


def test_a_disk_that_loses_what_was_written_is_noticed_before_publishing(
    base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = os.pwrite
    monkeypatch.setattr(os, "pwrite", lambda file, data, at: real(file, bytes(len(data)), at))
    with pytest.raises(DusError, match="differs from its source"):
        run_verb(base, tmp_path / "out", verify=VerifyMode.full)
    assert not (tmp_path / "out").exists()


# --- bad checkpoints -----------------------------------------------------------------------------


def refuse(folder: Path, *parts: str) -> None:
    """The command ends with one line, and leaves neither an output nor anything beside it."""
    out = folder.parent / "out"
    dus("upscale", folder, "-o", out, "-q").assert_one_line_error(*parts)
    assert not out.exists()
    assert beside(out) == []


def test_a_map_that_is_not_valid_is_refused(base: Path, tmp_path: Path) -> None:
    out = ("-o", tmp_path / "out")
    dus("upscale", base, "--trim", "4", *out).assert_one_line_error(
        "would leave 8 of 8 layers", "use 0 to 3"
    )
    dus("upscale", base, "--layers", "0:9", *out).assert_one_line_error("beyond the base")
    dus("upscale", base, "--layers", "0-9", *out).assert_one_line_error("half-open", code=2)
    dus("upscale", base, "--layers", "0:8", "--trim", "1", *out).assert_one_line_error(
        "--layers", code=2
    )
    dus("upscale", base, "--trim", "-1", *out).assert_one_line_error("--trim", code=2)
    dus("upscale", base, "--copies", "1", *out).assert_one_line_error("--copies", code=2)
    dus("upscale", base, "--max-shard-size", "5 parsecs", *out).assert_one_line_error(
        "5 parsecs", code=2
    )
    dus("upscale", base).assert_one_line_error("--output", code=2)
    dus("upscale", base, "--nonsense", *out).assert_one_line_error("--nonsense", code=2)
    assert not (tmp_path / "out").exists()


def test_what_is_no_decoder_checkpoint_is_named(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    refuse(folder, "does not exist", "org/name")
    folder.mkdir()
    refuse(folder, "no config.json")
    (folder / "model-q4.gguf").touch()
    refuse(folder, "GGUF")
    (folder / "adapter_config.json").write_text("{}")
    refuse(folder, "adapter (LoRA)", "merge")
    (folder / "adapter_config.json").unlink()
    (folder / "model_index.json").write_text("{}")
    refuse(folder, "diffusion pipeline")
    (folder / "config.json").write_text(json.dumps(llama_config(4)))
    refuse(folder, "GGUF", "safetensors")
    (folder / "model-q4.gguf").unlink()
    (folder / "consolidated.00.pth").touch()
    refuse(folder, "pickled weights (*.pth)", "save_pretrained")
    (folder / "pytorch_model-00001-of-00002.bin").touch()
    refuse(folder, "pytorch_model.bin.index.json", "the index is missing")
    (folder / "config.json").write_text(
        json.dumps({"is_encoder_decoder": True, "architectures": ["T5Model"]})
    )
    refuse(folder, "encoder-decoder", "T5Model")
    (folder / "config.json").write_text(
        json.dumps({"architectures": ["BertForMaskedLM"], "num_hidden_layers": 2})
    )
    refuse(folder, "an encoder", "BertForMaskedLM")


def test_an_encoder_is_told_by_its_tensors(tmp_path: Path) -> None:
    tensors: list[Tensor] = [(f"bert.encoder.layer.{k}.w.weight", "BF16", (4,)) for k in range(2)]
    refuse(
        write_checkpoint(tmp_path / "m", tensors, {"num_hidden_layers": 2}),
        "bert.encoder.layer",
        "encoder",
    )


def test_damaged_json_is_named(base: Path) -> None:
    for raw, part in (
        (b"{", "not valid JSON"),
        (b"[1]", "not an object"),
        (b"\xff\xfe{", "not UTF-8"),
    ):
        (base / "config.json").write_bytes(raw)
        refuse(base, "config.json", part)


def test_json_nested_deeper_than_any_config_is_refused(base: Path) -> None:
    config = json.loads((base / "config.json").read_text())
    nested: list[Any] = []
    for _ in range(400):  # the parser takes this much, a writer that recurses does not
        nested = [nested]
    (base / "config.json").write_text(json.dumps(config | {"quantization_config": {"x": nested}}))
    refuse(base, "config.json is nested more deeply")


def test_an_index_may_not_lead_outside_the_folder(sharded: Path, tmp_path: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    first = next(iter(index["weight_map"]))
    secret = tmp_path / "secret.safetensors"
    shutil.copyfile(sharded / index["weight_map"][first], secret)
    for name in ("../secret.safetensors", str(secret)):
        path.write_text(json.dumps({"weight_map": index["weight_map"] | {first: name}}))
        refuse(sharded, "outside the model's folder")
    (sharded / "link.safetensors").symlink_to(secret)
    path.write_text(json.dumps({"weight_map": index["weight_map"] | {first: "link.safetensors"}}))
    refuse(sharded, "leaves the model's folder")


def test_a_small_file_that_links_outside_is_refused(base: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (base / "tokenizer.json").symlink_to(tmp_path / "secret")
    refuse(base, "tokenizer.json", "leaves the model's folder")


def test_links_into_the_hubs_blobs_are_fine(base: Path, tmp_path: Path) -> None:
    repo = tmp_path / "models--org--name"
    snapshot = repo / "snapshots" / ("0" * 40)
    snapshot.mkdir(parents=True)
    (repo / "blobs").mkdir()
    for number, path in enumerate(sorted(base.iterdir())):
        shutil.copyfile(path, repo / "blobs" / str(number))
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    assert dus("upscale", snapshot, "-o", tmp_path / "out", "-q").returncode == 0
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())


def test_an_index_names_shards_that_are_there_and_no_tensor_is_in_two(sharded: Path) -> None:
    path = sharded / "model.safetensors.index.json"
    original = path.read_text()
    weight_map: dict[str, str] = json.loads(original)["weight_map"]
    files = sorted(set(weight_map.values()))
    cases: list[tuple[dict[str, str], str]] = [
        (weight_map | {"lm_head.weight": "model-9.safetensors"}, "missing from"),
        (weight_map | {"lm_head.weight": "pytorch_model.bin"}, "not a safetensors file"),
        ({}, "no weight_map"),
    ]
    for changed, part in cases:
        path.write_text(json.dumps({"weight_map": changed}))
        refuse(sharded, part)
    path.write_text(original)
    shutil.copyfile(sharded / files[0], sharded / files[1])
    refuse(sharded, "two shards")


def test_layers_missing_beyond_the_depth_or_twice_are_named(tmp_path: Path) -> None:
    def refuse_tensors(tensors: list[Tensor], *parts: str) -> None:
        folder = tmp_path / "m"
        shutil.rmtree(folder, ignore_errors=True)
        refuse(write_checkpoint(folder, tensors, llama_config(4)), *parts)

    tensors = llama_tensors(4)
    refuse_tensors([t for t in tensors if ".layers.2." not in t[0]], "lacks layer 2")
    refuse_tensors(llama_tensors(5), "model.layers.4", "beyond the 4 layers")
    second = [(f"transformer.h.{k}.w", "BF16", (4,)) for k in range(4)]
    refuse_tensors([*tensors, *second], "several layer stacks", "transformer.h")
    table = [(f"model.scales.{k}.w", "BF16", (4,)) for k in range(4)]
    refuse_tensors([*tensors, *table], "model.scales", "does not know")


def test_a_truncated_shard_is_named(sharded: Path) -> None:
    shard = sorted(sharded.glob("*.safetensors"))[2]
    os.truncate(shard, shard.stat().st_size - 1)
    refuse(sharded, shard.name, "truncated")


def test_a_shard_of_2_to_the_60_takes_no_memory(base: Path) -> None:
    (base / "model.safetensors").write_bytes(struct.pack("<Q", 2**60) + b"{}")
    refuse(base, "over the format's limit")


def test_names_that_would_harm_a_terminal_are_shown_harmless(base: Path) -> None:
    name = "model.layers.0.\x1b[31m" + "x" * 10_000
    raw = header_bytes({name: {"dtype": "F33", "shape": [], "data_offsets": [0, 0]}})
    (base / "model.safetensors").write_bytes(raw)
    done = dus("upscale", base, "-o", base.parent / "out", "-q")
    done.assert_one_line_error("\\x1b[31m", "F33")
    assert "\x1b" not in done.stderr
    assert len(done.stderr) < 700


def test_a_closed_pipe_is_quiet(base: Path, tmp_path: Path) -> None:
    command = f"{' '.join(DUS)} upscale {base} -o {tmp_path / 'out'} --dry-run --json | true"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert done.stderr == ""
