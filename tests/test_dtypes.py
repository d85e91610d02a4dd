"""`--dtype`: the numbers that torch would give, everything else as it is, and no torch where
nothing changes.
"""

from __future__ import annotations

import json
import os
import random
import struct
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Tensor, llama_config, llama_tensors, write_checkpoint
from forked import dus_with_torch as dus
from imports import imported_by
from written import flip_bit, folder_digest, names_and_bytes, problems, tensor_at

from dus_cli.api import plan
from dus_cli.common.reference import ModelRef
from dus_cli.heal.options import MasterWeights
from dus_cli.models.precision import Precision
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import Base, MapRequest, make_plan
from dus_cli.source.checkpoint import open_checkpoint
from dus_cli.verification.planned import check_bytes_against_plan
from dus_cli.writing import transfer

torch = pytest.importorskip("torch")

TORCH = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
STORED = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}

# Ties, subnormals, the largest finite numbers and those that round to infinity, both infinities,
# NaNs with payloads.
EDGES = [
    0x00000000, 0x80000000, 0x3F808000, 0x3F818000, 0x3F808001, 0x3F807FFF, 0x00000001, 0x80000001, 0x007FFFFF,
    0x7F7F7FFF, 0x7F800000, 0xFF800000, 0x7F800001, 0x7FC12345, 0xFFFFFFFF, 0x33000000, 0x33000001, 0x387FC000,
    0x38800000, 0x477FE000, 0x477FEFFF, 0x3F801000, 0x3F803000, 0x7FBFFFFF, 0x00010000, 0x00008000, 0x00018000,
]  # fmt: skip


