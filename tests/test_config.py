"""config.json at the new depth: each layer keeps its kind, or the field is refused by name."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
from checkpoints import llama_config

from dus_cli.errors import ConfigError
from dus_cli.maps.layers import LayerMap, stack, typed_map
from dus_cli.maps.model_config import decoder_config, deepen_config
from dus_cli.maps.rules import PeriodAndOffset

EIGHT = stack(8, trim=2)  # 0…5, 2…7: the shift is 4


def deepen(layer_map: LayerMap = EIGHT, **fields: Any) -> dict[str, Any]:
    config = {k: v for k, v in (llama_config(8) | fields).items() if v is not ...}
    return deepen_config(config, layer_map).config


def kinds(text: str) -> list[str]:
    return [{"f": "full_attention", "s": "sliding_attention"}[c] for c in text]


@pytest.mark.parametrize("key", ["num_hidden_layers", "n_layer", "num_layers", "n_layers"])
def test_the_depth_is_found_under_each_of_its_names(key: str) -> None:
    fields: dict[str, Any] = {"num_hidden_layers": ..., key: 8}
    assert deepen(**fields)[key] == 12


def test_a_list_with_one_entry_per_layer_follows_the_map() -> None:
    after = deepen(
        layer_types=kinds("sssfsssf"), model_type="cohere2", no_rope_layers=[0, 1, 2, 3, 4, 5, 6, 7]
    )
    assert after["layer_types"] == kinds("sssfss" + "sfsssf")
    assert after["no_rope_layers"] == [*range(6), *range(2, 8)]


def test_an_unknown_list_of_that_length_follows_and_is_reported() -> None:
    deeper = deepen_config(llama_config(8) | {"rank_of_layer": list("abcdefgh")}, EIGHT)
    after, warnings = deeper.config, deeper.warnings
    assert after["rank_of_layer"] == list("abcdefcdefgh")
    assert any("rank_of_layer" in warning for warning in warnings)


def test_a_nested_text_config_is_deepened_and_the_rest_untouched() -> None:
    text = llama_config(8) | {"layer_types": kinds("sssfsssf")}
    vision = {"num_hidden_layers": 8, "layer_types": [1] * 8}
    config = {"model_type": "llava", "text_config": text, "vision_config": vision, "z": 1}
    after = deepen_config(config, EIGHT).config
    assert list(after) == list(config)
    assert after["text_config"]["num_hidden_layers"] == 12
    assert len(after["text_config"]["layer_types"]) == 12
    assert after["vision_config"] == vision


def test_a_wrapper_that_repeats_the_depth_repeats_the_new_one() -> None:
    config = {"model_type": "llava", "text_config": llama_config(8), "num_hidden_layers": 8}
    after = deepen_config(config, EIGHT).config
    assert after["num_hidden_layers"] == 12


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"num_hidden_layers": "8"},
        {"num_hidden_layers": 0},
        {"num_hidden_layers": True},
        {"num_hidden_layers": 8.0},
        {"num_hidden_layers": 10**12},
        {"num_hidden_layers": 8, "num_layers": 4},
        {"num_hidden_layers": 4, "text_config": {"num_hidden_layers": 8}},
        {"text_config": [8]},
    ],
)
def test_a_depth_that_is_none_is_refused(config: dict[str, Any]) -> None:
    with pytest.raises(ConfigError):
        decoder_config(config)


def test_a_list_of_another_length_disagrees_with_the_depth() -> None:
    with pytest.raises(ConfigError, match="layer_types has 7 entries for 8 layers"):
        deepen(layer_types=kinds("sssfsss"))


def test_index_sets_become_the_layers_whose_source_is_in_the_set() -> None:
    assert deepen(model_type="qwen3_moe", mlp_only_layers=[0, 3])["mlp_only_layers"] == [0, 3, 7]
    with pytest.raises(ConfigError, match="mlp_only_layers names a layer beyond"):
        deepen(model_type="qwen3_moe", mlp_only_layers=[8])


def test_a_period_stays_while_the_map_keeps_its_phase() -> None:
    assert deepen(decoder_sparse_step=4)["decoder_sparse_step"] == 4
    with pytest.raises(ConfigError, match=r"decoder_sparse_step is 3, .* --trim 1 would keep it"):
        deepen(decoder_sparse_step=3)


def test_a_period_is_not_looked_at_where_the_explicit_list_is_there() -> None:
    after = deepen(
        model_type="gemma3_text", sliding_window_pattern=3, layer_types=kinds("ssfssfss")
    )
    assert after["sliding_window_pattern"] == 3
    assert after["layer_types"] == kinds("ssfssf" + "fssfss")


def test_kinds_that_the_class_would_derive_are_written_out() -> None:
    after = deepen(model_type="gemma3_text", sliding_window_pattern=3)
    assert after["layer_types"] == kinds("ssfssf" + "fssfss")
    assert after["sliding_window_pattern"] == 3


@pytest.mark.parametrize("period", [0, -1, "3", 2.5])
def test_a_period_that_is_none_is_refused(period: object) -> None:
    with pytest.raises(ConfigError, match="sliding_window_pattern is"):
        deepen(model_type="gemma3_text", sliding_window_pattern=period)


@pytest.mark.parametrize(
    ("model_type", "key"),
    [
        ("cohere2_moe", "sliding_window_pattern"),
        ("llama4_text", "interleave_moe_layer_step"),
        ("axk1", "moe_layer_freq"),
        ("gemma3_text", "sliding_window_pattern"),
    ],
)
@pytest.mark.parametrize("period", [0, "3"])
def test_a_period_that_no_list_can_be_made_up_from_is_refused(
    model_type: str, key: str, period: object
) -> None:
    with pytest.raises(ConfigError, match=rf"{key} is .*{period}.*, not a number of layers"):
        deepen(EIGHT, **{"model_type": model_type, key: period})


def test_a_pattern_that_dus_cannot_derive_is_refused_by_name() -> None:
    with pytest.raises(ConfigError, match="lacks layer_types"):
        deepen(model_type="exaone4", sliding_window=None)


def test_the_list_is_left_out_where_the_class_would_make_up_the_same() -> None:
    after = deepen(stack(8, trim=1), model_type="gemma2", layer_types=None)  # the shift is 6
    assert after["layer_types"] is None


def test_a_text_with_a_character_per_layer_follows_the_map() -> None:
    after = deepen(hybrid_override_pattern="M-M*M*E-")
    assert after["hybrid_override_pattern"] == "M-M*M*" + "M*M*E-"


def test_a_scale_that_the_model_divides_by_the_root_of_its_depth_grows_with_it() -> None:
    assert deepen(model_type="minicpm3", scale_depth=1.4)["scale_depth"] == pytest.approx(
        1.4 * (12 / 8) ** 0.5
    )


def test_a_layer_that_is_unlike_the_others_stands_only_in_its_place() -> None:
    assert deepen(model_type="rwkv")["num_hidden_layers"] == 12
    with pytest.raises(
        ConfigError, match=r"layer 0 is unlike the others .* --trim 1 or 2 or 3 would keep it"
    ):
        deepen(stack(8, trim=0), model_type="rwkv")
    with pytest.raises(ConfigError, match="layer 7 is unlike the others"):
        deepen(typed_map("0:8,7", 8), model_type="gpt_neox_japanese")


def test_jamba_takes_another_period_where_one_fits() -> None:
    fields: dict[str, Any] = {
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    }
    # attention in layer 4, output layers 4 and 10
    after = deepen(stack(8, trim=1), model_type="jamba", **fields)
    assert (after["attn_layer_period"], after["attn_layer_offset"]) == (6, 4)
    with pytest.raises(
        ConfigError, match=r"attn_layer_period is 8, .* --trim 0 or 1 would keep it"
    ):
        deepen(model_type="jamba", **fields)


def test_a_person_may_decide_about_a_field_that_dus_does_not_know() -> None:
    config = llama_config(8) | {"attention_pattern": "SSFFSSFF", "skip_layers": [1, 5]}
    deeper = deepen_config(config, EIGHT, {"attention_pattern": "map", "skip_layers": "keep"})
    assert deeper.config["attention_pattern"] == "SSFFSS" + "FFSSFF"
    assert deeper.config["skip_layers"] == [1, 5]
    assert sum("as --assume says" in warning for warning in deeper.warnings) == 2


@pytest.mark.parametrize(
    ("assume", "message"),
    [
        ({"layer_types": "keep"}, "dus knows how this field follows"),
        ({"nothing": "keep"}, "has no such field"),
        ({"vocab_size": "map"}, "neither a list nor a text"),
        ({"short_list": "map"}, "short_list has 2 entries for 8 layers"),
    ],
)
def test_an_assumption_that_cannot_be_is_refused(assume: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        deepen_config(llama_config(8) | {"short_list": [1, 2]}, EIGHT, assume)


def test_a_threshold_stays_while_nothing_below_it_is_repeated() -> None:
    assert deepen(model_type="deepseek_v3", first_k_dense_replace=2)["first_k_dense_replace"] == 2
    with pytest.raises(
        ConfigError, match=r"first_k_dense_replace is 3: .* use a trim of 3 or more"
    ):
        deepen(model_type="deepseek_v3", first_k_dense_replace=3)


def test_a_threshold_moves_with_its_layers() -> None:
    after = deepen(typed_map("0:2,0:8", 8), model_type="deepseek_v3", first_k_dense_replace=8)
    assert after["first_k_dense_replace"] == 10


def test_max_window_layers_counts_only_when_windows_are_used() -> None:
    off = deepen(model_type="qwen2", max_window_layers=7, use_sliding_window=False)
    assert off["max_window_layers"] == 7
    on = deepen(model_type="qwen2", max_window_layers=7, use_sliding_window=True)
    # base layer 7 alone has a window, and stands once, last
    assert on["layer_types"] == kinds("ffffff" + "fffffs")
    assert on["max_window_layers"] == 7  # not read where the list is


@pytest.mark.parametrize(
    ("fields", "name"),
    [
        ({"attention_pattern": "SSF"}, "attention_pattern"),
        ({"global_every_n": 3}, "global_every_n"),
        ({"skip_layers": [1, 5]}, "skip_layers"),
        ({"moe_frequency": 2}, "moe_frequency"),
        ({"rope_interval": 4}, "rope_interval"),
        ({"special_layer_ids": [3]}, "special_layer_ids"),
        ({"num_kv_shared_layers": 2}, "num_kv_shared_layers"),
        ({"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx"),
        ({"per_layer_config": {"3": {}}}, "per_layer_config"),
        ({"hybrid_override_pattern": "M-M*-M-M-"}, "hybrid_override_pattern"),
    ],
)
def test_what_is_not_understood_is_refused_by_name(fields: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=name):
        deepen(**fields)


@pytest.mark.parametrize("model_type", ["diffllama", "zamba2", "beam"])
def test_types_that_copying_cannot_deepen_are_refused(model_type: str) -> None:
    with pytest.raises(ConfigError, match=f"'{model_type}' cannot be deepened"):
        deepen(model_type=model_type)


def test_an_unknown_type_with_nothing_per_layer_goes_through_with_a_warning() -> None:
    warnings = deepen_config(llama_config(8) | {"model_type": "our_own"}, EIGHT).warnings
    assert any("'our_own' is not one dus knows" in warning for warning in warnings)


@pytest.mark.parametrize(
    "fields",
    [
        {"eos_token_id": list(range(8))},
        {"rope_parameters": {"short_factor": [1.0] * 8, "rope_type": "longrope"}},
        {"num_hidden_layers": 8, "layer_norm_epsilon": 1e-5},
        {"sliding_window": 4096, "moe_layer_freq": 1, "layer_types": None, "mlp_only_layers": []},
    ],
)
def test_what_says_nothing_about_layers_is_kept(fields: dict[str, Any]) -> None:
    deeper = deepen_config(llama_config(8) | fields, EIGHT)
    after, warnings = deeper.config, deeper.warnings
    assert after == llama_config(8) | fields | {"num_hidden_layers": 12}
    assert warnings == ()


def test_lists_of_module_names_follow_their_layers() -> None:
    after = deepen(
        quantization_config={
            "quant_method": "fp8",
            "modules_to_not_convert": [
                "lm_head",
                "model.layers.0.mlp.gate",
                "model.layers.3",
                "visual.blocks.3.x",
            ],
            "ignore": ["re:.*lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"]}},
            "per_module": {"model.layers.2.mlp": {"bits": 4}},
        }
    )["quantization_config"]
    assert after["modules_to_not_convert"] == [
        "lm_head", "model.layers.0.mlp.gate", "model.layers.3", "model.layers.7", "visual.blocks.3.x",
    ]  # fmt: skip
    assert after["ignore"] == ["re:.*lm_head"]
    assert after["config_groups"] == {"group_0": {"targets": ["Linear"]}}
    assert list(after["per_module"]) == ["model.layers.2.mlp", "model.layers.6.mlp"]


def test_an_expression_that_names_single_layers_is_refused() -> None:
    with pytest.raises(ConfigError, match="names single layers"):
        deepen(quantization_config={"ignore": [r"re:.*layers\.3\.mlp.*"]})


# --- types that are published with code of their own ----------------------------------------------


@pytest.mark.parametrize(
    "named",
    [
        {"model_type": "minicpm"},
        {"model_type": "minicpm", "num_experts": 8, "num_experts_per_tok": 2},
        {"model_type": ..., "architectures": ["MiniCPMForCausalLM"]},
        {
            "model_type": ...,
            "architectures": None,
            "auto_map": {"AutoConfig": "configuration_minicpm.MiniCPMConfig"},
        },
        {"model_type": "minicpmv", "vision_config": {"depth": 2}},
    ],
)
def test_minicpm_of_every_age_keeps_its_residual_scale(named: dict[str, Any]) -> None:
    config = {
        k: v for k, v in (llama_config(8) | named | {"scale_depth": 1.4}).items() if v is not ...
    }
    deeper = deepen_config(config, EIGHT)
    assert deeper.config["scale_depth"] / 12**0.5 == pytest.approx(1.4 / 8**0.5)
    assert deeper.warnings == ()
    assert "scale_depth" not in deepen(model_type="minicpmv")  # on a Llama or a Qwen
    # the class takes 1
    assert deepen(model_type="minicpm")["scale_depth"] == pytest.approx((12 / 8) ** 0.5)


def test_step3_keeps_its_experts_in_their_text_of_numbers() -> None:
    assert (
        deepen(model_type="step3_text", moe_layers_enum="3,4,5,6")["moe_layers_enum"]
        == "3,4,5,7,8,9,10"
    )
    assert deepen(model_type="our_own", moe_layers_enum="3, 7")["moe_layers_enum"] == "3,7,11"
    with pytest.raises(ConfigError, match="moe_layers_enum names a layer beyond"):
        deepen(model_type="step3_text", moe_layers_enum="3,8")


def test_openelm_has_its_depth_and_its_lists_by_its_own_names() -> None:
    openelm: dict[str, Any] = {
        "model_type": "openelm",
        "num_hidden_layers": ...,
        "num_transformer_layers": 8,
    }
    after = deepen(**openelm, num_query_heads=[*range(8)], num_kv_heads=[*range(8)], ffn_multipliers=[*range(8)],
                   qkv_multipliers=[0.5, 1.0])  # fmt: skip
    followed = [*range(6), *range(2, 8)]
    assert after["num_transformer_layers"] == 12
    assert [after[key] for key in ("num_query_heads", "num_kv_heads", "ffn_multipliers")] == [
        followed
    ] * 3
    assert after["qkv_multipliers"] == [0.5, 1.0]  # not looked at where the lists are
    spread = deepen(**openelm, num_query_heads=[4] * 8, ffn_multipliers=[0.5, 4.0])[
        "ffn_multipliers"
    ]
    assert spread[0] == 0.5
    assert spread[-1] == 4.0
    assert len(spread) == 12
    assert spread[6:] == [*spread[2:6], 3.5, 4.0]
    with pytest.raises(ConfigError, match="num_query_heads that is computed from it is missing"):
        deepen(**openelm, qkv_multipliers=[0.5, 1.0])


@pytest.mark.parametrize(
    "key", ["num_transformer_layers", "num_decoder_layers", "n_blocks", "num_blocks", "depth"]
)
def test_the_depth_is_found_under_names_that_few_use(key: str) -> None:
    fields: dict[str, Any] = {"num_hidden_layers": ..., key: 8}
    assert deepen(**fields)[key] == 12
    # Of something else, beside the usual name:
    beside = None if key.endswith("_layers") else deepen(EIGHT, **{key: 3})
    assert beside is None or (beside["num_hidden_layers"], beside[key]) == (12, 3)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"model_type": "deepseek", "first_k_dense_replace": 3, "moe_layer_freq": 1},
            "use a trim of 3 or more",
        ),
        ({"model_type": "kimi_k2", "first_k_dense_replace": 3}, "use a trim of 3 or more"),
        (
            {"model_type": "plamo2", "mamba_step": 3, "mamba_enabled": True},
            "mamba_step is 3, .* --trim 1 would keep",
        ),
        (
            {"model_type": "phi3small", "dense_attention_every_n_layers": 3},
            "every_n_layers is 3, .* --trim 1 would",
        ),
        ({"model_type": "bailing_moe_linear"}, "cannot be deepened"),
    ],
)
def test_types_with_code_of_their_own_are_refused_where_transformers_own_would_be(
    fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        deepen(**fields)


@pytest.mark.parametrize(
    "model_type", ["chatglm", "baichuan", "internlm2", "qwen", "deepseek", "openelm", "plamo2"]
)
def test_types_with_code_of_their_own_are_known(model_type: str) -> None:
    deeper = deepen_config(llama_config(8) | {"model_type": model_type}, EIGHT)
    assert deeper.warnings == ()


# --- no general refusal is the last word ----------------------------------------------------------


@pytest.mark.parametrize(
    "fields",
    [
        {"scale_depth": 1.4},
        {"sliding_window_pattern": 3},
        {"decoder_sparse_step": 3},
        {"first_k_dense_replace": 3},
        {"mlp_only_layers": [8]},
        {"layer_types": ["full_attention"] * 7},
        {"per_layer_config": {"3": {}}},
        {"hybrid_override_pattern": "M-M*-M-M-"},
        {"scale_attn_by_inverse_layer_idx": True},
    ],
)
def test_what_a_general_rule_refuses_a_person_may_keep(fields: dict[str, Any]) -> None:
    (key,) = fields
    config = llama_config(8) | {"model_type": "our_own"} | fields
    with pytest.raises(ConfigError, match=f"--assume {key}=keep"):
        deepen_config(config, EIGHT)
    deeper = deepen_config(config, EIGHT, {key: "keep"})
    assert deeper.config == config | {"num_hidden_layers": 12}
    assert f"config.json: {key} was kept, as --assume says" in deeper.warnings
    assert not any("nothing per-layer" in warning for warning in deeper.warnings)


def test_what_a_general_rule_refuses_follows_where_a_person_says_so() -> None:
    def mapped(key: str, value: Any) -> Any:
        return deepen_config(llama_config(8) | {key: value}, EIGHT, {key: "map"}).config[key]

    assert mapped("scale_depth", 1.4) == pytest.approx(1.4 * (12 / 8) ** 0.5)
    assert mapped("per_layer_config", {"3": 1}) == {"3": 1, "7": 1}
    assert mapped("attention_types", [[["a", "b"], 4]]) == [
        [[kind], 1] for kind in "ababab" + "ababab"
    ]
    with pytest.raises(ConfigError, match="only =keep is possible"):
        mapped("sliding_window_pattern", 3)


# --- what is said of a type in no table -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"block_configs": [*range(8)]}, "block_configs"),
        ({"layer_types": kinds("sssfsssf")}, "layer_types"),
        ({"mlp_only_layers": [3]}, "mlp_only_layers"),
        ({"decoder_sparse_step": 4}, "decoder_sparse_step"),
        ({"first_k_dense_replace": 2}, "first_k_dense_replace"),
        (
            {"rank_of_layer": list("abcdefgh"), "layer_types": kinds("sssfsssf")},
            "layer_types, rank_of_layer",
        ),
        ({"quantization_config": {"ignore": ["model.layers.3.mlp"]}}, "quantization_config"),
        ({"rope": {str(layer): layer for layer in range(8)}}, "rope"),
    ],
)
def test_the_warning_about_a_type_names_what_followed(fields: dict[str, Any], named: str) -> None:
    warning = deepen_config(llama_config(8) | {"model_type": "our_own"} | fields, EIGHT).warnings[0]
    assert f"followed the map by general rules ({named}), but check" in warning
    assert "nothing per-layer" not in warning


@pytest.mark.parametrize(
    "fields", [{}, {"moe_layer_freq": 1}, {"num_attention_heads": 4, "mlp_only_layers": []}]
)
def test_the_warning_about_a_type_says_where_nothing_was_found(fields: dict[str, Any]) -> None:
    warning = deepen_config(llama_config(8) | {"model_type": "our_own"} | fields, EIGHT).warnings[0]
    assert "nothing per-layer was found in its config" in warning


def test_a_period_and_an_offset_are_found_where_trying_every_pair_would_find_them() -> None:
    rule = PeriodAndOffset("period", "offset", (8, 4), "attention", "mamba")
    for num_layers, period in product(range(1, 9), range(1, 5)):
        maps = [
            (*range(a), *range(b, num_layers))
            for a in range(1, num_layers + 1)
            for b in range(num_layers)
        ]
        for offset, sources in product(range(period), maps):
            wanted = [base % period == offset for base in sources]
            pairs = [
                (period, offset),
                *((p, o) for p in range(1, len(sources) + 1) for o in range(p)),
            ]
            fits = (
                pair
                for pair in pairs
                if wanted == [j % pair[0] == pair[1] for j in range(len(sources))]
            )
            expected = next(fits, None)
            fields = {"period": period, "offset": offset}
            if expected is None:
                with pytest.raises(ConfigError, match="out of step"):
                    rule.follow(fields, LayerMap(sources, num_layers))
            else:
                changed = rule.follow(fields, LayerMap(sources, num_layers))
                assert tuple((fields | changed).values()) == expected
