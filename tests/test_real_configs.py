"""config.json of well-known models, at their real depths: what `dus upscale --dry-run` makes of
them.

The configs hold what the files on the Hub hold, fields that only training or generation reads left
out; some are older than the lists of kinds that transformers writes today. The checkpoints are
headers over holes: names and shapes are those that transformers gives a model of that config on the
meta device, in the names that it would save; FP8 and MXFP4 are laid over them as in the published
files. Expected figures are published ones, and arithmetic from them.
"""

from __future__ import annotations

import copy
import functools
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Tensor, num_bytes, write_checkpoint
from tiny import forked_dus as dus

from dus_cli.common.reference import ModelRef
from dus_cli.maps.layers import stack
from dus_cli.maps.model_config import decoder_config, deepen_config
from dus_cli.maps.stacks import find_stack
from dus_cli.planning.plan import Base, MapRequest, make_plan
from dus_cli.source.checkpoint import open_checkpoint

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# transformers' own, about what older files call things
pytestmark = pytest.mark.filterwarnings("ignore")

Config = dict[str, Any]
BF16: Config = {"torch_dtype": "bfloat16"}

MISTRAL_7B: Config = BF16 | {  # mistralai/Mistral-7B-v0.1
    "architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu", "hidden_size": 4096,
    "intermediate_size": 14336, "max_position_embeddings": 32768, "num_attention_heads": 32, "num_hidden_layers": 32,
    "num_key_value_heads": 8, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "sliding_window": 4096,
    "tie_word_embeddings": False, "vocab_size": 32000,
}  # fmt: skip

_LLAMA3_ROPE = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192, "rope_type": "llama3"}  # fmt: skip
LLAMA_31_8B: Config = BF16 | {  # meta-llama/Llama-3.1-8B
    "architectures": ["LlamaForCausalLM"], "model_type": "llama", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 14336, "max_position_embeddings": 131072, "mlp_bias": False,
    "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8, "pretraining_tp": 1,
    "rms_norm_eps": 1e-05, "rope_scaling": _LLAMA3_ROPE, "rope_theta": 500000.0, "tie_word_embeddings": False,
    "vocab_size": 128256,
}  # fmt: skip
LLAMA_31_70B: Config = LLAMA_31_8B | {  # meta-llama/Llama-3.1-70B
    "hidden_size": 8192, "intermediate_size": 28672, "num_attention_heads": 64, "num_hidden_layers": 80,
}  # fmt: skip

