"""Tiny random models of every architecture in transformers' causal-LM mapping, and their expected
logits after up-scaling.

The expected logits do not depend on how a config describes its layers: the base runs once, every
layer's arguments (masks, rotary angles, …) are recorded, and the layers are called again in the
order of the map, each with the arguments that it had in the base.
"""

from __future__ import annotations

import copy
import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
import transformers
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

from dus_cli.models.replay import Replay
from dus_cli.models.residual import scaled_residual

CAUSAL_TYPES = tuple(sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
# Models of images and text. In the causal mapping some of their types mean the decoder only.
WRAPPERS: dict[str, str] = dict(MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES)

# Types that no map can deepen, with words of the refusal.
REFUSED = {
    "beam": "its residual additions are scaled by the layer's number",
    "blt": "it is made of several stacks of layers (patcher, encoder, global and local decoder)",
    "diffllama": "a constant in its attention is computed from the layer's number",
    "dory": "its middle layers are run in several passes, and its config.json counts attention and MLP blocks apart",
    "gemma4_assistant": "its layers read the keys and values of another model",
    "gemma4_unified_assistant": "its layers read the keys and values of another model",
    "inkling2_loop_text": "its middle layers are run in several passes",
    "hrm_text": "its layers form stacks that are run in cycles",
    "xlm": "its layers are spread over several stacks of modules",
    "zamba": "its layers share one attention block",
    "zamba2": "its layers share attention blocks",
}
# Types that need another library, and where else they are tested.
NOT_TRIED = {"gemma3n": "its vision tower needs timm; its decoder is gemma3n_text below"}
EQUAL = tuple(name for name in CAUSAL_TYPES if name not in REFUSED and name not in NOT_TRIED)

# Types of transformers versions newer than that in tests/constraints.txt.
NEWER = frozenset(
    "apertus1p5_text dory exaone inkling2_loop_text lara_mini sarvam_mla sarvam_moe".split()
)

# Types with a config class of their own, but with another type's model class.
_OF_OTHER_CLASSES = frozenset(["exaone", "sarvam_mla", "sarvam_moe"])

# Small sizes by all names that configs have for them; a type uses those that it has.
TINY: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embed_dim": 32, "word_embed_proj_dim": 32, "emb_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 64, "shared_expert_intermediate_size": 48,
    "moe_intermediate_size": 16, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4, "dff": 48,
    "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64,
    "n_positions": 64, "max_seq_len": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "state_size": 8, "expand": 2, "rotary_dim": 4,
    "sliding_window": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_groups": 2,
    "query_pre_attn_scalar": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "attention_chunk_size": 6, "dropout": 0.0, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
    "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "dropout_p": 0.0, "is_decoder": True,
    "is_encoder_decoder": False, "decoder_ffn_dim": 48, "encoder_ffn_dim": 48, "decoder_attention_heads": 4,
    "encoder_attention_heads": 4, "encoder_layers": 7, "num_encoder_layers": 7, "num_encoder_attention_heads": 4,
    "num_decoder_attention_heads": 4, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "mamba_expand": 2,
    "mamba_n_groups": 1, "dim_ff": 48, "dim_head": 8, "moe_num_experts": 4, "type_vocab_size": 2,
    "max_target_positions": 64, "max_source_positions": 64, "hidden_act_dropout": 0.0, "classifier_dropout": 0.0,
    "embedding_size": 32, "projection_dim": 32, "num_hidden_groups": 1, "norm_topk_prob": True,
}  # fmt: skip

# Encoders beside a multimodal decoder.
VISION: dict[str, Any] = {
    "num_hidden_layers": 2, "depth": 2, "num_layers": 2, "hidden_size": 32, "embed_dim": 32, "intermediate_size": 48,
    "num_attention_heads": 4, "num_heads": 4, "image_size": 28, "patch_size": 14, "out_hidden_size": 32,
    "num_position_embeddings": 16, "per_layer_config": {}, "adapter_in_dim": 32,
}  # fmt: skip

NUM_LAYERS = 7

