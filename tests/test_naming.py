"""Names and numbers of layers anywhere in config.json, or in a quantiser's file: they follow or
are refused.
"""

from __future__ import annotations

import copy
from typing import Any

import pytest
from checkpoints import llama_config

from dus_cli.errors import ConfigError
from dus_cli.maps.layers import stack
from dus_cli.maps.model_config import deepen_config
from dus_cli.maps.naming import NumberedNames, follow_settings

EIGHT = stack(8, trim=2)  # 0…5, 2…7: base layer 3 stands as 3 and 7, base layer 7 as 11
SOURCES = [*range(6), *range(2, 8)]
NAMES = NumberedNames("model.layers", frozenset(("vision_tower.blocks",)))


def deepen(
    assume: dict[str, Any] | None = None, names: NumberedNames = NAMES, **fields: Any
) -> dict[str, Any]:
    config = llama_config(8) | fields
    before = copy.deepcopy(config)
    after = deepen_config(config, EIGHT, assume or {}, names).config
    assert config == before  # pure
    return {key: after[key] for key in fields}


BY_NUMBER = {str(layer): layer * 10 for layer in range(8)}
FOLLOWED_BY_NUMBER = {str(output): base * 10 for output, base in enumerate(SOURCES)}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"skip": ["head", "model.layers.3.mlp"]}, {"skip": ["head", "model.layers.3.mlp", "model.layers.7.mlp"]}),
        ({"skip": {"deep": [{"er": ["model.layers.7"]}]}}, {"skip": {"deep": [{"er": ["model.layers.11"]}]}}),
        ({"bits": {"layers.7.mlp": 8}}, {"bits": {"layers.11.mlp": 8}}),
        ({"bits": {"base_model.model.layers.7.mlp": 8}}, {"bits": {"base_model.model.layers.11.mlp": 8}}),
        ({"only": ["model.layers.7.self_attn*"]}, {"only": ["model.layers.11.self_attn*"]}),
        ({"first": "model.layers.7.mlp"}, {"first": "model.layers.11.mlp"}),
        ({"rope": BY_NUMBER}, {"rope": FOLLOWED_BY_NUMBER}),
        ({"a": {"b": BY_NUMBER | {"default": 1}}}, {"a": {"b": {"default": 1} | FOLLOWED_BY_NUMBER}}),
        ({"rope": {str(n): n for n in range(1, 9)}}, {"rope": {str(j + 1): b + 1 for j, b in enumerate(SOURCES)}}),
        ({"store": {"model.layers.3.up": {"tensors": ["model.layers.3.up.a"], "layer": 3, "lengths": [-1, 8]}}},
         {"store": {f"model.layers.{j}.up": {"tensors": [f"model.layers.{j}.up.a"], "layer": j, "lengths": [-1, 8]}
                    for j in (3, 7)}}),
        ({"all": [{"layer": layer} for layer in range(8)]}, {"all": [{"layer": layer} for layer in range(12)]}),
        ({"attn": {"windows": [5, 4, 3, 2, 1, 0, 9, 8]}}, {"attn": {"windows": [5, 4, 3, 2, 1, 0, 3, 2, 1, 0, 9, 8]}}),
        ({"attn": [[*range(8)], "x"]}, {"attn": [SOURCES, "x"]}),
        ({"per_layer": {"bits": list("abcdefgh")}}, {"per_layer": {"bits": list("abcdefcdefgh")}}),
        ({"pruned_heads": {"3": [0], "7": [1]}}, {"pruned_heads": {"3": [0], "7": [0], "11": [1]}}),
        ({"quantization": {"bits": 4, "model.layers.3.mlp": {"bits": 8}, "model.layers.7.mlp": False}},
         {"quantization": {"bits": 4, "model.layers.3.mlp": {"bits": 8}, "model.layers.7.mlp": {"bits": 8},
                           "model.layers.11.mlp": False}}),
        ({"quantization": {"bits_of_layers": [2, 4, 4, 4, 4, 4, 4, 8]}},
         {"quantization": {"bits_of_layers": [2, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 8]}}),
    ],
)  # fmt: skip
def test_what_names_a_layer_follows_it(before: dict[str, Any], after: dict[str, Any]) -> None:
    found = deepen(**before)
    assert found == after


def test_a_setting_keyed_by_name_is_the_one_of_the_copied_layer_in_every_output_layer() -> None:
    bits = {f"model.layers.{layer}.mlp.down_proj": {"bits": layer} for layer in range(8)}
    for key in ("quantization", "quantization_config", "of_our_own"):
        after = deepen(None, NAMES, **{key: {"group_size": 64, **bits}})[key]
        assert [
            after[f"model.layers.{output}.mlp.down_proj"]["bits"] for output in range(12)
        ] == SOURCES
        assert len(after) == 13