QWEN3_8B: Config = BF16 | {  # Qwen/Qwen3-8B: windows from layer 36 on, of 36, and switched off
    "architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "attention_bias": False, "head_dim": 128,
    "hidden_act": "silu", "hidden_size": 4096, "intermediate_size": 12288, "max_position_embeddings": 40960,
    "max_window_layers": 36, "num_attention_heads": 32, "num_hidden_layers": 36, "num_key_value_heads": 8,
    "rms_norm_eps": 1e-06, "rope_scaling": None, "rope_theta": 1000000, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip
QWEN3_30B: Config = BF16 | {  # Qwen/Qwen3-30B-A3B
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "attention_bias": False,
    "decoder_sparse_step": 1, "head_dim": 128, "hidden_act": "silu", "hidden_size": 2048, "intermediate_size": 6144,
    "max_position_embeddings": 40960, "max_window_layers": 48, "mlp_only_layers": [], "moe_intermediate_size": 768,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 128, "num_experts_per_tok": 8,
    "num_hidden_layers": 48, "num_key_value_heads": 4, "output_router_logits": False, "rms_norm_eps": 1e-06,
    "rope_scaling": None, "rope_theta": 1000000.0, "router_aux_loss_coef": 0.001, "sliding_window": None,
    "tie_word_embeddings": False, "use_sliding_window": False, "vocab_size": 151936,
}  # fmt: skip

# google/gemma-3-27b-it: neither layer_types nor the pattern of six, nor vocab_size
GEMMA3_27B: Config = BF16 | {
    "architectures": ["Gemma3ForConditionalGeneration"], "model_type": "gemma3", "boi_token_index": 255999,
    "eoi_token_index": 256000, "eos_token_id": [1, 106], "image_token_index": 262144, "mm_tokens_per_image": 256,
    "text_config": {
        "head_dim": 128, "hidden_size": 5376, "intermediate_size": 21504, "model_type": "gemma3_text",
        "num_attention_heads": 32, "num_hidden_layers": 62, "num_key_value_heads": 16, "query_pre_attn_scalar": 168,
        "rope_scaling": {"factor": 8.0, "rope_type": "linear"}, "sliding_window": 1024,
    },
    "vision_config": {
        "hidden_size": 1152, "image_size": 896, "intermediate_size": 4304, "model_type": "siglip_vision_model",
        "num_attention_heads": 16, "num_hidden_layers": 27, "patch_size": 14, "vision_use_head": False,
    },
}  # fmt: skip
# As transformers 4.50 saved it again, with the pattern.
GEMMA3_27B_PATTERN: Config = GEMMA3_27B | {
    "text_config": {**GEMMA3_27B["text_config"], "sliding_window_pattern": 6}
}

GPT_OSS_120B: Config = {  # openai/gpt-oss-120b
    "architectures": ["GptOssForCausalLM"], "model_type": "gpt_oss", "attention_bias": True, "experts_per_token": 4,
    "head_dim": 64, "hidden_act": "silu", "hidden_size": 2880, "initial_context_length": 4096,
    "intermediate_size": 2880, "layer_types": ["sliding_attention", "full_attention"] * 18,
    "max_position_embeddings": 131072, "num_attention_heads": 64, "num_experts_per_tok": 4, "num_hidden_layers": 36,
    "num_key_value_heads": 8, "num_local_experts": 128, "output_router_logits": False,
    "quantization_config": {
        "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens",
                                   "lm_head"],
        "quant_method": "mxfp4",
    },
    "rms_norm_eps": 1e-05, "rope_theta": 150000,
    "rope_scaling": {"beta_fast": 32.0, "beta_slow": 1.0, "factor": 32.0, "original_max_position_embeddings": 4096,
                     "rope_type": "yarn", "truncate": False},
    "router_aux_loss_coef": 0.9, "sliding_window": 128, "swiglu_limit": 7.0, "tie_word_embeddings": False,
    "vocab_size": 201088,
}  # fmt: skip

# deepseek-ai/DeepSeek-V3: FP8 in blocks, a multi-token-prediction layer 61 in the files
DEEPSEEK_V3: Config = BF16 | {
    "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "attention_bias": False,
    "auto_map": {"AutoConfig": "configuration_deepseek.DeepseekV3Config",
                 "AutoModelForCausalLM": "modeling_deepseek.DeepseekV3ForCausalLM"},
    "ep_size": 1, "first_k_dense_replace": 3, "hidden_act": "silu", "hidden_size": 7168, "intermediate_size": 18432,
    "kv_lora_rank": 512, "max_position_embeddings": 163840, "moe_intermediate_size": 2048, "moe_layer_freq": 1,
    "n_group": 8, "n_routed_experts": 256, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 128,
    "num_experts_per_tok": 8, "num_hidden_layers": 61, "num_key_value_heads": 128, "num_nextn_predict_layers": 1,
    "q_lora_rank": 1536, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "rms_norm_eps": 1e-06, "rope_theta": 10000,
    "rope_scaling": {"beta_fast": 32, "beta_slow": 1, "factor": 40, "mscale": 1.0, "mscale_all_dim": 1.0,
                     "original_max_position_embeddings": 4096, "type": "yarn"},
    "routed_scaling_factor": 2.5, "scoring_func": "sigmoid", "tie_word_embeddings": False, "topk_group": 4,
    "topk_method": "noaux_tc", "v_head_dim": 128, "vocab_size": 129280,
}  # fmt: skip

