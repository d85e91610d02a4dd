"""Quantised checkpoints: every tensor of a layer goes with it, and so do the names in
`quantization_config`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Tensor, llama_config, write_checkpoint
from tiny import forked_dus as dus
from written import layer_bytes, names_and_bytes

from dus_cli.errors import ConfigError
from dus_cli.maps.layers import stack
from dus_cli.maps.model_config import deepen_config

MAP = [0, 1, 2, 3, 2, 3, 4, 5]  # six layers, trim 2

# The tensors of one linear layer as each method saves them: ending, dtype, shape.
SAVED: dict[str, list[Tensor]] = {
    "gptq": [("qweight", "I32", (8, 16)), ("qzeros", "I32", (2, 4)), ("scales", "F16", (2, 16)),
             ("g_idx", "I32", (64,))],
    "awq": [("qweight", "I32", (64, 4)), ("qzeros", "I32", (2, 4)), ("scales", "F16", (2, 16))],
    "fp8": [("weight", "F8_E4M3", (16, 64)), ("weight_scale_inv", "F32", (1, 1))],
    "compressed-tensors": [("weight_packed", "I32", (16, 8)), ("weight_scale", "BF16", (16, 2)),
                           ("weight_shape", "I64", (2,)), ("input_scale", "F32", (1,))],
    "bitsandbytes": [("weight", "U8", (512, 1)), ("weight.absmax", "U8", (16,)), ("weight.quant_map", "F32", (16,)),
                     ("weight.nested_absmax", "F32", (1,)), ("weight.nested_quant_map", "F32", (256,)),
                     ("weight.quant_state.bitsandbytes__nf4", "U8", (81,))],
    "mxfp4": [("gate_up_proj_blocks", "U8", (4, 16, 2, 16)), ("gate_up_proj_scales", "U8", (4, 16, 2)),
              ("gate_up_proj_bias", "BF16", (4, 16))],
}  # fmt: skip

# Lists of names in the config of each method, and what they must become.
NAMED: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "gptq": (
        {"bits": 4, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts.3.up_proj"]],
         "block_name_to_quantize": "model.layers",
         "dynamic": {"model.layers.3.mlp": {"bits": 8}, r"-:.*\.\d+\.self_attn\.q_proj": {}, r"+:.*lm_head.*": {}}},
        {"bits": 4, "modules_in_block_to_quantize": [["self_attn.q_proj"], ["mlp.experts.3.up_proj"]],
         "block_name_to_quantize": "model.layers",
         "dynamic": {"model.layers.3.mlp": {"bits": 8}, "model.layers.5.mlp": {"bits": 8},
                     r"-:.*\.\d+\.self_attn\.q_proj": {}, r"+:.*lm_head.*": {}}},
    ),
    "awq": (
        {"modules_to_not_convert": ["lm_head", "model.layers.2.mlp.gate", "model.layers.1."]},
        {"modules_to_not_convert": ["lm_head", "model.layers.2.mlp.gate", "model.layers.4.mlp.gate",
                                    "model.layers.1."]},
    ),
    "fp8": (
        {"weight_block_size": [128, 128], "ignored_layers": ["model.layers.5.self_attn"]},
        {"weight_block_size": [128, 128], "ignored_layers": ["model.layers.7.self_attn"]},
    ),
    "compressed-tensors": (
        {"ignore": ["re:.*lm_head", r"re:.*experts\.[0-9]+\.w[13]", "model.layers.4.mlp.down_proj"],
         "config_groups": {"group_0": {"targets": ["Linear", "model.layers.2.mlp.up_proj"]}}},
        {"ignore": ["re:.*lm_head", r"re:.*experts\.[0-9]+\.w[13]", "model.layers.6.mlp.down_proj"],
         "config_groups": {"group_0": {"targets": ["Linear", "model.layers.2.mlp.up_proj",
                                                   "model.layers.4.mlp.up_proj"]}}},
    ),
    "bitsandbytes": (
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.3.mlp"]},
        {"load_in_4bit": True, "llm_int8_skip_modules": ["lm_head", "model.layers.3.mlp", "model.layers.5.mlp"]},
    ),
    "mxfp4": (
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]},
        {"modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens"]},
    ),
}  # fmt: skip


@pytest.mark.parametrize("method", SAVED)
def test_every_tensor_of_a_quantised_layer_goes_with_it(method: str, tmp_path: Path) -> None:
    module = "mlp.experts" if method == "mxfp4" else "mlp.up_proj"
    saved = [(f"{module}.{name}", dtype, shape) for name, dtype, shape in SAVED[method]]
    saved.append(("input_layernorm.weight", "BF16", (64,)))
    tensors = [
        (f"model.layers.{layer}.{name}", dtype, shape)
        for layer in range(6)
        for name, dtype, shape in saved
    ]
    tensors += [
        ("model.embed_tokens.weight", "BF16", (32, 64)),
        ("model.norm.weight", "BF16", (64,)),
    ]
    before, after = NAMED[method]
    config = llama_config(6) | {"quantization_config": {"quant_method": method, **before}}
    base = write_checkpoint(tmp_path / "base", tensors, config, num_shards=2)
    report = dus(
        "upscale", base, "-t", "2", "-o", tmp_path / "out", "--json", "--verify", "full"
    ).report
    assert report["layer_map"] == MAP
    assert report["warnings"] == []
    assert layer_bytes(tmp_path / "out") == {output: {layer} for output, layer in enumerate(MAP)}
    ours, theirs = names_and_bytes(tmp_path / "out"), names_and_bytes(base)
    for output, layer in enumerate(MAP):
        for name, _, _ in saved:
            assert ours[f"model.layers.{output}.{name}"] == theirs[f"model.layers.{layer}.{name}"]
    assert len(ours) == 8 * len(saved) + 2
    written = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    assert written == {"quant_method": method, **after}
    assert dus("verify", tmp_path / "out", "--base", base, "-q").returncode == 0


def quantised(**fields: Any) -> dict[str, Any]:
    config = llama_config(6) | {"quantization_config": fields}
    found: dict[str, Any] = deepen_config(config, stack(6, trim=2)).config["quantization_config"]
    return found


# Where transformers' quantization_config.py and the quantisers it calls keep names of modules.
@pytest.mark.parametrize(
    "field",
    """
    modules_to_not_convert modules_to_convert llm_int8_skip_modules ignore ignored_layers
    skip_modules exclude modules_to_not_quantize exclude_modules linear_weights_not_to_quantize
    module_name_preceding_first_block
    """.split(),
)
def test_names_follow_whatever_the_list_is_called(field: str) -> None:
    names = [
        "lm_head",
        "model.layers.1.mlp",
        "model.layers.3.mlp.experts.1.w1.weight",
        "vision_tower.layers.3.mlp",
    ]
    assert quantised(**{field: names}) == {
        field: [
            "lm_head", "model.layers.1.mlp", "model.layers.3.mlp.experts.1.w1.weight",
            "model.layers.5.mlp.experts.1.w1.weight", "vision_tower.layers.3.mlp",
        ]
    }  # fmt: skip


@pytest.mark.parametrize(
    "field", ["config_for_layers", "extra_config", "dynamic", "shapes", "layer_quant_config"]
)
def test_settings_by_name_follow_whatever_the_mapping_is_called(field: str) -> None:
    settings = {"model.layers.2.mlp": {"bits": 2}, "model.layers.5.mlp": {"bits": 5}}
    after = quantised(**{field: settings})[field]
    assert after == {
        f"model.layers.{to}.mlp": {"bits": bits} for to, bits in ((2, 2), (4, 2), (7, 5))
    }


def test_names_nested_deeper_follow_too() -> None:
    torchao = {
        "_type": "FqnToConfig",
        "_data": {"fqn_to_config": {"model.layers.5.mlp": {"_type": "Int4"}}},
    }
    after = quantised(quant_type={"default": torchao})["quant_type"]["default"]["_data"][
        "fqn_to_config"
    ]
    assert after == {"model.layers.7.mlp": {"_type": "Int4"}}
    blocks = quantised(block_name_to_quantize="model.layers.0,model.layers.3")
    assert blocks == {"block_name_to_quantize": "model.layers.0,model.layers.3,model.layers.5"}


def test_the_older_name_of_the_field_and_the_decoders_own_follow() -> None:
    config = llama_config(6) | {"compression_config": {"ignore": ["model.layers.5.mlp"]}}
    after = deepen_config(config, stack(6, trim=2)).config
    assert after["compression_config"]["ignore"] == ["model.layers.7.mlp"]
    inner = {"quantization_config": {"ignore": ["language_model.model.layers.5.mlp"]}}
    wrapper = {"model_type": "llava", "text_config": llama_config(6) | inner}
    after = deepen_config(wrapper, stack(6, trim=2)).config["text_config"]
    assert after["quantization_config"]["ignore"] == ["language_model.model.layers.7.mlp"]


@pytest.mark.parametrize(
    "expression",
    [
        r"re:.*layers\.3\.mlp.*",
        r"re:.*layers\.(3|4)\.mlp.*",
        r"re:.*layers\.[0-5]\..*",
        r"re:.*layers\.1\d\..*",
        r"re:.*layers\.\d\..*",
        r"+:.*\.18\..*gate.*",
        r"-:.*\.(?:18|19)\..*",
        "re:model.layers.3.mlp",
        "*.layers.3.*",
        "model.layers.1*",
    ],
)
def test_an_expression_that_names_single_layers_is_refused(expression: str) -> None:
    both: list[dict[str, Any]] = [{"ignore": [expression]}, {"dynamic": {expression: {}}}]
    for fields in both:
        with pytest.raises(ConfigError, match="names single layers"):
            quantised(**fields)


@pytest.mark.parametrize(
    "expression",
    [
        "re:.*lm_head", "re:.*self_attn.*", r"re:.*\.layers\.\d+\.mlp\.gate$", r"re:model\.layers\.[0-9]+\.mlp.*",
        r"re:.*block_sparse_moe\.experts\.\d+\.w[13]", r"-:.*layers\.[0-9]{1,3}\..*fc1", "*lm_head", "re:.*w2.*",
    ],
)  # fmt: skip
def test_an_expression_over_all_layers_stays(expression: str) -> None:
    assert quantised(ignore=[expression]) == {"ignore": [expression]}