def numbers(dtype: str, size: int, *, fits: str) -> bytes:
    """`size` bytes: every pattern of two bytes, or edges and random ones; finite ones fit the
    dtype `fits`.
    """
    count = size * 8 // {"F64": 64, "F32": 32, "F16": 16, "BF16": 16}[dtype]
    if dtype in {"F16", "BF16"}:
        patterns = torch.arange(count).to(torch.int32).bitwise_and(0xFFFF).to(torch.uint16)
        values = patterns.view(TORCH[dtype])
    else:
        rng = random.Random(size)
        words = [*EDGES, *(rng.getrandbits(32) for _ in range(4096))]
        raw = struct.pack(f"<{len(words)}I", *words)
        values = (
            torch.frombuffer(bytearray(raw), dtype=torch.float32)
            .repeat(count // len(words) + 1)[:count]
            .clone()
        )
        values = values.to(TORCH[dtype])
    too_large = values.isfinite() & ~values.to(TORCH[fits]).isfinite()
    values[too_large] = 1.0
    raw_bytes: bytes = values.contiguous().view(torch.uint8).numpy().tobytes()
    return raw_bytes


def source(folder: Path, dtype: str, fits: str, **options: Any) -> Path:
    """Four layers in this dtype, integers and a boolean among them."""
    tensors = llama_tensors(4, dtype=dtype, vocab=1024)
    others: list[Tensor] = [
        ("model.steps", "I64", (3,)),
        ("model.layers.0.self_attn.mask", "U8", (5,)),
    ]
    dtypes = {name: kind for name, kind, _ in [*tensors, *others]}

    def fill(name: str, size: int) -> bytes:
        return numbers(dtype, size, fits=fits) if dtypes[name] in TORCH else os.urandom(size)

    return write_checkpoint(folder, [*tensors, *others], llama_config(4), fill=fill, **options)


def cast_by_torch(data: bytes, source_dtype: str, dtype: str) -> bytes:
    """Torch's numbers. Which of the many NaNs it gives depends on the CPU: dus always writes
    torch.nan.
    """
    values = torch.frombuffer(bytearray(data), dtype=TORCH[source_dtype]).to(TORCH[dtype])
    values[values.isnan()] = torch.nan
    raw: bytes = values.view(torch.uint8).numpy().tobytes()
    return raw


@pytest.mark.parametrize("stored", ["F64", "F32", "F16", "BF16"])
@pytest.mark.parametrize("dtype", sorted(STORED))
def test_every_number_is_the_one_that_torch_gives(tmp_path: Path, stored: str, dtype: str) -> None:
    base = source(tmp_path / "base", stored, STORED[dtype], num_shards=2)
    options = ("--trim", "1", "--dtype", dtype, "--max-shard-size", "200KB", "--verify", "full")
    report = dus("upscale", base, *options, "-o", tmp_path / "out", "--json").report
    ours, theirs = names_and_bytes(tmp_path / "out"), names_and_bytes(base)
    for name, (kind, shape, data) in ours.items():
        parts = name.split(".")
        if parts[1] == "layers":
            parts[2] = str((0, 1, 2, 1, 2, 3)[int(parts[2])])
        base_kind, base_shape, base_data = theirs[".".join(parts)]
        assert shape == base_shape
        assert kind == (STORED[dtype] if base_kind in TORCH else base_kind)
        assert data == (
            cast_by_torch(base_data, base_kind, kind) if kind != base_kind else base_data
        ), name
    assert report["bytes"] == sum(len(data) for _, _, data in ours.values())
    done = sum(report[f"bytes_{how}"] for how in ("cloned", "copied", "cast", "zeros"))
    assert done == report["bytes"]
    assert (report["bytes_cast"] == 0) == (stored == STORED[dtype])


@pytest.mark.parametrize("shift", [1, 2, 4, 12])
def test_numbers_at_odd_places_of_the_file_are_cast_too(tmp_path: Path, shift: int) -> None:
    """A header of any length is valid: numbers then start at no multiple of their size."""
    base = source(tmp_path / "base", "F32", "BF16")
    path = base / "model.safetensors"
    raw = path.read_bytes()
    (length,) = struct.unpack("<Q", raw[:8])
    path.write_bytes(
        struct.pack("<Q", length + shift) + raw[8 : 8 + length] + b" " * shift + raw[8 + length :]
    )
    dus("upscale", base, "--dtype", "bfloat16", "-o", tmp_path / "out", "-q")
    ours, theirs = names_and_bytes(tmp_path / "out"), names_and_bytes(base)
    for name in ("model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"):
        assert ours[name][2] == cast_by_torch(theirs[name][2], "F32", "BF16")
    assert problems(tmp_path / "out", "--base", base) == []


def test_a_tensor_of_many_pieces_is_cast_by_many_jobs_to_the_same_bytes(tmp_path: Path) -> None:
    # embeddings of 77 MB: two moves, 19 pieces
    tensors = llama_tensors(3, vocab=300_001, dtype="F32", tied=True)

    def fill(_name: str, size: int) -> bytes:
        return numbers("F32", size, fits="BF16")

    base = write_checkpoint(tmp_path / "base", tensors, llama_config(3, vocab=300_001), fill=fill)
    for jobs in ("1", "4"):
        dus(
            "upscale",
            base,
            "--trim",
            "1",
            "--dtype",
            "bfloat16",
            "--jobs",
            jobs,
            "-o",
            tmp_path / jobs,
            "-q",
        )
    assert folder_digest(tmp_path / "1") == folder_digest(tmp_path / "4")
    assert problems(tmp_path / "4", "--base", base) == []


@pytest.mark.parametrize(
    ("config", "after"),
    [
        ({"torch_dtype": "float32"}, {"torch_dtype": "bfloat16"}),
        ({"dtype": "float32"}, {"dtype": "bfloat16"}),
        ({}, {"dtype": "bfloat16"}),
        ({"torch_dtype": None}, {"torch_dtype": None, "dtype": "bfloat16"}),
        (
            {
                "dtype": "float32",
                "vision_config": {"torch_dtype": "float32", "inner": {"dtype": "float16"}},
            },
            {
                "dtype": "bfloat16",
                "vision_config": {"torch_dtype": "bfloat16", "inner": {"dtype": "bfloat16"}},
            },
        ),
    ],
)
def test_the_config_says_the_new_dtype(
    tmp_path: Path, config: dict[str, Any], after: dict[str, Any]
) -> None:
    base = write_checkpoint(
        tmp_path / "base", llama_tensors(4, dtype="F32"), llama_config(4) | config
    )
    dus("upscale", base, "--dtype", "bfloat16", "-o", tmp_path / "out", "-q")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert written == llama_config(4) | {"num_hidden_layers": 6} | after
    assert problems(tmp_path / "out", "--base", base) == []


def test_a_text_config_says_it_too(tmp_path: Path) -> None:
    tensors = [
        (f"language_model.{name}", dtype, shape)
        for name, dtype, shape in llama_tensors(4, dtype="F32")
    ]
    config = {
        "model_type": "llava",
        "torch_dtype": "float32",
        "text_config": llama_config(4) | {"dtype": "float32"},
    }
    base = write_checkpoint(
        tmp_path / "base", tensors, config | {"vision_config": {"hidden_size": 4}}
    )
    dus("upscale", base, "--dtype", "bfloat16", "-o", tmp_path / "out", "-q")
    written = json.loads((tmp_path / "out/config.json").read_text())
    assert (written["torch_dtype"], written["text_config"]["dtype"]) == ("bfloat16", "bfloat16")


def test_it_is_recorded_and_made_again_and_counted_in_a_dry_run(tmp_path: Path) -> None:
    base = write_checkpoint(tmp_path / "base", llama_tensors(8, dtype="F32"), llama_config(8))
    options = ("--recipe", "llama-pro", "--dtype", "bfloat16", "--json", "-o", tmp_path / "out")
    planned = dus("upscale", base, *options, "--dry-run").report
    report = dus("upscale", base, *options).report
    whole = dus("upscale", base, *options[:2], *options[4:], "--dry-run").report
    assert planned["bytes"] == report["bytes"] == whole["bytes"] / 2
    assert (
        planned["space"]["needed"] < 0.7 * whole["space"]["needed"]
        or planned["space"]["needed"] < 2_000_000
    )
    assert planned["shards"] == report["shards"]
    record = json.loads((tmp_path / "out/dus.json").read_text())
    assert (record["dtype"], record["recipe"], record["total_size"]) == (
        "bfloat16",
        "llama-pro",
        report["bytes"],
    )
    card = (tmp_path / "out/README.md").read_text()
    assert "--recipe llama-pro --dtype bfloat16 -o OUT" in card
    zero = names_and_bytes(tmp_path / "out")["model.layers.4.mlp.down_proj.weight"]
    assert zero == ("BF16", (64, 128), bytes(2 * 64 * 128))
    assert problems(tmp_path / "out") == problems(tmp_path / "out", "--base", base) == []


def test_one_flipped_bit_in_a_cast_tensor_is_found(tmp_path: Path) -> None:
    base = source(tmp_path / "base", "F32", "BF16")
    dus("upscale", base, "--trim", "1", "--dtype", "bfloat16", "-o", tmp_path / "out", "-q")
    path, tensor = tensor_at(tmp_path / "out", "lm_head.weight")
    flip_bit(path, tensor.end - 1)
    assert problems(tmp_path / "out") == []
    (problem,) = problems(tmp_path / "out", "--base", base)
    assert "lm_head.weight differs from the base's" in problem


def test_the_dtype_that_it_has_stays_on_the_raw_path_without_torch(
    base: Path, tmp_path: Path
) -> None:
    out = str(tmp_path / "out")
    assert "torch" not in imported_by("upscale", str(base), "--dtype", "bfloat16", "-o", out, "-q")
    assert "torch" not in imported_by(
        "upscale", str(base), "--dtype", "float32", "-o", out + "2", "--dry-run"
    )
    assert "torch" not in imported_by("verify", out, "--base", str(base))
    dus("upscale", base, "-o", tmp_path / "plain", "-q")
    assert names_and_bytes(Path(out)) == names_and_bytes(tmp_path / "plain")


@pytest.mark.parametrize(
    ("name", "dtype"),
    [("bf16", "bfloat16"), ("fp16", "float16"), ("Half", "float16"), ("torch.float", "float32")],
)
def test_a_dtype_goes_by_any_of_its_names(
    name: str, dtype: str, base: Path, tmp_path: Path
) -> None:
    assert (
        dus("upscale", base, "--dtype", name, "-o", tmp_path / "out", "--dry-run", "--json").report[
            "dtype"
        ]
        == dtype
    )
    assert plan(base, tmp_path / "out", dtype=name).to_json()["dtype"] == dtype


def test_a_precision_goes_by_the_same_names() -> None:
    assert Precision("bfloat16") is Precision.parse("BF16") is Precision.bf16
    assert Precision("float32") is Precision.parse("fp32") is Precision.fp32
    assert MasterWeights("torch.bfloat16") is MasterWeights.bf16
    with pytest.raises(ValueError, match="'half' is not one of auto, bf16, fp32"):
        Precision.parse("half")


def test_without_torch_a_cast_is_refused_with_the_extra_that_has_it(
    base: Path, tmp_path: Path
) -> None:
    code = (
        "import sys\n"
        "class Absent:\n"
        "    def find_spec(self, name, *_):\n"
        "        if name == 'torch': raise ModuleNotFoundError(name)\n"
        "import importlib.util as util\n"
        "real = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'torch' else real(name, *rest)\n"
        "from dus_cli.cli import main\n"
        f"sys.argv = ['dus', 'upscale', {str(base)!r}, '--dtype', 'float32', '-o', "
        f"{str(tmp_path / 'out')!r}, '-q']\n"
        "main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr == "error: --dtype needs torch; pip install 'dus-cli[heal]'\n"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


@pytest.mark.parametrize(
    ("stored", "value", "dtype", "said"),
    [
        ("F32", 65520.0, "float16", "±65504"),
        ("BF16", -1e30, "float16", "--dtype bfloat16 or float32"),
        ("F32", 3.4e38, "bfloat16", "±3.39e38"),
        ("F64", 1e39, "float32", "±3.40e38"),
    ],
)
def test_a_finite_number_that_would_become_infinite_is_refused(
    tmp_path: Path, stored: str, value: float, dtype: str, said: str
) -> None:
    bad = torch.tensor([1.0, float("inf"), value], dtype=TORCH[stored]).repeat(100)[:128]

    def fill(name: str, size: int) -> bytes:
        one: bytes = (
            torch.ones(size // bad.element_size(), dtype=TORCH[stored])
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
        two: bytes = (
            bad.repeat(size // 100)[: size // bad.element_size()]
            .view(torch.uint8)
            .numpy()
            .tobytes()
        )
        return two if name == "model.layers.2.mlp.up_proj.weight" else one

    base = write_checkpoint(
        tmp_path / "base", llama_tensors(4, dtype=stored), llama_config(4), fill=fill
    )
    done = dus("upscale", base, "--dtype", dtype, "-o", tmp_path / "out", "-q")
    done.assert_one_line_error("model.layers.2.mlp.up_proj.weight holds finite", dtype, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_infinities_and_nans_of_the_base_are_kept(tmp_path: Path) -> None:
    values = torch.tensor([float("inf"), float("-inf"), float("nan"), -0.0])

    def fill(_name: str, size: int) -> bytes:
        raw: bytes = values.repeat(size // 16).view(torch.uint8).numpy().tobytes()
        return raw

    base = write_checkpoint(
        tmp_path / "base", llama_tensors(4, dtype="F32"), llama_config(4), fill=fill
    )
    dus("upscale", base, "--dtype", "float16", "-o", tmp_path / "out", "-q")
    data = bytearray(names_and_bytes(tmp_path / "out")["model.norm.weight"][2])
    written = torch.frombuffer(data, dtype=torch.float16)
    assert torch.equal(written.isnan(), values.repeat(16).isnan())
    assert torch.equal(written.nan_to_num(0), values.repeat(16).half().nan_to_num(0))


@pytest.mark.parametrize(
    ("extra", "config", "said"),
    [
        (
            None,
            {"quantization_config": {"quant_method": "gptq"}},
            "config.json has quantization_config",
        ),
        (
            ("mlp.up_proj.scale", "F8_E4M3"),
            {},
            "model.layers.0.mlp.up_proj.scale is quantised (F8_E4M3)",
        ),
        (
            ("mlp.up_proj.qweight", "I32"),
            {},
            "model.layers.0.mlp.up_proj.qweight is quantised (I32)",
        ),
        (("mlp.up_proj_blocks", "U8"), {}, "is quantised (U8)"),
        (("w.weight", "F4"), {}, "is quantised (F4)"),
    ],
)
def test_quantised_models_are_refused(
    tmp_path: Path, extra: tuple[str, str] | None, config: dict[str, Any], said: str
) -> None:
    tensors = llama_tensors(4)
    if extra is not None:
        tensors += [(f"model.layers.{k}.{extra[0]}", extra[1], (4, 4)) for k in range(4)]
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(4) | config)
    dus("upscale", base, "--dtype", "float32", "-o", tmp_path / "out", "-q").assert_one_line_error(
        "--dtype", said
    )


def test_tensors_of_several_dtypes_are_told_of(tmp_path: Path) -> None:
    tensors = [*llama_tensors(4), ("model.layers.0.mlp.gate.bias", "F32", (4,))]
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(4))
    report = dus("upscale", base, "--dtype", "bfloat16", "-o", tmp_path / "out", "--json").report
    assert any("39 bfloat16, 1 float32" in warning for warning in report["warnings"])


def test_a_damaged_record_of_the_dtype_is_a_problem(base: Path, tmp_path: Path) -> None:
    dus("upscale", base, "-o", tmp_path / "out", "-q")
    path = tmp_path / "out/dus.json"
    record = json.loads(path.read_text())
    for fields in (
        {"dtype": "int4"},
        {"dtype": ["x"]},
        {"identity": 3},
        {"new_layers": [99]},
        {"new_layers": [3, 2]},
    ):
        path.write_text(json.dumps(record | fields))
        assert any("damaged or edited" in problem for problem in problems(tmp_path / "out"))


def test_the_cast_model_computes_what_the_cast_base_does(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    from zoo import logits, rearranged, tiny_model

    from dus_cli.maps.layers import source_layers

    tiny_model("llama").save_pretrained(tmp_path / "base")
    base = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "base", dtype=torch.bfloat16, attn_implementation="eager"
    )
    dus(
        "upscale", tmp_path / "base", "-t", "2", "--dtype", "bfloat16", "-o", tmp_path / "out", "-q"
    )
    written = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", attn_implementation="eager"
    )
    assert written.dtype == torch.bfloat16
    tokens = torch.arange(3, 23).reshape(1, 20)
    expected = rearranged(base.eval(), source_layers(7, 2))
    assert torch.equal(logits(written.eval(), tokens), logits(expected, tokens))


def test_clones_casts_and_zeros_side_by_side_are_the_bytes_of_a_copy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where blocks can be shared: BF16 tensors are cloned, F32 ones beside them cast, an
    identity's zeros left out.
    """
    tensors = llama_tensors(6, 96, 256, 32, 4096)
    tensors += [(f"model.layers.{k}.mlp.gate.weight", "F32", (8, 96)) for k in range(6)]
    dtypes = {name: dtype for name, dtype, _ in tensors}
    base = write_checkpoint(
        tmp_path / "base",
        tensors,
        llama_config(6, 96, 256, 4096),
        num_shards=2,
        fill=lambda name, size: numbers(dtypes[name], size, fits="BF16"),
    )
    request, ref = MapRequest(trim=1, identity=True), ModelRef(str(base), path=base)
    plan = make_plan(Base(ref), open_checkpoint(base), request, 400_000, Dtype.bfloat16)
    cloned = 0

    def clone(source: int, source_start: int, target: int, start: int, length: int) -> None:
        nonlocal cloned
        assert source_start % BLOCK == start % BLOCK == length % BLOCK == 0
        os.pwrite(target, os.pread(source, length, source_start), start)
        cloned += length

    monkeypatch.setattr(transfer, "clone_range", clone)
    tallies = []
    for name, clones in (("cloned", True), ("copied", False)):
        (tmp_path / name).mkdir()
        tallies.append(transfer.transfer(plan, tmp_path / name, clone=clones))
        check_bytes_against_plan(plan, tmp_path / name, 2, lambda _: None)
    assert folder_digest(tmp_path / "cloned") == folder_digest(tmp_path / "copied")
    first, second = tallies
    assert (first.cast, first.zeros, first.cloned) == (second.cast, second.zeros, cloned)
    assert cloned > 0.7 * plan.num_data_bytes
    assert first.cast == 10 * 8 * 96 * 2
    assert sum((first.cloned, first.copied, first.cast, first.zeros)) == plan.num_data_bytes
