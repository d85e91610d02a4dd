"""Starts: which layers are scaled by what, to the byte, and that the output is the base called
with those factors.
"""

from __future__ import annotations

import copy
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import zoo
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from equality import Base, check_fade, save_base
from tiny import forked_dus as dus
from written import flip_bit, folder_digest, names_and_bytes, problems, tensor_at

from dus_cli import upscale
from dus_cli.errors import LayerMapError, UsageError
from dus_cli.maps.layers import LayerMap, doubled_map, stack, typed_map
from dus_cli.maps.starts import StartRule, factors
from dus_cli.planning.post_norms import POST_NORMS
from dus_cli.planning.scaling import Scale

REAL = os.environ.get("SMOLLM2")
DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32, "F64": torch.float64}


def of(start: str, layer_map: LayerMap) -> tuple[float, ...]:
    return factors(StartRule.parse(start), layer_map)


# --- factors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["fade", "fade:linear", "fade:cosine"])
@pytest.mark.parametrize(
    "layer_map",
    [stack(32, 8), stack(7, 0), typed_map("0:20,10:30,20:40", 40), doubled_map("2:5", 7)],
)
def test_a_fade_falls_in_one_copy_as_it_rises_in_the_next(shape: str, layer_map: LayerMap) -> None:
    found = of(shape, layer_map)
    for outputs in filter(None, layer_map.outputs):
        assert sum(found[output] for output in outputs) == pytest.approx(1, abs=1e-9)
        assert all(0 < found[output] <= 1 for output in outputs)
    first, second = layer_map.runs[:2]
    width = first.stop - second.start
    falling, rising = found[len(first) - width : len(first)], found[len(first) : len(first) + width]
    assert list(rising) == sorted(rising)
    assert falling == pytest.approx(rising[::-1], abs=1e-9)


def test_a_linear_fade_takes_equal_steps_from_half_a_step_on() -> None:
    assert of("fade:linear", stack(6, 1)) == (
        1.0,
        0.875,
        0.625,
        0.375,
        0.125,
        0.125,
        0.375,
        0.625,
        0.875,
        1.0,
    )


def test_a_fade_is_slow_at_both_ends_unless_it_is_told_to_be_linear() -> None:
    rising = (0.03806, 0.308658, 0.691342, 0.96194)  # (1 - cos(pi (k + 1/2) / 4)) / 2
    assert of("fade", stack(6, 1)) == (1.0, *rising[::-1], *rising, 1.0)
    assert of("fade", stack(6, 1)) == of("fade:cosine", stack(6, 1))


def test_k_copies_in_half_are_a_kth_each_wherever_they_stand() -> None:
    assert of("half", typed_map("0:3,1:3,1,3", 4)) == (1.0, 1 / 3, 0.5, 1 / 3, 0.5, 1 / 3, 1.0)
    assert of("half", doubled_map("2:29", 30)) == (1.0, 1.0, *[0.5] * 54, 1.0)


def test_a_scale_is_of_the_new_layers_alone() -> None:
    assert of("scale:0.25", stack(4, 1)) == (1.0, 1.0, 1.0, 0.25, 0.25, 1.0)
    # the base stands behind the first
    assert of("scale:0.25", typed_map("3,0:4", 4)) == (0.25, 1.0, 1.0, 1.0, 1.0)


@pytest.mark.parametrize(
    ("start", "text", "said"),
    [
        ("half", "0:8", "this map has no layer of the base twice"),
        ("scale:0.5", "0:4", "this map has no layer of the base twice"),
        ("fade", "0:8", "this map has no layer of the base twice"),
        ("fade", "0:8,2:6", "layers 2 to 5 occur again after 0:8"),
        ("fade", "4:8,0:8", "layers 0 to 7 occur again after 4:8"),
        ("fade", "0:6,2:6,2:8", "fades in and out again"),
        ("fade", "0:3,2,2,2:8", "fades in and out again"),
        ("fade", "0:4,3:5,6:8,0", "occur again after 6:8"),
        ("fade", "0:5,4:6,7,4", "occur again after 7:8"),
    ],
)
def test_a_map_that_a_start_is_not_for_is_refused(start: str, text: str, said: str) -> None:
    with pytest.raises(LayerMapError, match=said):
        of(start, typed_map(text, 8))


