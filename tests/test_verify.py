"""`dus verify`: it finds a single flipped bit, and every problem that there is."""

from __future__ import annotations

import hashlib
import json
import random
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from forked import dus
from written import flip_bit, problems, tensor_at

from dus_cli import upscale
from dus_cli.release import checksums
from dus_cli.source.headers import TensorInfo, read_header
from dus_cli.writing.ordered import OrderedFile


@pytest.fixture
def random_base(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "base", llama_tensors(6), llama_config(6), num_shards=2, fill=fill_randomly
    )


@pytest.fixture
def out(random_base: Path, tmp_path: Path) -> Path:
    options = ("--trim", "1", "--max-shard-size", "200KB", "-q")
    assert dus("upscale", random_base, "-o", tmp_path / "out", *options).returncode == 0
    return tmp_path / "out"


def test_a_fresh_output_is_sound(out: Path, random_base: Path) -> None:
    assert problems(out) == []
    assert problems(out, "--base", random_base) == []


def test_an_ordinary_checkpoint_is_sound_with_a_warning(random_base: Path) -> None:
    done = dus("verify", random_base)
    assert done.returncode == 0
    assert "no dus.json" in done.stdout


@pytest.mark.parametrize("seed", range(8))
def test_one_flipped_bit_in_a_duplicated_tensor_is_found(out: Path, seed: int) -> None:
    rng = random.Random(seed)
    # Base layers 1 to 4 stand twice: output layers 1-4 and 5-8.
    suffix = rng.choice(["mlp.down_proj", "input_layernorm", "self_attn.k_proj"])
    name = f"model.layers.{rng.randrange(1, 9)}.{suffix}.weight"
    path, tensor = tensor_at(out, name)
    flip_bit(path, rng.randrange(tensor.start, tensor.end), rng.randrange(8))
    (problem,) = problems(out)
    assert "differs from its twin" in problem


@pytest.mark.parametrize(
    "name", ["model.embed_tokens.weight", "model.layers.0.mlp.up_proj.weight", "lm_head.weight"]
)
def test_one_flipped_bit_in_any_tensor_is_found_with_the_base(
    out: Path, random_base: Path, name: str
) -> None:
    path, tensor = tensor_at(out, name)
    flip_bit(path, tensor.end - 1, 7)
    assert problems(out) == []  # it stands once: only the base can tell
    (problem,) = problems(out, "--base", random_base)
    assert name in problem
    assert "differs from the base's" in problem


def test_one_flipped_bit_is_found_by_the_checksums(random_base: Path, tmp_path: Path) -> None:
    dus("upscale", random_base, "-o", tmp_path / "summed", "--checksums", "-q")
    assert problems(tmp_path / "summed") == []
    path, tensor = tensor_at(tmp_path / "summed", "model.norm.weight")
    flip_bit(path, tensor.start)
    (problem,) = problems(tmp_path / "summed")
    assert "SHA256SUMS" in problem


@pytest.mark.parametrize("size", ["200KB", "5GB"])
def test_what_is_copied_is_summed_while_it_is_written(
    random_base: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, size: str
) -> None:
    read: list[str] = []
    file_sum = checksums.file_sum

    def summing(path: Path, stop: threading.Event) -> str:
        read.append(path.name)
        return file_sum(path, stop)

    monkeypatch.setattr(checksums, "file_sum", summing)
    out = tmp_path / "summed"
    upscale(random_base, out, max_shard_size=size, copy_mode="copy", checksums=True)
    assert not any(name.endswith(".safetensors") for name in read)
    lines = (out / "SHA256SUMS").read_text().splitlines()
    sums = {name: total for total, name in (line.split("  ") for line in lines)}
    written = {
        path.name: hashlib.sha256(path.read_bytes()).hexdigest()
        for path in out.glob("*.safetensors")
    }
    assert {name: sums[name] for name in written} == written
    upscale(random_base, tmp_path / "not-summed", max_shard_size=size, copy_mode="copy")
    for name in written:
        assert (tmp_path / "not-summed" / name).read_bytes() == (out / name).read_bytes()