# meta-llama/Llama-4-Scout-17B-16E: an empty list, filled by the class
LLAMA4_SCOUT: Config = BF16 | {
    "architectures": ["Llama4ForConditionalGeneration"], "model_type": "llama4", "boi_token_index": 200080,
    "eoi_token_index": 200081, "image_token_index": 200092,
    "text_config": {
        "attention_bias": False, "attention_chunk_size": 8192, "for_llm_compressor": False, "head_dim": 128,
        "hidden_act": "silu", "hidden_size": 5120, "interleave_moe_layer_step": 1, "intermediate_size": 8192,
        "intermediate_size_mlp": 16384, "max_position_embeddings": 262144, "model_type": "llama4_text",
        "no_rope_layers": [], "num_attention_heads": 40, "num_experts_per_tok": 1, "num_hidden_layers": 48,
        "num_key_value_heads": 8, "num_local_experts": 16, "output_router_logits": False, "rms_norm_eps": 1e-05,
        "rope_scaling": _LLAMA3_ROPE, "rope_theta": 500000.0, "use_qk_norm": True, "vocab_size": 202048,
    },
    "vision_config": {
        "hidden_act": "gelu", "hidden_size": 1408, "image_size": 336, "intermediate_size": 5632,
        "model_type": "llama4_vision_model", "multi_modal_projector_bias": False, "num_attention_heads": 16,
        "num_channels": 3, "num_hidden_layers": 34, "patch_size": 14, "pixel_shuffle_ratio": 0.5,
        "projector_input_dim": 4096, "projector_output_dim": 4096, "rope_theta": 10000, "vision_output_dim": 4096,
    },
}  # fmt: skip
# As later files have it: what the class makes of the empty list, written out.
LLAMA4_SCOUT_LISTED: Config = LLAMA4_SCOUT | {
    "text_config": LLAMA4_SCOUT["text_config"] | {
        "moe_layers": list(range(48)), "no_rope_layers": [1, 1, 1, 0] * 12,
        "layer_types": (["chunked_attention"] * 3 + ["full_attention"]) * 12,
    },
}  # fmt: skip

# tiiuae/Falcon-H1-34B-Instruct: attention and Mamba side by side in every layer
FALCON_H1_34B: Config = BF16 | {
    "architectures": ["FalconH1ForCausalLM"], "model_type": "falcon_h1", "attention_bias": False,
    "attention_in_multiplier": 1.0, "attention_out_multiplier": 0.0390625, "attn_layer_indices": None,
    "embedding_multiplier": 5.656854249492381, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 21504, "key_multiplier": 0.011048543456039804, "lm_head_multiplier": 0.0078125,
    "mamba_chunk_size": 128, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 128, "mamba_d_ssm": 4096,
    "mamba_d_state": 256, "mamba_expand": 2, "mamba_n_groups": 2, "mamba_n_heads": 32,
    "mamba_norm_before_gate": False, "mamba_proj_bias": False, "mamba_rms_norm": False, "mamba_use_mlp": True,
    "max_position_embeddings": 262144, "mlp_bias": False, "mlp_expansion_factor": 8,
    "mlp_multipliers": [0.1767766952966369, 0.03125], "num_attention_heads": 20, "num_hidden_layers": 72,
    "num_key_value_heads": 4, "projectors_bias": False, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 100000000000.0, "ssm_in_multiplier": 1.25,
    "ssm_multipliers": [0.3535533905932738, 0.25, 0.1767766952966369, 0.5, 0.3535533905932738],
    "ssm_out_multiplier": 0.08838834764831845, "tie_word_embeddings": False, "vocab_size": 261120,
}  # fmt: skip

GRANITE_4_SMALL: Config = BF16 | {  # ibm-granite/granite-4.0-h-small: older names of kinds
    "architectures": ["GraniteMoeHybridForCausalLM"], "model_type": "granitemoehybrid", "attention_bias": False,
    "attention_multiplier": 0.0078125, "embedding_multiplier": 12, "hidden_act": "silu", "hidden_size": 4096,
    "init_method": "mup", "intermediate_size": 768,
    "layer_types": ["attention" if layer in (5, 15, 25, 35) else "mamba" for layer in range(40)],
    "logits_scaling": 16, "mamba_chunk_size": 256, "mamba_conv_bias": True, "mamba_d_conv": 4, "mamba_d_head": 64,
    "mamba_d_state": 128, "mamba_expand": 2, "mamba_n_groups": 1, "mamba_n_heads": 128, "mamba_proj_bias": False,
    "max_position_embeddings": 131072, "normalization_function": "rmsnorm", "num_attention_heads": 32,
    "num_experts_per_tok": 10, "num_hidden_layers": 40, "num_key_value_heads": 8, "num_local_experts": 72,
    "output_router_logits": False, "position_embedding_type": "nope", "residual_multiplier": 0.22,
    "rms_norm_eps": 1e-05, "rope_scaling": None, "rope_theta": 10000, "router_aux_loss_coef": 0.0001,
    "shared_intermediate_size": 1536, "tie_word_embeddings": True, "vocab_size": 100352,
}  # fmt: skip