@pytest.mark.parametrize(
    "text",
    [
        "",
        "loud",
        "half:2",
        "copy:1",
        "fade:",
        "fade:round",
        "scale",
        "scale:0",
        "scale:-1",
        "scale:nan",
        "scale:17",
    ],
)
def test_what_is_no_start_is_a_usage_error(text: str, tmp_path: Path) -> None:
    run = dus("upscale", tmp_path, "--start", text, "-o", tmp_path / "out")
    run.assert_one_line_error("start" if text else "''", code=2)
    with pytest.raises(UsageError, match="is not a start"):
        upscale(tmp_path, tmp_path / "out", start=text)


# --- numbers --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["BF16", "F16"])
@pytest.mark.parametrize("factor", [0.5, 0.25, 2**-10, 0.3, 1 / 3, 0.96875, 4.0])
def test_each_number_of_sixteen_bits_becomes_the_rounded_product(dtype: str, factor: float) -> None:
    words = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16)
    before = words.view(DTYPES[dtype])
    expected = (before.float() * torch.tensor(factor)).to(DTYPES[dtype])
    numbers = bytearray(words.numpy().tobytes())
    num_infinite = Scale(dtype, factor)(memoryview(numbers))
    after = torch.frombuffer(numbers, dtype=DTYPES[dtype])
    is_nan = before.isnan()
    assert torch.equal(after.view(torch.int16)[~is_nan], expected.view(torch.int16)[~is_nan])
    assert torch.equal(after.view(torch.int16)[is_nan], before.view(torch.int16)[is_nan])
    assert num_infinite == int((expected.isinf() & before.isfinite()).sum())
    assert (num_infinite > 0) == (factor > 1)


@pytest.mark.parametrize("dtype", ["F32", "F64"])
def test_longer_numbers_are_multiplied_as_they_are(dtype: str) -> None:
    values = torch.randn(100_000, dtype=DTYPES[dtype], generator=torch.Generator().manual_seed(0))
    values[:4] = torch.tensor([0.0, torch.inf, -torch.inf, 1e-45])
    numbers = bytearray(values.numpy().tobytes())
    assert Scale(dtype, 0.3)(memoryview(numbers)) == 0
    assert torch.equal(
        torch.frombuffer(numbers, dtype=DTYPES[dtype]),
        values * torch.tensor(0.3, dtype=DTYPES[dtype]),
    )


def test_a_norm_of_one_plus_w_has_one_plus_w_scaled() -> None:
    weights = torch.tensor([0.0, 1.0, -0.5, 3.0])
    numbers = bytearray(weights.numpy().tobytes())
    Scale("F32", 0.5, offset=1)(memoryview(numbers))
    assert torch.equal(1 + torch.frombuffer(numbers, dtype=torch.float32), 0.5 * (1 + weights))


# --- files ----------------------------------------------------------------------------------------

WRITERS = ("mlp.down_proj.weight", "self_attn.o_proj.weight")


@pytest.fixture
def random_base(tmp_path: Path) -> Path:
    return write_checkpoint(
        tmp_path / "base", llama_tensors(8), llama_config(8), num_shards=3, fill=fill_randomly
    )


def scaled(data: bytes, factor: float) -> bytes:
    numbers = bytearray(data)
    Scale("BF16", factor)(memoryview(numbers))
    return bytes(numbers)


CASES: dict[str, tuple[list[str], dict[int, float]]] = {
    "half": (["--double", "2:5", "--start", "half"], dict.fromkeys(range(2, 8), 0.5)),
    "fade": (
        ["-t", "2", "--start", "fade:linear"],
        dict(zip(range(2, 10), (0.875, 0.625, 0.375, 0.125) * 2, strict=True)),
    ),
    "scale": (["-t", "3", "--start", "scale:.125"], {5: 0.125, 6: 0.125}),
}
CASES["fade"][1].update({6: 0.125, 7: 0.375, 8: 0.625, 9: 0.875})


