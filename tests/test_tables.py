"""Per-layer embeddings: tensors outside the layers with a block for each of them follow the map,
block by block; and layers that take keys and values from others before them.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import tiny
from checkpoints import Tensor, fill_randomly, llama_config, llama_tensors, write_checkpoint
from forked import dus
from hub_server import StandInRepo, commit_of, only_hub
from written import flip_bit, names_and_bytes, problems, tensor_at

from dus_cli.api import upscale
from dus_cli.release.within import base_within
from dus_cli.source import strided
from dus_cli.writing import moves

N, WIDTH, VOCAB, HIDDEN = 8, 16, 300, 64
TABLE, PROJECTION = "model.embed_tokens_per_layer.weight", "model.per_layer_model_projection.weight"
CONFIG = llama_config(N, HIDDEN) | {
    "model_type": "gemma3n_text",
    "architectures": ["Gemma3nForCausalLM"],
    "num_kv_shared_layers": 0,
    "hidden_size_per_layer_input": WIDTH,
    "vocab_size_per_layer_input": VOCAB,
}


def with_tables(*more: Tensor) -> list[Tensor]:
    tensors = llama_tensors(N, HIDDEN)
    tables: list[Tensor] = [
        (TABLE, "BF16", (VOCAB, N * WIDTH)),
        (PROJECTION, "BF16", (N * WIDTH, HIDDEN)),
    ]
    replaced = {name for name, *_ in more}
    kept = [one for one in (*tensors, *tables) if one[0] not in replaced]
    return [one for one in (*kept, *more) if one[2]]  # one of no shape is left out


def base_at(folder: Path, *more: Tensor, config: dict[str, Any] | None = None) -> Path:
    tensors, fields = with_tables(*more), CONFIG | (config or {})
    return write_checkpoint(folder / "base", tensors, fields, num_shards=2, fill=fill_randomly)


def blocks(raw: bytes, num_rows: int, order: Sequence[int]) -> bytes:
    """The wanted blocks of each row, the slow way."""
    row, size = len(raw) // num_rows, len(raw) // num_rows // N
    return b"".join(
        raw[at * row + block * size : at * row + (block + 1) * size]
        for at in range(num_rows)
        for block in order
    )


MAPS = {
    "--trim 2": [*range(6), *range(2, 8)],
    "--trim 1 --copies 3": [*range(7), *range(1, 7), *range(1, 8)],
    "--layers 0:3,5:8": [0, 1, 2, 5, 6, 7],
    "--layers 7:8,0:8": [7, *range(8)],
}


@pytest.mark.parametrize("options", MAPS)
@pytest.mark.parametrize("how", ["--copy-mode copy", "--checksums", "--max-shard-size 20KB"])
def test_each_output_layer_has_the_block_of_its_source(
    options: str, how: str, tmp_path: Path
) -> None:
    base, order = base_at(tmp_path), MAPS[options]
    given = (*options.split(), *how.split(), "--verify", "full", "--json")
    report = dus("upscale", base, *given, "-o", tmp_path / "out").report
    before, after = names_and_bytes(base), names_and_bytes(tmp_path / "out")
    _, shape, raw = after[TABLE]
    assert shape == (VOCAB, len(order) * WIDTH)
    assert raw == blocks(before[TABLE][2], VOCAB, order)
    _, shape, raw = after[PROJECTION]
    assert shape == (len(order) * WIDTH, HIDDEN)
    assert raw == blocks(before[PROJECTION][2], 1, order)
    said = {"width": WIDTH, "tensors": [TABLE, PROJECTION]}
    assert report["tables"] == said
    assert json.loads((tmp_path / "out/dus.json").read_text())["tables"] == said
    assert problems(tmp_path / "out", "--base", base) == []


def test_the_plan_names_the_tables_and_their_width(tmp_path: Path) -> None:
    done = dus("upscale", base_at(tmp_path), "--trim", "2", "-o", tmp_path / "out", "--dry-run")
    assert f"{TABLE}, {PROJECTION}: {WIDTH} of each layer, by the map" in done.stdout


@pytest.mark.parametrize("name", [TABLE, PROJECTION])
def test_one_bit_of_a_table_is_found_by_verify(name: str, tmp_path: Path) -> None:
    base = base_at(tmp_path)
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    path, tensor = tensor_at(tmp_path / "out", name)
    flip_bit(path, tensor.end - 3)
    position = tensor.num_bytes - 3
    (problem,) = problems(tmp_path / "out", "--base", base)
    assert f"tensor {name} differs from the base's {name} at byte {position}" in problem


@pytest.mark.parametrize("name", [TABLE, PROJECTION])
def test_a_table_of_another_depth_is_found_by_verify_without_a_base(
    name: str, tmp_path: Path
) -> None:
    shape = (VOCAB, 5 * WIDTH) if name == TABLE else (5 * WIDTH, HIDDEN)
    (problem,) = problems(base_at(tmp_path, (name, "BF16", shape)))
    axis = 1 if name == TABLE else 0
    assert problem == (
        f"{name} is {list(shape)}, and not {N * WIDTH} along axis {axis}, {WIDTH} for each of {N} "
        "layers"
    )


def test_another_width_in_the_config_is_found_by_verify_without_a_base(tmp_path: Path) -> None:
    dus("upscale", base_at(tmp_path), "--trim", "2", "-o", tmp_path / "out", "-q")
    assert problems(tmp_path / "out") == []
    path = tmp_path / "out" / "config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"hidden_size_per_layer_input": WIDTH // 2}))
    found = problems(tmp_path / "out")
    assert len(found) == 2
    assert all(f"{WIDTH // 2} for each of 12 layers" in problem for problem in found)


def test_a_base_whose_table_has_other_blocks_is_another(tmp_path: Path) -> None:
    base = base_at(tmp_path)
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    path, tensor = tensor_at(base, TABLE)
    flip_bit(path, tensor.start + 5)
    assert any(TABLE in line for line in problems(tmp_path / "out", "--base", base))


def test_tables_are_cast_too(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file, save_file

    base = base_at(tmp_path)
    for path in base.glob("*.safetensors"):  # random bytes have numbers beyond float16
        tensors = {name: torch.randn(tensor.shape) for name, tensor in load_file(path).items()}
        save_file({name: t.bfloat16() for name, t in tensors.items()}, path)
    command = ("upscale", base, "--trim", "2", "--dtype", "float16", "-o", tmp_path / "out")
    dus(*command, "--verify", "full", "-q")
    before = {k: v for path in base.glob("*.safetensors") for k, v in load_file(path).items()}
    after = load_file(tmp_path / "out/model.safetensors")
    order = MAPS["--trim 2"]
    table = before[TABLE].reshape(VOCAB, N, WIDTH)[:, order].reshape(VOCAB, -1).half()
    assert torch.equal(after[TABLE], table)
    projection = before[PROJECTION].reshape(N, WIDTH, HIDDEN)[order].reshape(-1, HIDDEN).half()
    assert torch.equal(after[PROJECTION], projection)
    assert problems(tmp_path / "out", "--base", base) == []


@pytest.mark.parametrize("options", ["--jobs 3", "--dtype float32", "--layers 0:3,5:8"])
def test_tables_are_streamed_from_the_hub(
    options: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = base_at(tmp_path)
    repos = {"org/model": StandInRepo({commit_of("model"): base}, {"main": commit_of("model")})}
    trim = () if "--layers" in options else ("--trim", "2")
    with only_hub(repos, tmp_path / "hf", monkeypatch):
        command = ("upscale", "org/model", *trim, *options.split(), "--stream", "--json")
        report = dus(*command, "--verify", "full", "-o", tmp_path / "streamed").report
    whole = "--layers" not in options
    assert (len(report["streamed"]["checked"]) == 2) == whole
    dus("upscale", base, *trim, *options.split(), "-o", tmp_path / "out", "-q")
    assert names_and_bytes(tmp_path / "streamed") == names_and_bytes(tmp_path / "out")


def test_rows_that_are_longer_than_a_piece_are_moved_in_parts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base, order = base_at(tmp_path), MAPS["--trim 2"]
    for module in (strided, moves):
        monkeypatch.setattr(module, "PIECE", 100)  # less than a row
    upscale(base, tmp_path / "out", trim=2, verify="full")
    before, after = names_and_bytes(base), names_and_bytes(tmp_path / "out")
    assert after[TABLE][2] == blocks(before[TABLE][2], VOCAB, order)


def test_a_scale_for_each_row_of_a_quantised_projection_follows(tmp_path: Path) -> None:
    scale = "model.per_layer_model_projection.weight_scale"
    base = base_at(
        tmp_path, (PROJECTION, "I8", (N * WIDTH, HIDDEN)), (scale, "F32", (N * WIDTH, 1))
    )
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "--verify", "full", "-q")
    before, after = names_and_bytes(base), names_and_bytes(tmp_path / "out")
    for name in (PROJECTION, scale):
        assert after[name][2] == blocks(before[name][2], 1, MAPS["--trim 2"])


def test_one_scale_for_all_of_a_table_stays(tmp_path: Path) -> None:
    scale = "model.embed_tokens_per_layer.weight_scale"
    base = base_at(tmp_path, (TABLE, "I8", (VOCAB, N * WIDTH)), (scale, "F32", (1,)))
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    before, after = names_and_bytes(base), names_and_bytes(tmp_path / "out")
    assert after[scale] == before[scale]
    assert after[TABLE][2] == blocks(before[TABLE][2], VOCAB, MAPS["--trim 2"])


@pytest.mark.parametrize(
    "tensor",
    [
        ("model.per_layer_model_projection.qweight", "I32", (HIDDEN // 8, N * WIDTH)),
        ("model.embed_tokens_per_layer.weight_scale", "F32", (VOCAB, 1)),
        (PROJECTION, "U8", (N * WIDTH * HIDDEN // 2, 1)),
        (TABLE, "BF16", (VOCAB, N * WIDTH - N)),
    ],
    ids=["gptq", "a scale for each token", "bitsandbytes", "another width"],
)
def test_a_table_in_another_shape_is_refused_by_name(tensor: Tensor, tmp_path: Path) -> None:
    run = dus("upscale", base_at(tmp_path, tensor), "--trim", "2", "-o", tmp_path / "out", "-q")
    run.assert_one_line_error(tensor[0], f"{WIDTH} for each of {N} layers", "not quantised")
    assert not (tmp_path / "out").exists()


def test_a_table_that_is_not_there_is_missed(tmp_path: Path) -> None:
    base = base_at(tmp_path, (TABLE, "BF16", ()))
    run = dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    run.assert_one_line_error("hidden_size_per_layer_input is 16", "embed_tokens_per_layer")


def test_without_tables_a_model_has_none(tmp_path: Path) -> None:
    config = CONFIG | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    config["layer_types"] = ["sliding_attention"] * 7 + ["full_attention"]
    base = write_checkpoint(tmp_path / "base", llama_tensors(N), config, fill=fill_randomly)
    report = dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "--json").report
    assert report["tables"] is None
    assert "tables" not in json.loads((tmp_path / "out/dus.json").read_text())


@pytest.mark.parametrize("width", [-4, "16", 1.5, True])
def test_a_width_that_is_none_is_refused(width: object, tmp_path: Path) -> None:
    base = base_at(tmp_path, config={"hidden_size_per_layer_input": width})
    run = dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    run.assert_one_line_error("hidden_size_per_layer_input")


def test_inside_a_multimodal_model_the_tables_follow_too(tmp_path: Path) -> None:
    renamed: list[Tensor] = [
        (name.replace("model.", "model.language_model.", 1), dtype, shape)
        for name, dtype, shape in with_tables()
    ]
    tower: list[Tensor] = [("model.vision_tower.blocks.0.weight", "BF16", (4, 4))]
    altup: list[Tensor] = [
        (f"model.language_model.altup_projections.{i}.weight", "BF16", (HIDDEN, HIDDEN))
        for i in range(3)
    ]
    config = {
        "model_type": "gemma3n",
        "architectures": ["Gemma3nForConditionalGeneration"],
        "text_config": CONFIG,
        "vision_config": {"num_hidden_layers": 2},
        "vocab_size": VOCAB,
    }
    tensors = [*renamed, *tower, *altup]
    base = write_checkpoint(tmp_path / "base", tensors, config, fill=fill_randomly)
    report = dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "--json").report
    assert not any("altup" in warning for warning in report["warnings"])
    table = TABLE.replace("model.", "model.language_model.", 1)
    assert report["tables"]["tensors"][0] == table
    before, after = names_and_bytes(base), names_and_bytes(tmp_path / "out")
    assert after[table][2] == blocks(before[table][2], VOCAB, MAPS["--trim 2"])


@pytest.mark.parametrize("options", ["--identity", "--start half"])
@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text"])
def test_a_start_other_than_copies_is_refused_by_name(
    options: str, model_type: str, tmp_path: Path
) -> None:
    kinds = {"layer_types": ["sliding_attention"] * 7 + ["full_attention"]}
    base = base_at(tmp_path, config=kinds | {"model_type": model_type})
    given = ["--layers", "0:8,7:8"] if options == "--identity" else ["--trim", "2"]
    run = dus("upscale", base, *given, *options.split(), "-o", tmp_path / "out", "-q")
    run.assert_one_line_error(options.split(maxsplit=1)[0], model_type)


# --- keys and values from layers before -----------------------------------------------------------

SLIDING, FULL = "sliding_attention", "full_attention"
SHARING = {
    # full attention at 1 and 3: of six layers of their own, the last of each kind is 3 and 5
    "layer_types": [SLIDING, FULL, SLIDING, FULL, SLIDING, SLIDING, SLIDING, FULL],
    "num_kv_shared_layers": 2,
}


@pytest.mark.parametrize(
    ("options", "count"),
    [
        ("--trim 2", 2),
        ("--trim 3", 2),
        ("--layers 0:6,2:8", 2),
        ("--layers 0:8,6:8", 4),
        ("--layers 0:6", 0),
        ("--layers 0:6,7:8,6:8", 3),
    ],
)
def test_a_map_that_ends_in_the_layers_that_share_keeps_them_right(
    options: str, count: int, tmp_path: Path
) -> None:
    base = base_at(tmp_path, config=SHARING)
    dus("upscale", base, *options.split(), "-o", tmp_path / "out", "-q")
    assert json.loads((tmp_path / "out/config.json").read_text())["num_kv_shared_layers"] == count
    assert problems(tmp_path / "out", "--base", base) == []


@pytest.mark.parametrize(
    "options",
    ["--trim 1", "--trim 0", "--layers 0:8,0:6", "--layers 0:3,6:8", "--layers 0:6,0:4,6:8"],
)
def test_another_map_is_refused_with_those_that_keep_them(options: str, tmp_path: Path) -> None:
    run = dus(
        "upscale",
        base_at(tmp_path, config=SHARING),
        *options.split(),
        "-o",
        tmp_path / "out",
        "-q",
    )
    run.assert_one_line_error(
        "num_kv_shared_layers is 2: layers 6 to 7 take keys and values",
        "--trim 2 or 3 would keep it; or use --layers 0:5,1:, which repeats only layers before those",
    )
    named = ("--layers", "0:5,1:")
    done = dus("upscale", tmp_path / "base", *named, "-o", tmp_path / "out", "-q")
    assert done.returncode == 0


@pytest.mark.parametrize("count", [8, -1, "2", 2.0])
def test_a_number_of_sharing_layers_that_is_none_is_refused(count: object, tmp_path: Path) -> None:
    base = base_at(tmp_path, config=SHARING | {"num_kv_shared_layers": count})
    run = dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    run.assert_one_line_error("num_kv_shared_layers")


def test_where_no_trim_keeps_them_the_map_that_does_is_named(tmp_path: Path) -> None:
    kinds = [SLIDING, FULL, *[SLIDING] * 5, FULL]
    base = base_at(tmp_path, config={"layer_types": kinds, "num_kv_shared_layers": 4})
    run = dus("upscale", base, "-o", tmp_path / "out", "-q")
    run.assert_one_line_error("no trim keeps it; or use --layers 0:3,1:, which repeats")


@pytest.mark.parametrize("count", [0, 2])
def test_a_model_whose_layers_share_keys_is_not_run_in_part(count: int, tmp_path: Path) -> None:
    config = CONFIG | SHARING | {"model_type": "gemma4_text", "hidden_size_per_layer_input": 0}
    config["num_kv_shared_layers"] = count
    base = write_checkpoint(tmp_path / "base", llama_tensors(N), config, fill=fill_randomly)
    dus("upscale", base, "--trim", "2", "-o", tmp_path / "out", "-q")
    assert (base_within(tmp_path / "out") is None) == bool(count)


def test_a_model_with_tables_is_healed_beside_its_base(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    base = tiny.write_base(
        tmp_path / "base",
        6,
        model_type="gemma3n_text",
        head_dim=8,
        hidden_size_per_layer_input=8,
        vocab_size_per_layer_input=260,
        num_kv_shared_layers=2,
        layer_types=[SLIDING, FULL, SLIDING, FULL, SLIDING, FULL],
        laurel_rank=4,
    )
    out = tiny.upscaled(base, tmp_path / "deep", trim=2)
    corpus = tiny.write_corpus(tmp_path / "corpus.jsonl")
    given = ("--data", corpus, "--steps", "1", "--seq-length", "32", "--batch-tokens", "64")
    report = tiny.forked_dus("heal", out, *given, "-o", tmp_path / "healed", "--json").report
    assert report["base_loss"] is not None
    assert report["loss"] is not None