@pytest.mark.parametrize(
    "prefix", ["model.layers.layers", "decoder.transformer.stages", "transformer.encoder.layers"]
)
def test_names_under_a_stack_that_was_found_by_itself_follow(prefix: str) -> None:
    names = NumberedNames(prefix)
    after = deepen(None, names, quantization_config={"skip": [f"{prefix}.3.mlp", f"{prefix}.7"]})
    assert after == {
        "quantization_config": {"skip": [f"{prefix}.3.mlp", f"{prefix}.7.mlp", f"{prefix}.11"]}
    }


REFUSED: list[tuple[str, dict[str, Any]]] = [
    ("cfg", {"cfg": {"3": 1}}),
    ("cfg", {"cfg": {"0-3": 1, "4-7": 2}}),
    ("cfg.skip_layers", {"cfg": {"skip_layers": [3, 5]}}),
    ("cfg.layers.mlp", {"cfg": {"layers": {"mlp": [3, 5]}}}),
    ("cfg", {"cfg": {"sliding": [0, 1, 2, 4, 5, 6], "full": [3, 7]}}),
    ("cfg.full_idxs", {"cfg": {"full_idxs": [3, 7]}}),
    ("cfg.layer", {"cfg": [{"layer": 3, "bits": 2}]}),
    ("cfg.layers.start", {"cfg": {"layers": {"start": 2}}}),
    ("cfg", {"cfg": [[0, 1], [2, 3], [4, 5], [6, 7]]}),
    ("layer_7_scale", {"layer_7_scale": 0.5}),
    ("cfg.every_n_layers", {"cfg": {"every_n_layers": 2}}),
    ("cfg.sliding_window_pattern", {"cfg": {"sliding_window_pattern": 3}}),
    ("cfg.first_k_dense", {"cfg": {"first_k_dense": 2}}),
    ("cfg.pattern", {"cfg": {"pattern": "MAMAMAMA"}}),
    ("cfg.dense_layers", {"cfg": {"dense_layers": "3,4,5"}}),
    ("skip", {"skip": ["stages.blocks.3.mlp"]}),
    ("skip", {"skip": ["layer_3"]}),
    ("skip", {"skip": {"blk.3.attn_q": 1}}),
    ("skip", {"skip": [r"re:.*layers\.3\..*"]}),
    ("skip", {"skip": {"*.layers.[0-3].*": 1}}),
    ("start", {"start": "model.layers.3.mlp"}),
    (
        "quantization_config.bifurcation_layers",
        {"quantization_config": {"bifurcation_layers": [3, 4, 5, 7]}},
    ),
    ("quantization", {"quantization": {r"re:model\.layers\.3\..*": {"bits": 8}}}),
]


@pytest.mark.parametrize(("path", "fields"), REFUSED)
def test_what_may_name_a_layer_is_refused_by_its_path_and_may_be_kept(
    path: str, fields: dict[str, Any]
) -> None:
    with pytest.raises(ConfigError, match=r"looks like it describes single layers") as refusal:
        deepen(**fields)
    assert f"--assume {path}=keep" in str(refusal.value)
    assert deepen({path: "keep"}, **fields) == fields


def test_what_may_name_a_layer_follows_where_a_person_says_so() -> None:
    assert deepen({"cfg": "map"}, cfg={"3": 1}) == {"cfg": {"3": 1, "7": 1}}
    assert deepen({"cfg.skip_layers": "map"}, cfg={"skip_layers": [3, 6]}) == {
        "cfg": {"skip_layers": [3, 7, 10]}
    }
    assert deepen({"cfg": "map"}, cfg={"dense_layers": "3,6"}) == {
        "cfg": {"dense_layers": "3,7,10"}
    }
    assert deepen({"cfg": "map"}, cfg={"pattern": "MMAMMAMM"}) == {
        "cfg": {"pattern": "MMAMMA" + "AMMAMM"}
    }
    assert deepen({"skip": "map"}, skip=["layer_3", "x"]) == {"skip": ["layer_3", "layer_7", "x"]}
    assert deepen({"skip_layers": "map"}, skip_layers=[1, 6]) == {"skip_layers": [1, 10]}
    sorted_layers = {"sliding": [0, 1, 2, 4, 5, 6], "full": [3, 7]}
    assert deepen({"cfg": "map"}, cfg=sorted_layers)["cfg"]["full"] == [3, 7, 11]