@pytest.mark.parametrize("case", sorted(CASES))
def test_output_projections_are_scaled_and_all_else_is_copied(
    case: str, random_base: Path, tmp_path: Path
) -> None:
    options, by_layer = CASES[case]
    options = [*options, "--max-shard-size", "200KB", "--verify", "full", "--checksums"]
    report = dus("upscale", random_base, *options, "-o", tmp_path / "out", "--json").report
    plain = [*options[: options.index("--start")], *options[options.index("--start") + 2 :]]
    dus("upscale", random_base, *plain, "-o", tmp_path / "plain", "-q")
    ours, theirs = names_and_bytes(tmp_path / "out"), names_and_bytes(tmp_path / "plain")
    assert ours.keys() == theirs.keys()
    for name, (dtype, shape, data) in theirs.items():
        layer = int(name.split(".")[2]) if ".layers." in name else -1
        factor = by_layer.get(layer, 1.0) if name.endswith(WRITERS) else 1.0
        assert ours[name] == (dtype, shape, data if factor == 1 else scaled(data, factor)), name
    found = report["scaled"]
    assert {
        layer: factor for layer, factor in enumerate(found["factors"]) if factor != 1
    } == by_layer
    assert (found["tensors"], found["one_plus"]) == (sorted(WRITERS), [])
    assert report["start"] == "scaled"
    assert report["bytes_scaled"] == len(by_layer) * (64 * 64 + 64 * 128) * 2
    assert sum(report[f"bytes_{how}"] for how in ("cloned", "copied", "scaled")) == report["bytes"]
    assert problems(tmp_path / "out", "--base", random_base) == []
    assert problems(tmp_path / "out") == []
    card = (tmp_path / "out/README.md").read_text()
    assert (
        f"`{found['start']}`: mlp.down_proj.weight and self_attn.o_proj.weight of {len(by_layer)} "
        "layers" in card
    )
    dus("upscale", "--from", tmp_path / "out", "-o", tmp_path / "again", "-q")
    assert folder_digest(tmp_path / "again") == folder_digest(tmp_path / "out")


@pytest.mark.parametrize("start", ["half", "scale:0.5"])
def test_a_flipped_bit_in_a_scaled_tensor_is_found_without_the_base(
    start: str, random_base: Path, tmp_path: Path
) -> None:
    dus("upscale", random_base, "-t", "2", "--start", start, "-o", tmp_path / "out", "-q")
    path, tensor = tensor_at(tmp_path / "out", "model.layers.7.mlp.down_proj.weight")
    flip_bit(path, tensor.end - 1)
    for options in ((), ("--base", random_base)):
        (problem,) = problems(tmp_path / "out", *options)
        assert "model.layers.7.mlp.down_proj.weight differs from" in problem


def test_a_faded_tensor_is_held_against_the_base_and_without_it_a_warning_says_so(
    random_base: Path, tmp_path: Path
) -> None:
    dus("upscale", random_base, "-t", "2", "--start", "fade", "-o", tmp_path / "out", "-q")
    path, tensor = tensor_at(tmp_path / "out", "model.layers.7.mlp.down_proj.weight")
    flip_bit(path, tensor.end - 1)
    report = dus("verify", tmp_path / "out", "--json").report
    assert (report["problems"], len(report["warnings"])) == ([], 1)
    assert report["warnings"][0].startswith(
        "8 tensors have another factor than their twins: only --base"
    )
    (problem,) = problems(tmp_path / "out", "--base", random_base)
    assert "model.layers.7.mlp.down_proj.weight differs from the base's" in problem
    told = dus("verify", tmp_path / "out", "--base", random_base, "--json")
    assert json.loads(told.stdout)["warnings"] == []


def test_a_start_of_copies_changes_no_byte(random_base: Path, tmp_path: Path) -> None:
    dus("upscale", random_base, "-o", tmp_path / "plain", "-q", "--checksums")
    for start in ("copy", "scale:1"):
        dus("upscale", random_base, "--start", start, "-o", tmp_path / start, "-q", "--checksums")
        same = folder_digest(tmp_path / start)
        if start == "copy":
            assert same == folder_digest(tmp_path / "plain")
    assert names_and_bytes(tmp_path / "scale:1") == names_and_bytes(tmp_path / "plain")
    assert "scaled" not in json.loads((tmp_path / "plain/dus.json").read_text())


def test_identity_is_a_start_by_two_spellings(random_base: Path, tmp_path: Path) -> None:
    dus("upscale", random_base, "--start", "identity", "-o", tmp_path / "new", "-q")
    dus("upscale", random_base, "--identity", "-o", tmp_path / "old", "-q")
    assert folder_digest(tmp_path / "new") == folder_digest(tmp_path / "old")


