"""The same proof on whole multimodal models: the decoder is deepened, what stands beside it stays.

A model type of transformers' image-text-to-text mapping ends as equal, refused by name, or not
tried for a reason that is given; docs/architectures.md lists them all. `DUS_WRITE_TABLE=1 pytest
tests/test_wrappers.py` writes it anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from tiny import forked_dus as dus

from dus_cli.errors import ConfigError
from dus_cli.maps.layers import stack, typed_map
from dus_cli.maps.model_config import deepen_config

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import zoo  # noqa: E402  (it imports both)
from equality import (  # noqa: E402
    Base,
    check_equality,
    check_table,
    save_base,
    without_engines,
)

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models

OUTCOMES: dict[str, str] = {}

ENCODER_DECODER = "it is an encoder-decoder model"
REFUSED = {
    "blip": "its text decoder reads the image through cross-attention in every layer",
    "diffusion_gemma": "it denoises blocks of text, with an encoder and a decoder that share one stack of layers",
    "evolla": "its adapters stand in every (depth / aligner_num_add_layers)-th layer",
    "florence2": ENCODER_DECODER,
    "idefics": "its cross-attention stands in a stack of its own, found by the layer's number",
    "pi0": "it is two models, a language model and an action expert",
    "pix2struct": ENCODER_DECODER,
    "pp_formulanet": ENCODER_DECODER,
    "t5gemma2": ENCODER_DECODER,
    "udop": ENCODER_DECODER,
    "vision-encoder-decoder": ENCODER_DECODER,
}
NOT_TRIED = {
    "gemma3n": "its vision tower needs timm; its decoder is gemma3n_text above",
    "inkling_mm_model": "its vision tower needs scipy; its decoder is inkling_text above",
}
EQUAL = sorted(zoo.WRAPPERS.keys() - REFUSED.keys() - NOT_TRIED.keys())

# Types whose base generates otherwise with the cache than without (qwen3_vl_moe), or not at all on
# tokens alone.
OTHERWISE_WITHOUT_CACHE = frozenset(
    "blip-2 instructblip instructblipvideo kosmos-2 qwen2_5_omni_thinker qwen3_omni_moe_thinker "
    "qwen3_vl_moe".split()
)


@pytest.mark.parametrize("model_type", EQUAL)
def test_the_written_model_equals_the_base_with_its_decoder_rearranged(
    model_type: str, tmp_path: Path
) -> None:
    base = Base.load(model_type, save_base(model_type, tmp_path, whole=True), whole=True)
    report, written = check_equality(base, tmp_path / "out")
    assert without_engines(report) == []
    if model_type not in OTHERWISE_WITHOUT_CACHE:
        assert zoo.generates_alike_without_cache(written)
    OUTCOMES[model_type] = ", ".join(f"`{name}`" for name in report["kinds"])


@pytest.mark.parametrize("model_type", sorted(REFUSED))
def test_what_no_map_can_deepen_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    config = {
        "model_type": model_type,
        "text_config": {"model_type": f"{model_type}_text", "num_hidden_layers": 2},
    }
    base = write_checkpoint(tmp_path / "base", llama_tensors(2), config)
    run = dus("upscale", base, "-o", tmp_path / "out", "-q")
    run.assert_one_line_error("cannot be deepened by copying layers", REFUSED[model_type])
    OUTCOMES[model_type] = ""


def test_a_wrapper_around_an_encoder_decoder_is_refused(tmp_path: Path) -> None:
    text = {"model_type": "t5", "num_layers": 2, "num_decoder_layers": 2}
    base = write_checkpoint(
        tmp_path / "base", llama_tensors(2), {"model_type": "blip-2", "text_config": text}
    )
    dus("upscale", base, "-o", tmp_path / "out", "-q").assert_one_line_error(
        "'t5' cannot", ENCODER_DECODER
    )


def test_the_table_in_the_docs_is_what_was_found() -> None:
    if OUTCOMES.keys() | NOT_TRIED.keys() != zoo.WRAPPERS.keys():
        pytest.skip("needs all wrappers in one run")
    rows = []
    for name in sorted(zoo.WRAPPERS):
        outcome = f"refused: {REFUSED[name]}" if name in REFUSED else "equal"
        outcome = f"not tried: {NOT_TRIED[name]}" if name in NOT_TRIED else outcome
        rows.append(f"| {name} | {outcome} | {OUTCOMES.get(name, '')} |")
    check_table("the wrappers", rows)


# --- layers that the wrapper knows by their numbers -----------------------------------------------


def deepened(wrapper: str, trim: int, decoder: str = "llama", **fields: Any) -> dict[str, Any]:
    text = llama_config(8) | {"model_type": decoder}
    return deepen_config(
        {"model_type": wrapper, "text_config": text, **fields}, stack(8, trim=trim)
    ).config


DEEPSTACK = {"qwen3_vl": "qwen3_vl_text", "qwen3_vl_moe": "qwen3_vl_moe_text", "cohere_compass": "cohere_compass_text",
             "cosmos3_omni": "qwen3_vl_text", "granite_docling": "granite_docling_text",
             "qwen3_omni_moe_thinker": "qwen3_omni_moe_text"}  # fmt: skip


@pytest.mark.parametrize("wrapper", DEEPSTACK)
def test_layers_that_take_visual_features_stay_first_and_single(wrapper: str) -> None:
    vision = {"deepstack_visual_indexes": [5, 11]}
    assert deepened(wrapper, 2, DEEPSTACK[wrapper], vision_config=vision)["vision_config"] == vision
    with pytest.raises(
        ConfigError, match=r"deepstack_visual_indexes has 2 entries.*--trim 2 or 3 would keep it"
    ):
        deepened(wrapper, 1, DEEPSTACK[wrapper], vision_config=vision)
    # what the class takes: three
    with pytest.raises(ConfigError, match=r"has 3 entries.*--trim 3 would"):
        deepened(wrapper, 2, DEEPSTACK[wrapper], vision_config={"depth": 27})
    moved = typed_map("1,0,2:8", 8)
    with pytest.raises(ConfigError, match="deepstack_visual_indexes"):
        deepen_config(
            {"model_type": wrapper, "text_config": llama_config(8), "vision_config": vision}, moved
        )


def test_layers_at_which_features_are_added_once_move_or_are_refused() -> None:
    fields = {"deepstack_layer_map": [[-19, 1], [-13, 7]], "spatial_target_layers": [0, 6]}
    after = deepened("granite4_vision", 2, "granite4_vision_text", **fields)
    assert after["deepstack_layer_map"] == [[-19, 1], [-13, 11]]
    assert after["spatial_target_layers"] == [0, 10]
    with pytest.raises(ConfigError, match=r"spatial_target_layers is .* --trim 3 would keep it"):
        deepened("granite4_vision", 2, "granite4_vision_text", spatial_target_layers=[2])
    with pytest.raises(ConfigError, match=r"spatial_target_layers is .*not a list of 8 layers"):
        deepened("granite4_vision", 2, "granite4_vision_text", spatial_target_layers=[8])


def test_layers_that_take_keys_from_another_layer_are_refused() -> None:
    own: dict[str, Any] = {"model_type": "mistral_large4_text", "kv_source_layers": list(range(8))}
    assert deepen_config(llama_config(8) | own, stack(8, trim=2)).config[
        "kv_source_layers"
    ] == list(range(12))
    with pytest.raises(ConfigError, match="kv_source_layers cannot follow"):
        deepen_config(
            llama_config(8) | own | {"kv_source_layers": [0, 0, *range(2, 8)]}, stack(8, trim=2)
        )


# --- older files ----------------------------------------------------------------------------------


def test_a_decoder_without_its_type_is_taken_by_the_wrappers_name(
    edit_config: Callable[..., None],
) -> None:
    text = {
        **llama_config(8),
        "use_sliding_window": True,
        "max_window_layers": 7,
        "sliding_window": 6,
    }
    del text["model_type"]
    nested = deepen_config({"model_type": "qwen2_5_vl", "text_config": text}, stack(8, trim=2))
    flat = deepen_config(
        {**text, "model_type": "qwen2_5_vl", "vision_config": {"depth": 2}}, stack(8, trim=2)
    )
    for found, config in ((nested, nested.config["text_config"]), (flat, flat.config)):
        assert config["layer_types"] == [*["full_attention"] * 11, "sliding_attention"]
        assert found.warnings == ()


def test_a_decoder_without_its_depth_is_refused_with_what_to_do() -> None:
    config = {"model_type": "llava", "text_config": {"model_type": "llama", "vocab_size": 32064}}
    with pytest.raises(
        ConfigError, match="load and save the base once with a current transformers"
    ):
        deepen_config(config, stack(8, trim=2))


@pytest.mark.parametrize(
    "prefix", ["", "model.language_model.", "language_model.", "language_model.model."]
)
def test_older_and_newer_names_of_the_decoders_tensors_are_found(
    prefix: str, tmp_path: Path
) -> None:
    inner = "" if prefix.endswith("model.") and prefix != "language_model." else "model."
    tensors = [(prefix + inner + t[0].removeprefix("model."), t[1], t[2]) for t in llama_tensors(4)]
    tensors += [(f"visual.blocks.{k}.w.weight", "BF16", (8,)) for k in range(3)]
    config = {"model_type": "llava", "text_config": llama_config(4), "vision_config": {"depth": 3}}
    base = write_checkpoint(tmp_path / "base", tensors, config)
    report = dus("upscale", base, "-t", "1", "-o", tmp_path / "out", "--json").report
    assert report["warnings"] == []
    assert report["tensors"] == 3 + 3 + 6 * 9