@pytest.mark.parametrize(
    "fields",
    [
        {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}},
        {"id2label": {str(label): f"LABEL_{label}" for label in range(8)}},
        {"rope_scaling": {"long_factor": [1.0] * 8, "short_factor": [1] * 8, "low_freq_factor": 1,
                          "high_freq_factor": 4, "mrope_section": [2, 3, 3]}},
        {"vision_config": {"layers": [1, 3], "layer_types": {"0": 1}, "out": ["layer_1", "encoder.layers.3"]}},
        {"visual": {"layers": [1, 3], "depth": 3, "blocks": {"3": 1}}, "audio_processor": {"layer_ids": [3, 5]}},
        {"draft": {"model_type": "eagle", "layers": [1, 3], "skip": ["model.layers.3"]}},
        {"image_grid_pinpoints": [[336, 672]] * 8, "vision_feature_layer": [-2, -5], "suppress_tokens": [*range(8)]},
        {"generation": {"suppress_tokens": [*range(8)], "lang_to_id": {"0": 1, "3": 2}, "token_indices": [1, 3]}},
        {"quantization_config": {"weight_block_size": [128, 128], "modules_in_block_to_quantize": [["mlp.up"]] * 8}},
        {"quantization_config": {"ignore": ["vision_tower.blocks.3.mlp", "visual.blocks.3", "mlp.experts.3.up_proj"]}},
        {"quantization_config": {"config_for_layers": {"model.layers.0.mlp": {"vector_lens": [-1, 8]}}}},
        {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8}, "sparse": {"block_size": 7, "block_shape": [2, 4]}},
        {"_name_or_path": "/models/layer_3/model.layers.3", "transformers_version": "4.5.0.dev0", "hidden_act": "silu"},
        {"task_specific_params": {"summarization": {"max_length": 7, "num_beams": 2}}},
        {"encoder_settings": {"num_layers": 3}, "layer_norm_kind": "rms", "bad_words_ids": [[1, 2], [3]]},
    ],
)  # fmt: skip
def test_numbers_that_are_no_layers_stay_without_a_word(fields: dict[str, Any]) -> None:
    deeper = deepen_config(llama_config(8) | fields, EIGHT, {}, NAMES)
    assert deeper.config == llama_config(8) | fields | {"num_hidden_layers": 12}
    assert deeper.warnings == ()


def test_names_around_a_multimodal_models_decoder_follow_and_its_encoders_stay() -> None:
    vision = {"model_type": "siglip", "skip": ["layers.3"], "layers": [1, 3]}
    config = {
        "model_type": "llava",
        "text_config": llama_config(8) | {"skip": ["model.layers.7.mlp"]},
        "vision_config": vision,
        "quantization": {
            "language_model.model.layers.7.mlp": {"bits": 8},
            "vision_tower.blocks.7.mlp": {"bits": 8},
        },
        "image_sizes": [*range(8)],
    }
    after = deepen_config(
        config, EIGHT, {}, NumberedNames("language_model.model.layers", NAMES.others)
    ).config
    assert after["text_config"]["skip"] == ["model.layers.11.mlp"]
    assert list(after["quantization"]) == [
        "language_model.model.layers.11.mlp",
        "vision_tower.blocks.7.mlp",
    ]
    assert after["vision_config"] == vision
    assert after["image_sizes"] == [*range(8)]


def test_a_quantisers_file_beside_the_config_follows_or_is_refused_by_its_name() -> None:
    modelopt = {
        "producer": {"name": "modelopt", "version": "0.29.0"},
        "quantization": {"exclude_modules": ["lm_head", "model.layers.7.mlp"], "quantized_layers": {
            "model.layers.3.mlp.up_proj": {"quant_algo": "FP8"}}},
    }  # fmt: skip
    after = follow_settings(modelopt, EIGHT, NAMES, "hf_quant_config.json")
    assert after["producer"] == modelopt["producer"]
    assert after["quantization"]["exclude_modules"] == ["lm_head", "model.layers.11.mlp"]
    assert list(after["quantization"]["quantized_layers"]) == [
        "model.layers.3.mlp.up_proj",
        "model.layers.7.mlp.up_proj",
    ]
    with pytest.raises(
        ConfigError, match=r"hf_quant_config.json: exclude looks .* names single layers"
    ):
        follow_settings({"exclude": ["model.layers.1*"]}, EIGHT, NAMES, "hf_quant_config.json")