@pytest.mark.parametrize("first", [["--identity"], ["--recipe", "llama-pro"]])
def test_what_says_how_layers_start_goes_with_no_other_start(
    first: list[str], random_base: Path, tmp_path: Path
) -> None:
    run = dus("upscale", random_base, *first, "--start", "half", "-o", tmp_path / "out")
    run.assert_one_line_error(" ".join(first), "leave out --start", code=2)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("5:3", "5:3"),
        ("3:5,4:6", "4:6"),
        ("2:", "2:"),
        ("a", "'a'"),
        ("2:9", "reaches beyond the base"),
        ("8", "8:9"),
    ],
)
def test_stretches_to_double_are_within_the_base_and_rise(
    text: str, said: str, random_base: Path, tmp_path: Path
) -> None:
    run = dus("upscale", random_base, "--double", text, "-o", tmp_path / "out")
    run.assert_one_line_error(
        "--double", said, code=2 if "beyond" not in said and said != "8:9" else 1
    )


def test_a_doubled_stretch_is_the_map_that_layers_spell(random_base: Path, tmp_path: Path) -> None:
    ours = dus("upscale", random_base, "--double", "1:3,6", "-o", tmp_path / "out", "--json").report
    assert ours["layer_map"] == [0, 1, 1, 2, 2, 3, 4, 5, 6, 6, 7]
    assert (ours["double"], ours["scaled"], ours["start"]) == ("1:3,6", None, "seams")
    dus("upscale", random_base, "--layers", ours["layers"], "-o", tmp_path / "typed", "-q")
    assert names_and_bytes(tmp_path / "out") == names_and_bytes(tmp_path / "typed")
    dus(
        "upscale", random_base, "--double", "1:3", "-t", "2", "-o", tmp_path / "x"
    ).assert_one_line_error("--double gives the whole map", code=2)


def test_a_dry_run_shows_what_would_be_scaled(random_base: Path, tmp_path: Path) -> None:
    run = dus(
        "upscale",
        random_base,
        "-t",
        "2",
        "--start",
        "fade:cosine",
        "-o",
        tmp_path / "out",
        "--dry-run",
    )
    assert (
        "start fade:cosine: mlp.down_proj.weight and self_attn.o_proj.weight of 8 layers × 0.03806"
        in run.stderr
    )
    assert not (tmp_path / "out").exists()