PHI_4: Config = BF16 | {  # microsoft/phi-4
    "architectures": ["Phi3ForCausalLM"], "model_type": "phi3", "attention_bias": False, "embd_pdrop": 0.0,
    "hidden_act": "silu", "hidden_size": 5120, "intermediate_size": 17920, "max_position_embeddings": 16384,
    "num_attention_heads": 40, "num_hidden_layers": 40, "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384, "pad_token_id": 100349, "resid_pdrop": 0.0, "rms_norm_eps": 1e-05,
    "rope_scaling": None, "rope_theta": 250000, "sliding_window": None, "tie_word_embeddings": False,
    "vocab_size": 100352,
}  # fmt: skip

# zai-org/GLM-4.5: three dense layers, a multi-token-prediction layer 92 in the files
GLM_45: Config = BF16 | {
    "architectures": ["Glm4MoeForCausalLM"], "model_type": "glm4_moe", "attention_bias": True,
    "first_k_dense_replace": 3, "head_dim": 128, "hidden_act": "silu", "hidden_size": 5120,
    "intermediate_size": 12288, "max_position_embeddings": 131072, "moe_intermediate_size": 1536, "n_group": 1,
    "n_routed_experts": 160, "n_shared_experts": 1, "norm_topk_prob": True, "num_attention_heads": 96,
    "num_experts_per_tok": 8, "num_hidden_layers": 92, "num_key_value_heads": 8, "num_nextn_predict_layers": 1,
    "pad_token_id": 151329, "partial_rotary_factor": 0.5, "rms_norm_eps": 1e-05, "rope_scaling": None,
    "rope_theta": 1000000, "routed_scaling_factor": 2.5, "tie_word_embeddings": False, "topk_group": 1,
    "use_qk_norm": True, "vocab_size": 151552,
}  # fmt: skip

OLMO3_32B: Config = BF16 | {  # allenai/Olmo-3-1125-32B
    "architectures": ["Olmo3ForCausalLM"], "model_type": "olmo3", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 5120, "intermediate_size": 27648,
    "layer_types": (["sliding_attention"] * 3 + ["full_attention"]) * 16, "max_position_embeddings": 65536,
    "num_attention_heads": 40, "num_hidden_layers": 64, "num_key_value_heads": 8, "pad_token_id": 100277,
    "rms_norm_eps": 1e-06, "rope_theta": 500000, "sliding_window": 4096, "tie_word_embeddings": False,
    "rope_scaling": {"attention_factor": 1.2079441541679836, "beta_fast": 32, "beta_slow": 1, "factor": 8.0,
                     "original_max_position_embeddings": 8192, "rope_type": "yarn"},
    "vocab_size": 100278,
}  # fmt: skip

# HuggingFaceTB/SmolLM3-3B: every fourth layer without rotary embedding
SMOLLM3_3B: Config = BF16 | {
    "architectures": ["SmolLM3ForCausalLM"], "model_type": "smollm3", "attention_bias": False, "hidden_act": "silu",
    "hidden_size": 2048, "intermediate_size": 11008, "layer_types": ["full_attention"] * 36,
    "max_position_embeddings": 65536, "max_window_layers": 28, "mlp_bias": False, "no_rope_layer_interval": 4,
    "no_rope_layers": [1, 1, 1, 0] * 9, "num_attention_heads": 16, "num_hidden_layers": 36, "num_key_value_heads": 4,
    "pad_token_id": 128004, "pretraining_tp": 2, "rms_norm_eps": 1e-06, "rope_scaling": None,
    "rope_theta": 5000000.0, "sliding_window": None, "use_sliding_window": False, "vocab_size": 128256,
}  # fmt: skip


@dataclass(frozen=True)
class Real:
    """A model, and what its dry run must say. `base` counts its parameters, `added` those of the
    layers that repeat.

    `kinds` spells each output layer by the first letter of its kind. `base_bytes` is the published
    index's total_size.
    """

    config: Config
    trim: int
    depth: int
    base: int
    added: int
    kinds: dict[str, str] = field(default_factory=dict)
    base_bytes: int | None = None
    warnings: tuple[str, ...] = ()


