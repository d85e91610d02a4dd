"""What configs and tensor names say per layer, as data. `model_config` and `stacks` apply it.

Read from transformers 5.23's source (models/*/configuration_*.py). Adding an architecture is adding
lines here. What stands in no table is refused by name or reported, never passed over.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

# How configs call the number of decoder layers.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# Where the decoder's layers stand in tensor names. `h`, `layers` and `blocks` alone occur in files
# that were saved from the base model, without its language-modelling head (gpt2 on the Hub).
LAYER_STACKS = (
    "model.layers",
    "layers",
    "transformer.h",
    "h",
    "transformer.blocks",
    "blocks",
    "gpt_neox.layers",
    "biogpt.layers",
    "model.decoder.layers",
    "decoder.layers",
    "backbone.layers",
    "language_model.model.layers",
    "model.language_model.layers",
    "language_model.layers",
    "model.text_model.layers",
)

# Numbered stacks that belong to the decoder but not to its depth: multi-token prediction beside the
# layers (qwen3_next and others). Depth up-scaling leaves them as they are.
MTP_STACKS = ("mtp.layers", "model.mtp.layers")

# Model types whose layers all follow from the fields below: tests/test_golden.py takes each of them and
# holds the written model against the base rearranged. For a multimodal model it is the type of its
# `text_config`. Any other type goes through with a warning if nothing per-layer is in sight.
KNOWN_TYPES = frozenset(
    """
    apertus arcee biogpt bloom codegen cohere cohere2 deepseek_v2 deepseek_v3 dots1 ernie4_5 exaone4 falcon
    falcon_mamba gemma gemma2 gemma3_text glm glm4 glm4_moe gpt_bigcode gpt_neox gpt_oss gpt2 gptj granite
    granitemoe helium llama llama4_text mamba mamba2 ministral mistral mixtral mpt nemotron olmo olmo2 olmo3
    olmoe opt persimmon phi phi3 phimoe qwen2 qwen2_moe qwen3 qwen3_moe qwen3_next seed_oss smollm3 stablelm
    starcoder2 xglm
    """.split()
)

# One entry per layer: follows the layer map.
PER_LAYER_LISTS = frozenset(
    """
    layer_types mlp_layer_types no_rope_layers layer_rope_theta num_attention_heads_per_layer indexer_types
    layers_block_type intermediate_size num_key_value_heads num_attention_heads num_query_heads ffn_multipliers
    moe_topk moe_layer_freq block_configs activation_sparsity_pattern
    """.split()
)

# Sets of layer numbers: become the output layers whose source is in the set.
INDEX_SETS = frozenset("mlp_only_layers cross_attention_layers attn_layer_indices full_attn_idxs moe_layers".split())


class Period(NamedTuple):
    """A pattern that repeats along the depth.

    `overruled_by` is the per-layer list that transformers reads instead when the config has it.
    """

    overruled_by: str | None = None


PERIODS: Mapping[str, Period] = {
    "sliding_window_pattern": Period("layer_types"),
    "_sliding_window_pattern": Period("layer_types"),
    "full_attention_interval": Period("layer_types"),
    "global_attn_every_n_layers": Period("layer_types"),
    "layer_group_size": Period("layer_types"),
    "no_rope_layer_interval": Period("no_rope_layers"),
    "interleave_moe_layer_step": Period("moe_layers"),
    "decoder_sparse_step": Period(),
    "moe_layer_freq": Period(),
    "moe_layer_interval": Period(),
    "attn_layer_period": Period(),
    "expert_layer_period": Period(),
}

# Belongs to a period above and is right whenever that period keeps its phase.
PERIOD_OFFSETS = frozenset(["attn_layer_offset", "expert_layer_offset"])


class Threshold(NamedTuple):
    """The first k layers are of another kind than the rest.

    `only_if` is a switch without which transformers does not look at the field.
    """

    overruled_by: str | None = None
    only_if: str | None = None


THRESHOLDS: Mapping[str, Threshold] = {
    "max_window_layers": Threshold("layer_types", only_if="use_sliding_window"),
    "first_k_dense_replace": Threshold("mlp_layer_types"),
    "num_dense_layers": Threshold("mlp_layer_types"),
}


class DerivedKinds(NamedTuple):
    """`layer_types` that the class derives where the file lacks them: every p-th layer is of another kind.

    `period_key` is where the file may say p; `period` is the class's default.
    """

    kind: str
    every_pth: str
    period: int
    period_key: str | None = None


# Older files of these lack `layer_types`; dus derives them for the base as the class does (each
# configuration_*.py, __post_init__), and writes them out for the deeper model.
DERIVED_KINDS: Mapping[str, DerivedKinds] = {
    "cohere2": DerivedKinds("sliding_attention", "full_attention", 4, "sliding_window_pattern"),
    "gemma2": DerivedKinds("sliding_attention", "full_attention", 2),
    "gemma3_text": DerivedKinds("sliding_attention", "full_attention", 6, "sliding_window_pattern"),
    "gpt_oss": DerivedKinds("sliding_attention", "full_attention", 2),
    "olmo3": DerivedKinds("sliding_attention", "full_attention", 4),
    "qwen3_next": DerivedKinds("linear_attention", "full_attention", 4, "full_attention_interval"),
}

# The class derives these from the layer's index, or takes a default that is not "all layers alike",
# when the file lacks them: a deeper model would get another pattern. Refused then.
FILLED_BY_THE_CLASS: Mapping[str, str] = {
    "deepseek_v3": "first_k_dense_replace",
    "ernie4_5_moe": "moe_layer_interval",
    "glm4_moe": "first_k_dense_replace",
    "jamba": "attn_layer_period",
    "llama4": "no_rope_layers",
    "llama4_text": "no_rope_layers",
    "mllama": "cross_attention_layers",
    "mllama_text_model": "cross_attention_layers",
    "nemotron_h": "layers_block_type",
    "smollm3": "no_rope_layers",
} | dict.fromkeys(
    """
    afmoe axk1 axk2 bailing_hybrid beam cohere2_moe cohere_compass_text cwm deepseek_v32 deepseek_v4
    dots3_note dots3_note_text exaone4 exaone_moe flint glm4_moe_lite glm_moe_dsa
    granite_swa granitemoe_swa granitemoehybrid hy_v3 hy_v4 inkling_text inkling2_text kimi_linear
    kolibri1 laguna lfm2 lfm3 mellum mimo_v2_flash minimax minimax_m3_vl_text olmo_hybrid qwen3_5
    qwen3_5_text qwen3_5_moe qwen3_5_moe_text qwen4_exp qwen4_exp_text vaultgemma zaya
    """.split(),
    "layer_types",
)

# Switches whose effect depends on the layer's number: refused unless off.
INDEX_ARITHMETIC: Mapping[str, str] = {
    "scale_attn_by_inverse_layer_idx": "it divides attention by the layer's number, which changes with the depth",
    "scale_depth": "it scales residuals by the square root of the depth",
    "num_kv_shared_layers": "its layers share keys and values, counted from the last",
    "hidden_size_per_layer_input": "its per-layer embeddings stand outside the layers",
    "per_layer_config": "its keys are layer numbers",
    "hybrid_override_pattern": "it spells the kinds of the layers as text",
    "attention_types": "it spells the kinds of the layers as repeated groups",
    "block_types": "it is read cyclically along the depth",
    "linear_attn_config": "it holds lists of layer numbers",
    "compress_ratios": "it is a pattern along the depth",
}

# Model types that cannot be deepened by copying layers, or whose rule this version does not know.
REFUSED_TYPES: Mapping[str, str] = {
    "diffllama": "a constant in its attention is computed from the layer's number",
    "gpt_neox_japanese": "its last layer is structurally unlike the others",
    "modernbert-decoder": "its first layer is structurally unlike the others",
    "rwkv": "its first block holds a norm that the others lack, and weights are rescaled by layer number",
    "xlstm": "its blocks are counted by fields that this version does not carry",
    "zamba": "its layers share one attention block",
    "zamba2": "its layers share attention blocks",
    "longcat_flash": "each of its layers counts twice in num_hidden_layers",
    "hrm_text": "its layers form stacks that are run in cycles",
    "blt": "it is made of several stacks of layers",
}

# Fields with a suspicious name that say nothing about single layers.
HARMLESS = frozenset(
    """
    num_nextn_predict_layers encoder_layers decoder_layers n_layers_per_attn_res_block
    """.split()
)

# Lists that may by chance be as long as the model is deep.
NOT_PER_LAYER = frozenset(
    """
    architectures eos_token_id bos_token_id pad_token_id bad_words_ids suppress_tokens begin_suppress_tokens
    forced_decoder_ids mrope_section time_step_limit ssm_multipliers mlp_multipliers languages dtypes
    keys_to_ignore_at_inference
    """.split()
)

# Encoders and encoder-decoders: architectures that depth up-scaling of a causal LM does not fit.
ENCODER_HEADS = ("ForMaskedLM", "ForPreTraining", "ForImageClassification", "ForCTC", "ForMaskedImageModeling")