_ROPE = {"rope_type": "default", "rope_theta": 10000.0}
_PER_LAYER = {"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 96}
_GEMMA4 = {"hidden_size_per_layer_input": 0, "vocab_size_per_layer_input": 96, "global_head_dim": 8}

# What a type's class asks of its sizes, and kinds of layers where its defaults have only one.
SPECIAL: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1, 4]},
    "bailing_hybrid": {"num_expert_group": 1, "num_experts_per_token": 2, "num_shared_experts": 1},
    "cohere_compass_text": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}},
    "dbrx": {
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0},
        "ffn_config": {"ffn_hidden_size": 48, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": {"first_k_dense_replace": 1},
    "deepseek_v3": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1, "max_window_layers": 3},
    "dots3_note_text": {
        "swa_num_attention_heads": 4, "swa_num_key_value_heads": 4, "swa_q_lora_rank": 16, "swa_kv_lora_rank": 16,
        "swa_head_dim": 16, "swa_qk_nope_head_dim": 8, "swa_v_head_dim": 8, "index_head_dim": 16, "index_n_heads": 2,
        "index_topk": 8, "num_key_value_heads": 4,
    },
    "ernie4_5_moe": {"moe_k": 2},
    "falcon_h1": {"mamba_d_ssm": 64},
    "gemma3n_text": _PER_LAYER | {
        "num_kv_shared_layers": 2, "intermediate_size": [48, 56, 48, 56, 48, 56, 48], "laurel_rank": 4,
        "activation_sparsity_pattern": [0.9, 0.5, 0.0, 0.0, 0.5, 0.0, 0.0],
        "layer_types": [*["sliding_attention"] * 2, "full_attention", *["sliding_attention"] * 3, "full_attention"],
    },
    "gemma4_text": _GEMMA4 | _PER_LAYER,
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe": {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "gpt_neo": {"attention_types": [[["global", "local"], 3], [["global"], 1]], "window_size": 6},
    "granitemoehybrid": {"layer_types": ["linear_attention", "full_attention", *["linear_attention"] * 3,
                                         "full_attention", "linear_attention"]},
    "glm_moe_dsa": {"index_topk": 6, "index_topk_freq": 3, "index_head_dim": 16, "index_n_heads": 2},
    "hy_v4": {"index_topk": 6, "index_head_dim": 16, "index_n_heads": 2},
    "jamba": {"attn_layer_period": 3, "attn_layer_offset": 1, "expert_layer_period": 3, "expert_layer_offset": 2},
    "kimi_linear": {"linear_num_heads": 4, "linear_head_dim": 8, "num_expert_group": 1, "num_experts_per_token": 2},
    "lfm2": {"full_attn_idxs": [1, 4]},
    "lfm2_moe": {"layer_types": ["conv", "full_attention", "conv", "conv", "full_attention", "conv", "conv"]},
    "inkling2_text": {"n_layers_per_attn_res_block": 3, "unpadded_vocab_size": 96},
    "longcat_flash": {"ffn_hidden_size": 48, "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 2},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "mllama_text_model": {"cross_attention_layers": [1, 4]},
    "nemotron_h": {
        "layers_block_type": ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe", "mlp"],
        "mamba_num_heads": 4, "mamba_head_dim": 16, "ssm_state_size": 8, "n_groups": 1,
    },
    "phi3": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen2_moe": {"num_experts": 4, "use_sliding_window": True, "max_window_layers": 5, "mlp_only_layers": [1, 2]},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3_moe": {"mlp_only_layers": [0, 3]},
    "qwen3_next": {"mlp_only_layers": [0, 3]},
    "qwen4_exp_text": {"indexer_n_heads": 2, "indexer_kv_heads": 1, "indexer_head_dim": 8, "indexer_budget": 8,
                       "indexer_compress_ratio": 2},
    "reformer": {"attn_layers": ["local", "lsh", "local", "lsh", "local", "local", "lsh"],
                 "axial_pos_embds_dim": [16, 16], "axial_pos_shape": [8, 8], "num_buckets": 4},
    "roc_bert": {"shape_vocab_size": 96, "shape_embed_dim": 16, "pronunciation_vocab_size": 96,
                 "pronunciation_embed_dim": 16},
    "rwkv": {"rescale_every": 0},
    "smollm3": {"use_sliding_window": True},
    "xmod": {"default_language": "en_XX", "languages": ["en_XX"]},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [2, 1, 1]}