# Six layers, the last of them full attention, stand at 0…46 and at 15…61.
_GEMMA3_KINDS = {"layer_types": "sssssf" * 7 + "sssss" + "ssf" + "sssssf" * 7 + "ss"}
# 0…36 and 11…47, whose first is the last of four.
_LLAMA4_KINDS = {
    "no_rope_layers": "1110" * 9 + "1" + "0" + "1110" * 9,
    "layer_types": "cccf" * 9 + "c" + "f" + "cccf" * 9,
}
_COUNTED = (
    "{} every {} layers: {} and would compute another model in silence; --trim {} keep the step"
)
_ALL_COUNT = "llama.cpp, mlx-lm and transformers before 4.53 count layers"
_SCALE = (
    "llama.cpp scales attention by hidden_size / num_attention_heads with 62 layers and by "
    "head_dim with any other "
    "number of them, and would compute another model in silence; no trim keeps it right"
)
_GEMMA3_WARNINGS = (
    _COUNTED.format("layer_types no longer repeats", 6, _ALL_COUNT, "13, 16 or 19"),
    _SCALE,
)
_LLAMA4_WARNINGS = (
    _COUNTED.format(
        "no_rope_layers and layer_types no longer repeat", 4, _ALL_COUNT, "8, 10 or 12"
    ),
)
_MTP = (
    "1 multi-token-prediction layer(s) keep their place after the last layer, as model.layers.{} "
    "and on"
)

REAL = {
    "Mistral-7B": Real(MISTRAL_7B, 8, 48, 7_241_732_096, 16 * 218_112_000, base_bytes=14_483_464_192),
    "Llama-3.1-8B": Real(LLAMA_31_8B, 8, 48, 8_030_261_248, 16 * 218_112_000, base_bytes=16_060_522_496),
    "Llama-3.1-70B": Real(LLAMA_31_70B, 20, 120, 70_553_706_496, 40 * 855_654_400, base_bytes=141_107_412_992),
    "Qwen3-8B": Real(QWEN3_8B, 9, 54, 8_190_735_360, 18 * 192_946_432, base_bytes=16_381_470_720),
    "Qwen3-30B-A3B": Real(QWEN3_30B, 12, 72, 30_532_122_624, 24 * 623_120_640, base_bytes=61_064_245_248),
    "Gemma-3-27B": Real(
        GEMMA3_27B, 15, 94, 27_432_406_640, 32 * 412_898_560, _GEMMA3_KINDS, warnings=_GEMMA3_WARNINGS
    ),
    "Gemma-3-27B, its pattern given": Real(
        GEMMA3_27B_PATTERN, 15, 94, 27_432_406_640, 32 * 412_898_560, _GEMMA3_KINDS, warnings=_GEMMA3_WARNINGS
    ),
    # A parameter is an element of a stored tensor: a byte of MXFP4 holds two weights.
    "GPT-OSS-120B": Real(
        GPT_OSS_120B, 9, 54, 63_081_444_672, 18 * 1_720_088_192, {"layer_types": "sf" * 27},
        base_bytes=65_248_815_744,
    ),
    # Scales counted: 671B parameters, 13B of the multi-token-prediction layer, 42M scales.
    "DeepSeek-V3": Real(
        DEEPSEEK_V3, 15, 92, 684_531_386_000, 31 * 11_507_988_536, {"first_k_dense_replace": "fff" + "r" * 89},
        warnings=(_MTP.format(92),),
    ),
    "Llama-4-Scout": Real(
        LLAMA4_SCOUT, 11, 74, 108_641_793_536, 26 * 2_202_101_760, _LLAMA4_KINDS, warnings=_LLAMA4_WARNINGS
    ),
    "Llama-4-Scout, its lists given": Real(
        LLAMA4_SCOUT_LISTED, 11, 74, 108_641_793_536, 26 * 2_202_101_760, _LLAMA4_KINDS, warnings=_LLAMA4_WARNINGS
    ),
    "Falcon-H1-34B": Real(FALCON_H1_34B, 18, 108, 33_642_221_312, 36 * 430_115_936),
    # Attention in 5, 15, 25, 35 of 0…39; the layers 9…30 stand twice, two of them attention.
    "Granite-4.0-H-Small": Real(
        GRANITE_4_SMALL, 9, 62, 32_207_337_984, 20 * 800_941_696 + 2 * 740_597_760,
        {"layer_types": "mmmmma" + "mmmmmmmmma" * 2 + "mmmmm" + "mmmmmma" + "mmmmmmmmma" * 2 + "mmmm"},
    ),
    "Phi-4": Real(PHI_4, 10, 60, 14_659_507_200, 20 * 340_797_440, base_bytes=29_319_014_400),
    "GLM-4.5": Real(
        GLM_45, 23, 138, 358_337_791_296, 46 * 3_935_625_632, {"first_k_dense_replace": "fff" + "r" * 135},
        warnings=(_MTP.format(138),),
    ),
    # 0…48 and 15…63, whose first is the last of four.
    "OLMo-3-32B": Real(
        OLMO3_32B, 15, 98, 32_233_522_176, 34 * 487_604_224,
        {"layer_types": "sssf" * 12 + "s" + "f" + "sssf" * 12}, base_bytes=64_467_044_352,
    ),
    # 0…26 and 9…35, whose first are the last three of four.
    "SmolLM3-3B": Real(
        SMOLLM3_3B, 9, 54, 3_075_098_624, 18 * 78_123_008, {"no_rope_layers": "1110" * 6 + "111" + "110" + "1110" * 6},
        base_bytes=6_150_197_248,
        warnings=(
            _COUNTED.format("no_rope_layers no longer repeats", 4, "llama.cpp counts layers", "6, 8 or 10"),
        ),
    ),
}  # fmt: skip