def test_a_factor_that_makes_numbers_infinite_is_refused(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base",
        llama_tensors(8, dtype="F16"),
        llama_config(8),
        fill=lambda _, size: b"\xff\x7b" * (size // 2),
    )
    run = dus("upscale", base, "--start", "scale:2", "-o", tmp_path / "out", "-q")
    run.assert_one_line_error(
        "holds finite F16 numbers that, times 2, are out of float16's range", "--start"
    )
    assert list(tmp_path.iterdir()) == [base]


def test_what_is_cast_is_scaled_behind_the_cast(tmp_path: Path) -> None:
    zoo.tiny_model("llama").save_pretrained(tmp_path / "base")
    options = ["-t", "2", "--start", "fade", "--dtype", "bfloat16", "--verify", "full"]
    report = dus("upscale", tmp_path / "base", *options, "-o", tmp_path / "out", "--json").report
    dus("upscale", tmp_path / "base", *options[:2], *options[4:], "-o", tmp_path / "plain", "-q")
    ours, theirs = names_and_bytes(tmp_path / "out"), names_and_bytes(tmp_path / "plain")
    name = "model.layers.3.mlp.down_proj.weight"
    assert ours[name][2] == scaled(theirs[name][2], report["scaled"]["factors"][3])
    assert problems(tmp_path / "out", "--base", tmp_path / "base") == []


def test_no_start_needs_torch(random_base: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from dus_cli import upscale\n"
        f"for start in ('half', 'fade'): upscale({str(random_base)!r}, {str(tmp_path)!r} + '/' + "
        "start, start=start)\n"
        "assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    "change",
    [
        {"factors": [0.5]},
        {"factors": [-1.0] * 12},
        {"tensors": "all"},
        {"one_plus": [3]},
        {"start": "loud"},
        None,
    ],
)
def test_a_damaged_record_of_what_is_scaled_is_a_problem(
    change: Any, random_base: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    dus("upscale", random_base, "-t", "2", "--start", "half", "-o", out, "-q")
    record = json.loads((out / "dus.json").read_text())
    record["scaled"] = record["scaled"] | change if change else 7
    (out / "dus.json").write_text(json.dumps(record))
    if change is None or "start" not in change:
        assert any("scaled is not what dus writes" in problem for problem in problems(out))
    else:
        run = dus("upscale", "--from", out, "-o", tmp_path / "again")
        run.assert_one_line_error("scaled is not what dus writes")


# --- the proof: the base's layers, called with these factors --------------------------------------

# Models of images and text whose decoder is of a type of its own, with norms behind its blocks.
WITH_IMAGES = ("gemma3", "glm4v", "glm_ocr", "muse_glimmer")


@pytest.mark.parametrize("model_type", WITH_IMAGES)
@pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models
def test_a_faded_model_of_images_is_its_bases_layers_called_with_the_factors(
    model_type: str, tmp_path: Path
) -> None:
    """Models of text alone: test_zoo.py."""
    folder = save_base(model_type, tmp_path, whole=True)
    out = tmp_path / "out"
    run = dus("upscale", folder, "-t", "2", "--start", "fade", "-o", out, "--json")
    check_fade(Base.load(model_type, folder, whole=True), out, run.report)


def test_every_type_with_norms_behind_its_blocks_is_tried() -> None:
    tried = [zoo.tiny_config(name) for name in zoo.EQUAL]
    tried += [zoo.tiny_config(name, whole=True) for name in WITH_IMAGES]
    assert {config.get_text_config().model_type for config in tried} >= POST_NORMS.keys()


def test_a_norm_that_may_stand_behind_a_block_of_an_unknown_type_is_refused(tmp_path: Path) -> None:
    tensors = llama_tensors(8) + [
        (f"model.layers.{k}.post_mlp_norm.weight", "BF16", (64,)) for k in range(8)
    ]
    base = write_checkpoint(tmp_path / "base", tensors, llama_config(8) | {"model_type": "ours"})
    run = dus("upscale", base, "--start", "half", "-o", tmp_path / "out", "-q")
    run.assert_one_line_error("--start half", "post_mlp_norm.weight may follow a block", "'ours'")


def test_a_type_that_dus_does_not_know_is_scaled_by_names_and_told_of(tmp_path: Path) -> None:
    base = write_checkpoint(
        tmp_path / "base", llama_tensors(8), llama_config(8) | {"model_type": "ours"}
    )
    report = dus("upscale", base, "--start", "half", "-o", tmp_path / "out", "--json").report
    assert any(
        "--start half went by the names of tensors alone" in warning
        for warning in report["warnings"]
    )


@pytest.fixture(scope="module")
def smollm2() -> Any:
    if not REAL:
        pytest.skip("SMOLLM2 names no checkpoint; `make test` makes one")
    return transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()


@pytest.mark.parametrize(
    ("options", "depth"),
    [(["--double", "2:29", "--start", "half"], 57), (["-t", "7", "--start", "fade"], 46)],
)
def test_smollm2_is_nearer_to_its_base_by_a_start(
    options: list[str], depth: int, smollm2: Any, tmp_path: Path
) -> None:
    """To the last bit its own layers with scaled projections; and on a text the loss falls
    towards the base's.
    """
    assert REAL is not None
    report = dus("upscale", REAL, *options, "-o", tmp_path / "out", "--json").report
    written = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    tokens = torch.tensor([tokenizer(text)["input_ids"][:256]])
    base = copy.deepcopy(smollm2)
    whole = base.model.layers

    def called(by_layer: list[float]) -> torch.Tensor:
        base.model.layers = torch.nn.ModuleList(
            [copy.deepcopy(whole[k]) for k in report["layer_map"]]
        )
        for layer, factor in zip(base.model.layers, by_layer, strict=True):
            for projection in (layer.self_attn.o_proj, layer.mlp.down_proj):
                projection.weight.data = (projection.weight.data * factor).bfloat16().float()
        base.config.num_hidden_layers = depth
        return zoo.logits(base, tokens)

    def loss(logits: torch.Tensor) -> float:
        return float(torch.nn.functional.cross_entropy(logits[0, :-1], tokens[0, 1:]))

    assert len(report["layer_map"]) == depth
    ours = zoo.logits(written, tokens)
    assert torch.equal(ours, called(report["scaled"]["factors"]))
    assert loss(zoo.logits(smollm2, tokens)) < loss(ours) < loss(called([1.0] * depth)) - 0.5