# Where the class asks for an encoder of a library that is not installed here (timm).
_CLIP = {"model_type": "clip_vision_model", "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
         "num_attention_heads": 4, "image_size": 28, "patch_size": 14}  # fmt: skip

# What the classes of whole multimodal models ask of their sizes, merged into those that fit by
# name.
WRAPPER_SPECIAL: dict[str, dict[str, Any]] = {
    "blip-2": {"num_query_tokens": 4, "image_token_index": 90},
    "chameleon": {"vocabulary_map": {"<image>": 90},
                  "vq_config": {"embed_dim": 16, "num_embeddings": 16, "latent_channels": 16, "resolution": 32,
                                "base_channels": 32, "channel_multiplier": [1, 2], "num_res_blocks": 1}},
    "cohere2_vision": {"alignment_intermediate_size": 64, "downsample_factor": 2},
    "cosmos3_edge": {"text_config": {"rope_parameters": _MROPE}, "projector_hidden_size": 64},
    "deepseek_ocr2": {
        "text_config": {"mlp_layer_types": ["dense", *["sparse"] * 6]},
        "vision_config": {
            "sam_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "output_channels": 8,
                           "image_size": 64, "global_attn_indexes": [1], "downsample_channels": [16, 32]},
            "encoder_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 8,
                               "num_attention_heads": 4, "num_key_value_heads": 2},
        },
    },
    "dots3_note": {"audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
                   "vision_config": {"adapter_out_dim": 32}},
    "emu3": {"vocabulary_map": {"<image>": 90},
             "vq_config": {"base_channels": 32, "channel_multiplier": [1, 2], "attn_resolutions": [1],
                           "num_res_blocks": 1, "codebook_size": 16, "hidden_size": 32}},
    "ernie4_5_vl_moe": {"text_config": {"moe_intermediate_size": [16, 16], "moe_k": 2,
                                        "rope_parameters": _MROPE | {"mrope_section": [1, 1, 2]}}},
    "fast_vlm": {"vision_config": _CLIP},
    "glm46v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v": {"text_config": {"rope_parameters": _MROPE}},
    "glm4v_moe": {"text_config": {"rope_parameters": _MROPE | {"partial_rotary_factor": 1.0}}},
    "glm5_next": {"text_config": {"qk_rope_head_dim": 0, "index_topk": 8, "index_kpool": 2, "index_head_dim": 16,
                                  "index_n_heads": 2, "linear_num_heads": 4, "linear_head_dim": 8}},
    "glm_ocr": {"text_config": {"rope_parameters": _MROPE}},
    "glmga": {"text_config": {"rope_parameters": _MROPE}},
    "granite4_vision": {"deepstack_layer_map": [[0, 0], [1, 1]], "spatial_target_layers": [0, 1, 5, 6],
                        "downsample_rate": "1/2", "qformer_config": {"num_hidden_layers": 1},
                        "vision_config": {"hidden_size": 64}},
    "hunyuan_vl": {"text_config": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0,
                                                       "mrope_section": [1, 1, 1, 1]}}},
    "inkling2": {"vision_config": {"text_hidden_size": 32}, "audio_config": {"text_hidden_size": 32}},
    "inkling_mm_model": {"vision_config": {"text_hidden_size": 32, "patch_size": 4, "num_hidden_layers": 2},
                         "audio_config": {"text_hidden_size": 32}},
    "instructblip": {"num_query_tokens": 4, "image_token_index": 90, "qformer_config": {"vocab_size": 96}},
    "instructblipvideo": {"num_query_tokens": 4, "video_token_index": 90, "qformer_config": {"vocab_size": 96}},
    "janus": {"vq_config": {"embed_dim": 8, "num_embeddings": 16, "latent_channels": 32, "base_channels": 32,
                            "channel_multiplier": [1, 1], "projection_dim": 32, "image_token_embed_dim": 32},
              "vision_config": {"projection_dim": 32}},
    "kosmos-2": {"latent_query_num": 4, "text_config": {"layers": 7, "embed_dim": 32}},
    "kosmos-2.5": {"latent_query_num": 4, "text_config": {"layers": 7, "embed_dim": 32}},
    "llama4": {"vision_config": {"projector_input_dim": 32, "projector_output_dim": 32, "vision_output_dim": 32}},
    "mistral_large4": {"text_config": {"index_topk": 8, "index_head_dim": 16, "index_n_heads": 2}},
    "mistral4": {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "llama_4_scaling_beta": 0.1,
                                     "original_max_position_embeddings": 64, "partial_rotary_factor": 0.5},
                 "first_k_dense_replace": 2},
    "molmo2": {"text_config": {"rope_scaling_layers": [1, 2, 5]}, "vision_config": {"image_size": [28, 28]},
               "adapter_config": {"vision_feature_layer": [1], "hidden_size": 32, "intermediate_size": 48,
                                  "text_hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 4,
                                  "head_dim": 8}},
    "muse_glimmer": {"projector_hidden_size": 64},
    "muse_spark": {"projector_hidden_size": 64, "out_hidden_size": 128,
                   "audio_config": {"num_hidden_layers": 4, "hidden_sizes": [8, 8, 8, 8], "depths": [1, 1, 1, 1]}},
    "nemotron_h_omni": {"projector_hidden_size": 32, "vision_hidden_size": 32,
                        "vision_config": {"video_temporal_patch_size": 2}},
    "paddleocr_vl": {"text_config": {"rope_parameters": _MROPE}},
    "perception_lm": {"vision_config": _CLIP | {"model_args": {"embed_dim": 32}}},
    "qwen2_5_omni_thinker": {"text_config": {"rope_parameters": _MROPE},
                             "audio_config": {"d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 48,
                                              "encoder_attention_heads": 4, "output_dim": 32}},
    "qwen2_5_vl": {"text_config": {"rope_parameters": _MROPE, "use_sliding_window": True, "max_window_layers": 3}},
    "qwen2_vl": {"text_config": {"rope_parameters": _MROPE, "use_sliding_window": True, "max_window_layers": 3},
                 "vision_config": {"hidden_size": 32}},
    "qwen3_omni_moe_thinker": {
        "text_config": {"rope_parameters": _MROPE, "mlp_only_layers": [0, 3]},
        "vision_config": {"deepstack_visual_indexes": [0, 1]},
        "audio_config": {"d_model": 32, "encoder_layers": 2, "encoder_ffn_dim": 48, "encoder_attention_heads": 4,
                         "output_dim": 32, "downsample_hidden_size": 16},
    },
    "cohere_compass": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "cosmos3_omni": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "granite_docling": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_vl": {"vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "qwen3_vl_moe": {"text_config": {"mlp_only_layers": [0, 3]}, "vision_config": {"deepstack_visual_indexes": [0, 1]}},
    "step3p7": {"text_config": {"layer_types": ["sliding_attention", "full_attention", *["sliding_attention"] * 5],
                                "num_sliding_attention_heads": 2, "swiglu_limits": [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0],
                                "sliding_window": 6}},
    "unlimited_ocr": {
        "text_config": {"num_key_value_heads": 4},
        "vision_config": {
            "sam_config": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "output_channels": 8,
                           "image_size": 64, "global_attn_indexes": [1], "downsample_channels": [16, 32]},
            "encoder_config": {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
                               "num_attention_heads": 4, "image_size": 28, "patch_size": 14},
        },
    },
}  # fmt: skip