Named = dict[str, tuple[str, tuple[int, ...]]]  # name: dtype, shape


@functools.cache
def _parsed(text: str) -> Any:
    config: Config = json.loads(text)
    return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config)


def parsed(config: Config) -> Any:
    """The config as transformers reads it, lists filled in."""
    return _parsed(json.dumps(config))


def stored_tensors(config: Config) -> Named:
    """What a checkpoint of this config holds, by the names that it has in the published files."""
    from transformers.core_model_loading import revert_weight_conversion

    plain = copy.deepcopy(
        parsed({key: value for key, value in config.items() if key != "quantization_config"})
    )
    with torch.device("meta"):
        model = getattr(transformers, config["architectures"][0])._from_config(plain)
    state = {
        name: tensor
        for name, tensor in model.state_dict().items()
        if name not in model.all_tied_weights_keys
    }
    saved = revert_weight_conversion(model, state)
    tensors = {name: ("BF16", tuple(map(int, tensor.shape))) for name, tensor in saved.items()}
    for name in tensors:
        if name.endswith("e_score_correction_bias"):
            tensors[name] = ("F32", tensors[name][1])
    tensors |= _predicting_layer(config, tensors)
    method = config.get("quantization_config", {}).get("quant_method")
    return _fp8(tensors) if method == "fp8" else _mxfp4(tensors) if method == "mxfp4" else tensors


def _predicting_layer(config: Config, tensors: Named) -> Named:
    """The layer after the last that predicts one more token (DeepSeek-V3, arXiv:2412.19437,
    section 2.2).
    """
    if not config.get("num_nextn_predict_layers"):
        return {}
    n, hidden, vocabulary = config["num_hidden_layers"], config["hidden_size"], config["vocab_size"]
    last, extra = f"model.layers.{n - 1}.", f"model.layers.{n}."
    layer = {
        extra + name.removeprefix(last): found
        for name, found in tensors.items()
        if name.startswith(last)
    }
    for name in ("enorm.weight", "hnorm.weight", "shared_head.norm.weight"):
        layer[extra + name] = ("BF16", (hidden,))
    for name in ("embed_tokens.weight", "shared_head.head.weight"):
        layer[extra + name] = ("BF16", (vocabulary, hidden))
    return layer | {f"{extra}eh_proj.weight": ("BF16", (hidden, 2 * hidden))}