def test_a_file_that_draws_on_many_shards_has_one_of_them_open(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base", llama_tensors(40, 16, 32, 16, 64), llama_config(40), num_shards=120
    )
    command = Path(sys.executable).with_name("dus")
    options = ["-o", f"{tmp_path}/out", "--checksums", "--copy-mode", "copy", "-q"]
    limited = [
        "sh",
        "-c",
        'ulimit -n 64; exec "$@"',
        "sh",
        f"{command}",
        "upscale",
        f"{base}",
        *options,
    ]
    done = subprocess.run(limited, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("direct", [True, False])
def test_a_file_written_in_order_has_its_bytes_and_their_sum(
    tmp_path: Path, *, direct: bool
) -> None:
    content = random.Random(7).randbytes(5_000_001)
    with OrderedFile(tmp_path / "file", direct=direct) as file:
        for start in range(0, len(content), 1_234_567):
            file.write(content[start : start + 1_234_567])
        assert file.finish() == hashlib.sha256(content).hexdigest()
    assert (tmp_path / "file").read_bytes() == content
    with OrderedFile(tmp_path / "empty", direct=direct) as file:
        assert file.finish() == hashlib.sha256(b"").hexdigest()


def test_every_problem_is_listed(out: Path) -> None:
    shards = sorted(out.glob("*.safetensors"))
    shards[0].write_bytes(shards[0].read_bytes()[:-1])
    path, tensor = tensor_at_in(shards[1:])
    flip_bit(path, tensor.start)
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 11}))
    found = "\n".join(problems(out))
    assert "truncated" in found
    assert "counts 11 layers, dus.json 10" in found
    assert "differs from its twin" in found


def tensor_at_in(paths: list[Path]) -> tuple[Path, TensorInfo]:
    for path in paths:
        for tensor in read_header(path).tensors:
            if ".layers.2." in tensor.name:
                return path, tensor
    raise LookupError


def test_a_missing_shard_is_named(out: Path) -> None:
    victim = sorted(out.glob("*.safetensors"))[1]
    victim.unlink()
    assert any(victim.name in problem for problem in problems(out))


def test_an_index_that_lies_is_found(out: Path) -> None:
    path = out / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    index["weight_map"]["model.layers.0.ghost.weight"] = next(iter(index["weight_map"].values()))
    index["metadata"]["total_size"] += 1
    path.write_text(json.dumps(index))
    found = "\n".join(problems(out))
    assert "ghost" in found
    assert "total_size" in found


def test_a_config_that_differs_from_the_base_is_named_by_its_field(
    out: Path, random_base: Path
) -> None:
    config = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1.0}))
    assert problems(out) == []
    (problem,) = problems(out, "--base", random_base)
    assert "rms_norm_eps" in problem


def test_another_base_is_no_base(out: Path, tmp_path: Path) -> None:
    other = write_checkpoint(tmp_path / "other", llama_tensors(6), llama_config(6))
    assert len(problems(out, "--base", other)) == 10 * 9 + 3


def test_a_hostile_lineage_is_a_problem_and_no_traceback(out: Path) -> None:
    for record in (
        "[]",
        "{",
        '{"schema": 99}',
        '{"schema": 1}',
        '{"schema": 1, "layer_map": [999], "num_layers": 1}',
    ):
        (out / "dus.json").write_text(record)
        assert problems(out)


def test_a_sums_file_cannot_lead_outside(out: Path, tmp_path: Path) -> None:
    (tmp_path / "secret").write_text("x")
    (out / "SHA256SUMS").write_text("0" * 64 + "  ../secret\n" + "nonsense\n")
    found = "\n".join(problems(out))
    assert "outside the model's folder" in found
    assert "nonsense" in found


def test_what_is_no_directory_is_one_line(tmp_path: Path) -> None:
    dus("verify", tmp_path / "nowhere").assert_one_line_error("not a directory")