DEPTH_KEYS = (
    "decoder_layers",
    "num_decoder_layers",
    "num_hidden_layers",
    "n_layer",
    "n_layers",
    "num_layers",
)


def _sizes(model_type: str, known: dict[str, Any]) -> dict[str, Any]:
    sizes = {key: value for key, value in TINY.items() if key in known}
    depth = next((key for key in DEPTH_KEYS if key in known), None)
    if depth is not None:
        sizes[depth] = NUM_LAYERS
    if "kv_lora_rank" in known and "num_key_value_heads" in known:
        sizes["num_key_value_heads"] = 4  # latent attention has a key and a value for every head
    for key, nested in known.items():
        if isinstance(nested, dict) and key.endswith("_config") and "model_type" in nested:
            if key == "text_config":
                sizes[key] = _sizes(nested["model_type"], nested)
            else:
                sizes[key] = {name: value for name, value in VISION.items() if name in nested}
            sizes[key]["model_type"] = nested["model_type"]
    return sizes | SPECIAL.get(model_type, {})


def _merged(sizes: dict[str, Any], special: dict[str, Any]) -> dict[str, Any]:
    merged = dict(sizes)
    for key, value in special.items():
        is_part = (
            isinstance(value, dict) and isinstance(sizes.get(key), dict) and key.endswith("_config")
        )
        merged[key] = _merged(sizes[key], value) if is_part else value
    return merged