def _fp8(tensors: Named) -> Named:
    """Projections in FP8, each with a scale for every block of 128 × 128."""
    stored: Named = {}
    for name, (dtype, shape) in tensors.items():
        is_projection = name.endswith(
            ("_proj.weight", "_proj_with_mqa.weight")
        ) and not name.endswith("eh_proj.weight")
        stored[name] = ("F8_E4M3" if is_projection else dtype, shape)
        if is_projection:
            stored[f"{name}_scale_inv"] = ("F32", (-(-shape[0] // 128), -(-shape[1] // 128)))
    return stored


def _mxfp4(tensors: Named) -> Named:
    """Experts in blocks of 32 four-bit weights with a scale each: (experts, in, out) as
    (experts, out, in / 32, 16).
    """
    stored: Named = {}
    for name, (dtype, shape) in tensors.items():
        if name.endswith(("experts.gate_up_proj", "experts.down_proj")):
            experts, size_in, size_out = shape
            stored[f"{name}_blocks"] = ("U8", (experts, size_out, size_in // 32, 16))
            stored[f"{name}_scales"] = ("U8", (experts, size_out, size_in // 32))
        else:
            stored[name] = (dtype, shape)
    return stored


@pytest.fixture(scope="module")
def base_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A model's checkpoint, its data a hole: a thousand gigabytes take no disk."""

    @functools.cache
    def write(name: str) -> Path:
        config = REAL[name].config
        tensors: list[Tensor] = [
            (name, dtype, shape) for name, (dtype, shape) in stored_tensors(config).items()
        ]
        assert sum(map(num_bytes, tensors)) > 10**9
        return write_checkpoint(
            tmp_path_factory.mktemp("real") / "base", tensors, config, fill=None
        )

    return write


def spelled(kinds: Iterable[str]) -> str:
    """The first letter of each layer's kind."""
    return "".join(kind[0] for kind in kinds)


def differing(found: Named, wanted: Named) -> list[str]:
    """The first few names that only one holds, or with another dtype or shape: a hundred
    thousand are no message.
    """
    names = sorted(found.keys() | wanted.keys())
    return [
        f"{name}: {found.get(name)} {wanted.get(name)}"
        for name in names
        if found.get(name) != wanted.get(name)
    ][:5]


@pytest.mark.parametrize("name", REAL)
def test_the_dry_run_of_a_well_known_model(
    name: str, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    real, base = REAL[name], base_of(name)
    report = dus(
        "upscale", base, "-t", str(real.trim), "-o", tmp_path / "out", "--dry-run", "--json"
    ).report
    assert report["num_layers"]["output"] == real.depth
    assert report["parameters"] == {"base": real.base, "output": real.base + real.added}
    assert {key: spelled(kinds) for key, kinds in report["kinds"].items()} == real.kinds
    assert [warning for warning in report["warnings"] if "free some space" not in warning] == list(
        real.warnings
    )
    assert not (tmp_path / "out").exists()

    plan = make_plan(
        Base(ModelRef.parse(str(base))), open_checkpoint(base), MapRequest(trim=real.trim)
    )
    base_bytes = plan.checkpoint.num_bytes
    assert real.base_bytes in (None, base_bytes)
    # What transformers builds of the deeper config asks for the planned tensors, shape by shape,
    # and no others …
    planned = {
        p.name: (p.tensor.dtype, p.tensor.shape)
        for shard in plan.shards.values()
        for p in shard.placements
    }
    wrong = differing(planned, stored_tensors(plan.config))
    assert wrong == []
    # … and reads each layer to be what its source is in the base.
    before, after = (parsed(config).get_text_config() for config in (real.config, plan.config))
    for key in ("layer_types", "no_rope_layers"):
        if getattr(before, key, None) is not None:
            assert getattr(after, key) == [
                getattr(before, key)[layer] for layer in report["layer_map"]
            ]


def test_mistral_7b_has_the_figures_of_the_published_solar_map(
    base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    report = dus(
        "upscale", base_of("Mistral-7B"), "-t", "8", "-o", tmp_path / "out", "--dry-run", "--json"
    ).report
    assert (report["tensors"], report["parameters"]["output"], report["bytes"]) == (
        435,
        10_731_524_096,
        21_463_048_192,
    )


@pytest.mark.parametrize(
    ("name", "trim"), [("DeepSeek-V3", 2), ("DeepSeek-V3", 0), ("GLM-4.5", 2), ("GLM-4.5", 1)]
)
def test_trims_that_would_repeat_a_dense_layer_are_refused(
    name: str, trim: int, base_of: Callable[[str], Path], tmp_path: Path
) -> None:
    base = base_of(name)
    run = dus("upscale", base, "-t", str(trim), "-o", tmp_path / "out", "--dry-run", "-q")
    run.assert_one_line_error(
        "first_k_dense_replace is 3", "repeats some of them", "use a trim of 3 or more"
    )


# Of further published files, the fields whose names speak of layers, and what becomes of them with
# a trim of 5.
_HYBRID = [0, 1, 1, 1, 1] + [0, 1, 1, 1, 1, 1] * 7 + [0]
NAMED_LIKE_LAYERS: dict[str, tuple[Config, Config]] = {
    # google/gemma-3-1b-it: the frequency of a rotary embedding, written as a whole number.
    "gemma3_text": ({"num_hidden_layers": 26, "rope_local_base_freq": 10000, "sliding_window_pattern": 6},
                    {"rope_local_base_freq": 10000, "sliding_window_pattern": 6}),
    # CohereLabs/c4ai-command-r7b-12-2024
    "cohere2": ({"num_hidden_layers": 32, "layer_switch": 4, "order_of_interleaved_layers": "local_attn_first"},
                {"order_of_interleaved_layers": "local_attn_first"}),
    # MiniMaxAI/MiniMax-M2: its modules for multi-token prediction are not in the files.
    "minimax_m2": ({"num_hidden_layers": 62, "attn_type_list": [1] * 62, "mtp_transformer_layers": 1,
                    "num_mtp_modules": 3, "qk_norm_type": "per_layer"},
                   {"attn_type_list": [1] * 114, "mtp_transformer_layers": 1}),
    # Qwen/Qwen3.5-27B
    "qwen3_5_text": ({"num_hidden_layers": 64, "full_attention_interval": 4, "mtp_num_hidden_layers": 1},
                     {"mtp_num_hidden_layers": 1}),
    # XiaomiMiMo/MiMo-V2-Flash: lists under names that elsewhere hold a period.
    "mimo_v2_flash": ({"num_hidden_layers": 48, "hybrid_layer_pattern": _HYBRID, "moe_layer_freq": [0] + [1] * 47},
                      {"hybrid_layer_pattern": _HYBRID[:43] + _HYBRID[5:], "moe_layer_freq": [0] + [1] * 85}),
    # A type in no table: the list follows just the same.
    "mimo_v2": ({"num_hidden_layers": 48, "moe_layer_freq": [0] + [1] * 47}, {"moe_layer_freq": [0] + [1] * 85}),
}  # fmt: skip


@pytest.mark.parametrize("model_type", NAMED_LIKE_LAYERS)
def test_fields_of_published_files_that_are_named_like_layers_are_no_obstacle(
    model_type: str,
) -> None:
    fields, wanted = NAMED_LIKE_LAYERS[model_type]
    layer_map = stack(fields["num_hidden_layers"], trim=5)
    deeper = deepen_config({"model_type": model_type, **fields}, layer_map)
    assert decoder_config(deeper.config).num_layers == 2 * (fields["num_hidden_layers"] - 5)
    assert wanted.items() <= deeper.config.items()


@pytest.mark.parametrize(
    ("model_type", "name"),
    [
        # Qwen/Qwen3-Next-80B-A3B-Instruct
        ("qwen3_next", "mtp.layers.0.mlp.experts.3.up_proj.weight"),
        ("qwen3_5_text", "mtp.layers.0.self_attn.q_proj.weight"),  # Qwen/Qwen3.5-27B
        # meituan-longcat/LongCat-Flash-Chat
        ("longcat_flash", "model.mtp.layers.0.eh_proj.weight"),
        ("ernie4_5_moe", "model.mtp_block.0.mlp.up_proj.weight"),  # baidu/ERNIE-4.5-21B-A3B-PT
        ("ernie4_5_moe", "model.mtp_linear_proj.0.weight"),
        ("ernie4_5_moe", "model.mtp_emb_norm.0.weight"),
        # Of transformers: _keys_to_ignore_on_load_unexpected
        ("hy_v4", "model.mtp_layers.0.eh_proj.weight"),
    ],
)
def test_modules_for_multi_token_prediction_beside_the_layers_stay_as_they_are(
    model_type: str, name: str
) -> None:
    depth = {"num_layers" if model_type == "longcat_flash" else "num_hidden_layers": 8}
    layers = [f"model.layers.{layer}.mlp.up_proj.weight" for layer in range(8)]
    found, warnings = find_stack(
        [*layers, name], decoder_config({"model_type": model_type, **depth})
    )
    assert (found.prefix, warnings) == ("model.layers", ())
    assert found.output_names(name, stack(8, trim=2)) == (name,)
