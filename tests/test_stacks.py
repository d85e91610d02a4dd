"""Which numbered names are the decoder's layers, which are another tower's, and which are no
layers at all.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Tensor, llama_config, llama_tensors, write_checkpoint
from tiny import forked_dus

DEPTH = 6


def model(folder: Path, more: list[Tensor], *, place: str = "model.layers", **config: Any) -> Path:
    """A Llama of six layers, whose layers stand in `place`, with other tensors beside them."""
    tensors = [(name.replace("model.layers", place), *rest) for name, *rest in llama_tensors(DEPTH)]
    return write_checkpoint(folder, [*tensors, *more], llama_config(DEPTH) | config)  # type: ignore[list-item]


def stack(prefix: str, count: int, first: int = 0) -> list[Tensor]:
    return [(f"{prefix}.{k}.proj.weight", "BF16", (4, 4)) for k in range(first, first + count)]


def problems(folder: Path, *options: str | Path) -> list[str]:
    found: list[str] = json.loads(forked_dus("verify", folder, "--json", *options).stdout)[
        "problems"
    ]
    return found


CHATGLM = {"model_type": "chatglm", "architectures": ["ChatGLMModel"]}


@pytest.mark.parametrize(
    ("place", "more", "config"),
    [
        ("transformer.encoder.layers", [], CHATGLM),
        (
            "llm.model.layers",
            stack("vpm.encoder.layers", 4),
            {"vision_config": {"num_hidden_layers": 4}},
        ),
        (
            "llm.model.layers",
            stack("vpm.encoder.layers", DEPTH),
            {"vision_config": {"num_hidden_layers": DEPTH}},
        ),
        (
            "thinker.text.layers",
            stack("audio_tower.layers", DEPTH),
            {"audio_config": {"num_layers": DEPTH}},
        ),
        ("llm.model.layers", stack("blocks", 4), {"vision_config": {"depth": 4}}),
        ("llm.model.layers", stack("decoder.layers", 3), {"audio_config": {"num_layers": 3}}),
    ],
)
def test_a_stack_of_the_depth_of_config_json_wins_over_a_name(
    tmp_path: Path, place: str, more: list[Tensor], config: dict[str, Any]
) -> None:
    base = model(tmp_path / "base", more, place=place, **config)
    report = forked_dus("upscale", base, "-t", "1", "-o", tmp_path / "out", "--json").report
    assert any(f"taken to be {place}.0 to 5" in warning for warning in report["warnings"])
    record = json.loads((tmp_path / "out/dus.json").read_text())
    assert record["layer_prefix"] == place
    assert problems(tmp_path / "out") == []
    assert problems(tmp_path / "out", "--base", base) == []


@pytest.mark.parametrize(
    ("place", "more", "config", "said"),
    [
        (
            "bert.encoder.layer",
            [],
            {"model_type": "ours", "architectures": ["OursModel"]},
            "this is an encoder",
        ),
        ("encoder.block", [], {"architectures": ["OursEncoderModel"]}, "this is an encoder"),
        (
            "model.decoder.layers",
            stack("model.encoder.layers", DEPTH),
            {},
            "an encoder-decoder model",
        ),
        ("model.decoder.layers", stack("model.encoder.layers", 3), {}, "an encoder-decoder model"),
        (
            "decoder.block",
            stack("encoder.block", 3),
            {"model_type": "ours"},
            "an encoder-decoder model",
        ),
        (
            "one.layers",
            stack("two.layers", DEPTH),
            {},
            "several stacks of 6 numbered entries (one.layers, two.layers)",
        ),
    ],
)
def test_encoders_and_what_is_not_clear_stay_refused(
    tmp_path: Path, place: str, more: list[Tensor], config: dict[str, Any], said: str
) -> None:
    base = model(tmp_path / "base", more, place=place, **config)
    forked_dus("upscale", base, "-o", tmp_path / "out", "-q").assert_one_line_error(said)


def test_an_encoder_without_a_head_is_refused(tmp_path: Path) -> None:
    base = model(
        tmp_path / "base",
        [],
        place="encoder.layers",
        architectures=["OursModel"],
        tie_word_embeddings=True,
    )
    headless = [t for t in llama_tensors(DEPTH, tied=True) if not t[0].startswith("lm_head")]
    tensors = [(name.replace("model.layers", "encoder.layers"), *rest) for name, *rest in headless]
    write_checkpoint(base, tensors, json.loads((base / "config.json").read_text()))  # type: ignore[arg-type]
    forked_dus("upscale", base, "-o", tmp_path / "out", "-q").assert_one_line_error(
        "this is an encoder"
    )


def test_another_stack_is_named_as_kept_where_a_person_says_so(tmp_path: Path) -> None:
    base = model(tmp_path / "base", stack("two.layers", DEPTH), place="one.layers")
    arguments = ("--assume", "two.layers=keep", "-t", "1", "-o", tmp_path / "out", "--json")
    report = forked_dus("upscale", base, *arguments).report
    assert "two.layers was kept, as --assume says" in report["warnings"]
    assert json.loads((tmp_path / "out/dus.json").read_text())["layer_prefix"] == "one.layers"
    assert problems(tmp_path / "out", "--base", base) == []


NO_LAYERS = [
    ("model.mm_projector", [0, 2]),
    ("model.vision_tower.vision_tower.vision_model.encoder.layers", range(24)),
    ("audio_encoder.layers", range(4)),
    ("connector.modality_projection.layers", [0]),
    ("vision.trunk.blocks", range(DEPTH + 3)),
    ("model.experts", range(2)),
]


@pytest.mark.parametrize(("prefix", "numbers"), NO_LAYERS)
def test_numbers_that_are_no_layers_stay_and_are_told_of(
    tmp_path: Path, prefix: str, numbers: list[int]
) -> None:
    extra = [tensor for number in numbers for tensor in stack(prefix, 1, number)]
    base = model(tmp_path / "base", extra)
    done = forked_dus("upscale", base, "-t", "1", "-o", tmp_path / "out", "--json")
    (warning,) = done.report["warnings"]
    assert (
        warning
        == f"{prefix}: numbered, but not from 0 to 5 like the layers; dus kept them as they are"
    )
    assert done.report["tensors"] == len(llama_tensors(10)) + len(extra)
    assert problems(tmp_path / "out", "--base", base) == []


def test_a_table_with_an_entry_per_layer_is_kept_or_follows_as_a_person_says(
    tmp_path: Path,
) -> None:
    base = model(tmp_path / "base", [(f"model.scales.{k}", "BF16", (4,)) for k in range(DEPTH)])
    done = forked_dus("upscale", base, "-o", tmp_path / "out", "-q")
    done.assert_one_line_error("model.scales", "--assume model.scales=keep", "=map")
    for choice, count in (("keep", DEPTH), ("map", 10)):
        out = tmp_path / choice
        report = forked_dus(
            "upscale", base, "-t", "1", "--assume", f"model.scales={choice}", "-o", out, "--json"
        ).report
        assert report["tensors"] == len(llama_tensors(10)) + count
        assert problems(out) == []
        assert problems(out, "--base", base) == []
        again = forked_dus(
            "upscale", "--from", out / "dus.json", "-o", tmp_path / f"{choice}-again", "--json"
        )
        assert again.report["tensors"] == report["tensors"]


def test_a_stack_that_is_as_long_as_the_output_is_deep_is_no_problem_for_verify(
    tmp_path: Path,
) -> None:
    base = model(tmp_path / "base", stack("vision.trunk.blocks", 10))
    forked_dus("upscale", base, "-t", "1", "-o", tmp_path / "out", "-q")
    assert problems(tmp_path / "out") == []