def model_class(model_type: str, *, whole: bool = False) -> Any:
    """The class of this type's causal language model (for some wrappers, of their decoder only), or
    of the whole wrapper.
    """
    return getattr(
        transformers, (WRAPPERS if whole else MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)[model_type]
    )


def tiny_config(model_type: str, *, whole: bool = False) -> Any:
    """A config of this type with seven layers and small sizes; the class chooses the layers' kinds."""
    config = model_class(model_type, whole=whole).config_class
    if whole:
        known = config().to_dict()
        return config(
            **_merged(_sizes(config.model_type, known), WRAPPER_SPECIAL.get(model_type, {}))
        )
    if config.model_type == model_type or model_type in _OF_OTHER_CLASSES:
        config = transformers.CONFIG_MAPPING[model_type]
    return config(**_sizes(config.model_type, config().to_dict()))


def tiny_model(model_type: str, *, whole: bool = False) -> Any:
    """A random model of this type, in which all parameters differ.

    Raises:
        MemoryError: the model would not be tiny.
    """
    config = tiny_config(model_type, whole=whole)
    build = model_class(model_type, whole=whole)._from_config
    with torch.device("meta"):
        probe = build(copy.deepcopy(config), attn_implementation="eager")
    count = sum(parameter.numel() for parameter in probe.parameters())
    if count > 8_000_000:
        largest = max(probe.named_parameters(), key=lambda named: named[1].numel())
        raise MemoryError(f"{count} parameters, the largest {largest[0]} {tuple(largest[1].shape)}")
    torch.manual_seed(0)
    model = build(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            is_scale = parameter.ndim == 1 and name.endswith("weight")
            parameter.copy_(torch.randn_like(parameter) * 0.2 + is_scale)
    return model


def load(model_type: str, folder: Any, *, whole: bool = False) -> tuple[Any, dict[str, Any]]:
    """Load a model as a user would; returns it and the loader's complaints."""
    of_type = model_class(model_type, whole=whole)
    if model_type in _OF_OTHER_CLASSES:
        of_type = transformers.AutoModelForCausalLM
    build = of_type.from_pretrained
    model, info = build(folder, output_loading_info=True, attn_implementation="eager")
    return model.eval(), {key: value for key, value in info.items() if value}


def decoder_layers(model: Any, num_layers: int = NUM_LAYERS) -> tuple[Any, str]:
    """The module that holds the decoder's layers, and the attribute's name."""
    for module in model.modules():
        for name, child in module.named_children():
            if (
                isinstance(child, torch.nn.ModuleList)
                and len(child) == num_layers
                and list(child.parameters())
            ):
                return module, name
    raise LookupError(f"no list of {num_layers} layers")


def tokens(model: Any) -> torch.Tensor:
    """Token ids, shape (3, 20), longer than the window of 6; for musicgen a row for each codebook."""
    rows = model.config.num_codebooks if "musicgen" in model.config.model_type else 3
    found = torch.stack([torch.arange(20) * (2 * row + 1) % 87 + 3 for row in range(rows)])
    if model.config.model_type in _WITH_IMAGES:
        found[:, :4] = 90
    return found


# Wrappers that do not run on text alone; an image stands for the first four tokens.
_WITH_IMAGES = frozenset(["blip-2", "instructblip", "instructblipvideo", "kosmos-2"])


def _image(model: Any, tokens: torch.Tensor) -> dict[str, Any]:
    model_type, rows = model.config.model_type, len(tokens)
    if model_type == "kosmos-2":
        embeds = torch.linspace(-1, 1, rows * 4 * 32).reshape(rows, 4, 32)
        return {"image_embeds": embeds, "image_embeds_position_mask": tokens == 90}
    if model_type not in _WITH_IMAGES:
        return {}
    frames = (1,) if model_type == "instructblipvideo" else ()
    pixels = torch.linspace(-1, 1, rows * 3 * 28 * 28).reshape(rows, *frames, 3, 28, 28)
    return {"pixel_values": pixels} | (
        {} if model_type == "blip-2" else {"qformer_input_ids": tokens[:, 4:]}
    )


def generates_alike_without_cache(model: Any) -> bool:
    """Whether greedy generation is the same with and without the cache. Some types cannot generate."""
    rows = tokens(model)
    start = rows if "musicgen" in model.config.model_type else rows[:1]
    found = []
    for use_cache in (True, False):
        with torch.no_grad():
            try:
                found.append(
                    model.generate(start, max_new_tokens=4, do_sample=False, use_cache=use_cache)
                )
            except (TypeError, ValueError, IndexError):
                return False
    return torch.equal(*found)


@torch.no_grad()
def logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's logits, shape (batch, tokens, vocabulary)."""
    return _logits(model, tokens)


def _logits(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    forward = inspect.signature(model.forward).parameters
    takes_cache = "use_cache" in forward or any(p.kind is p.VAR_KEYWORD for p in forward.values())
    settings = {"use_cache": False} if takes_cache else {}
    found: torch.Tensor = model(
        input_ids=tokens, **_image(model, tokens), **settings
    ).logits.float()
    return found


# Types whose layers pass each other more than one hidden state: their layers are rearranged, not
# replayed.
REARRANGED = frozenset(["glm_moe_dsa", "hy_v4", "inkling2_text", "reformer", "zaya"])


def rearranged(model: Any, sources: Sequence[int]) -> Any:
    """A copy of the model with its layers, and the per-layer lists of its config, in another order."""
    stacked = copy.deepcopy(model)
    holder, name = decoder_layers(stacked)
    layers = getattr(holder, name)
    setattr(holder, name, torch.nn.ModuleList([copy.deepcopy(layers[layer]) for layer in sources]))
    config = stacked.config.get_text_config()
    for key, value in config.to_dict().items():
        if key in DEPTH_KEYS:
            setattr(config, key, len(sources))
        elif isinstance(value, list) and len(value) == len(layers):
            setattr(config, key, [value[layer] for layer in sources])
    return stacked


def expected_logits(
    model: Any, sources: Sequence[int], tokens: torch.Tensor, factors: Sequence[float] = ()
) -> torch.Tensor:
    """The logits that the up-scaled model must have, shape (batch, tokens, vocabulary). `factors`
    has one factor for each output layer.
    """
    if getattr(model.config.get_text_config(), "num_kv_shared_layers", 0):
        assert not factors
        return sharing_keys(model, sources, tokens)
    if model.config.get_text_config().model_type in REARRANGED:
        deeper = rearranged(model, sources)
        holder, name = decoder_layers(deeper, len(sources))
        with _forwards(
            list(getattr(holder, name)), lambda number, forward: _scaled(forward, factors, number)
        ):
            return logits(deeper, tokens)
    return replayed(model, sources, tokens, factors)


@torch.no_grad()
def sharing_keys(model: Any, sources: Sequence[int], tokens: torch.Tensor) -> torch.Tensor:
    """Logits of the base with its layers called in this order, which hand keys and values on.

    Each is called with what the base hands it, but that they share one dict of keys and values.
    """
    holder, name = decoder_layers(model)
    layers = list(getattr(holder, name))
    called: dict[int, tuple[tuple[Any, ...], dict[str, Any]]] = {}

    def kept(number: int, forward: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            called[number] = args[1:], kwargs
            return forward(*args, **kwargs)

        return call

    with _forwards(layers, kept) as forwards:
        _logits(model, tokens)
    shared: dict[str, Any] = {}

    def in_order(hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
        for base in sources:
            args, kwargs = called[base]
            hidden = forwards[base](hidden, *args, **kwargs | {"shared_kv_states": shared})
        return hidden

    def passed_on(hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
        return hidden

    with _forwards(layers, lambda number, _: passed_on if number else in_order):
        return _logits(model, tokens)


def _scaled(forward: Any, factors: Sequence[float], number: int) -> Any:
    """A layer's forward with a factor on what it adds to the stream."""
    factor = factors[number] if factors else 1.0
    if factor == 1:
        return forward

    def call(*args: Any, **kwargs: Any) -> Any:
        with scaled_residual(_hidden(args, kwargs), factor):
            return forward(*args, **kwargs)

    return call


def _hidden(args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
    found: torch.Tensor = args[0] if args else kwargs["hidden_states"]
    return found


@contextmanager
def _forwards(layers: Sequence[Any], wrap: Any) -> Iterator[list[Any]]:
    originals = [layer.forward for layer in layers]
    for number, layer in enumerate(layers):
        layer.forward = wrap(number, originals[number])
    try:
        yield originals
    finally:
        for layer in layers:
            del layer.forward


@torch.no_grad()
def replayed(
    model: Any, sources: Sequence[int], tokens: torch.Tensor, factors: Sequence[float] = ()
) -> torch.Tensor:
    """Logits of the base with its layers called in the order of `sources`, each as it is called in
    the base.

    With `factors`, one for each of `sources`, what a layer adds to the residual stream is scaled.
    """
    model.forward = partial(model.forward, **_image(model, tokens))
    try:
        replay = Replay(model, NUM_LAYERS, tokens, lambda _: nullcontext())
        replay.take([tokens])
        hidden = replay.start
        for output, base in enumerate(sources):
            hidden = replay.layer(base, 0, hidden, factors[output] if factors else 1.0)
        found: torch.Tensor = replay.finish(tokens, hidden).logits.float()
    finally:
        del model.forward
    return found


def zeros_without_gradient(
    model: Any, base: Any, tokens: torch.Tensor, sources: Sequence[int], layers: Sequence[int]
) -> list[str]:
    """Matrices of these layers that are zeros and get no gradient from any logit, though the base's
    do.

    Text alone leaves some of a base's matrices without one too: cross-attention runs only where an
    encoder does.

    Args:
        model: the deeper model; layer i is the base's layer `sources[i]`.
        base: what it was made from.
        tokens: shape (batch, tokens).
        sources: the layer map.
        layers: the layers of `model` to look at.
    """
    written, original = _layer_matrices(model, len(sources)), _layer_matrices(base)
    zeros = {
        (layer, suffix): original[sources[layer]][suffix]
        for layer in layers
        for suffix, matrix in written[layer].items()
        if not matrix.any()
    }
    for one in (model, base):
        _backward(one, tokens)
    can_learn = [place for place, matrix in zeros.items() if _has_gradient(matrix)]
    assert can_learn
    return [
        f"{layer}.{suffix}"
        for layer, suffix in can_learn
        if not _has_gradient(written[layer][suffix])
    ]


def _layer_matrices(
    model: Any, num_layers: int = NUM_LAYERS
) -> list[dict[str, torch.nn.Parameter]]:
    holder, name = decoder_layers(model, num_layers)
    return [
        {suffix: parameter for suffix, parameter in layer.named_parameters() if parameter.ndim > 1}
        for layer in getattr(holder, name)
    ]


def _backward(model: Any, tokens: torch.Tensor) -> None:
    torch.manual_seed(0)
    outputs = _logits(model, tokens)
    torch.autograd.backward((outputs * torch.randn_like(outputs)).sum())


def _has_gradient(matrix: torch.nn.Parameter) -> bool:
    return matrix.grad is not None and bool(matrix.grad.any())
