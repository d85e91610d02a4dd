"""Tables of what configs and tensor names say about single layers, by model type. `rules` has the
code for each way of saying it; `model_config` and `stacks` apply it.

Read from transformers 5.23's source (models/*/configuration_*.py and modeling_*.py), and checked
against it by tests/test_zoo.py: every type here is up-scaled and compared with its base rearranged.
To add an architecture, add lines here. What is in no table is refused by name or reported, never
ignored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from dus_cli.errors import ConfigError, described
from dus_cli.maps.rules import (
    ByLayer,
    Cycle,
    DepthScaled,
    Derivation,
    Derived,
    Fields,
    FirstStay,
    Groups,
    IndexSet,
    Inside,
    Kept,
    LastLayerIs,
    MultipleOfDepth,
    OwnSource,
    Period,
    PeriodAndOffset,
    PerLayer,
    Places,
    Refused,
    Rule,
    SharedKeys,
    SparseStep,
    Spelled,
    Stretch,
    Stretched,
    Threshold,
    Unlike,
    check_period,
)

# --- depth and tensor names -----------------------------------------------------------------------

# The fields with the number of decoder layers, unless a type has another below.
DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")

# Rarer fields with that number (the first is OpenELM's), read if a config has none of those. Beside
# one of those, they are the depth if they have the same value.
OTHER_DEPTH_KEYS = (
    "num_transformer_layers",
    "num_decoder_layers",
    "n_decoder_layers",
    "decoder_layers",
    "num_blocks",
    "n_blocks",
    "n_block",
    "nlayers",
    "depth",
)

# The fields of a multimodal model's config that hold its decoder's config.
DECODER_KEYS = ("text_config", "llm_config", "language_config")

# The fields that hold the configs of its other models.
ENCODER_KEYS = ("vision_config", "audio_config", "vq_config")

# The prefixes of the decoder's layers in tensor names. `h`, `layers` and `blocks` alone occur in
# files that were saved without the language-modelling head (gpt2 on the Hub). transformers 5.23
# saves kimi_k25 and qianfan_ocr with `language_model.model.blocks` and `….encoder.layers`, because
# it reverts its renames of the vision tower's tensors in the decoder's names too
# (conversion_mapping.py).
LAYER_STACKS = (
    "model.layers",
    "layers",
    "transformer.h",
    "h",
    "transformer.blocks",
    "blocks",
    "transformer.layer",
    "gpt_neox.layers",
    "gpt_neox_japanese.layers",
    "biogpt.layers",
    "rwkv.blocks",
    "cpmant.encoder.layers",
    "reformer.encoder.layers",
    "model.decoder.layers",
    "decoder.layers",
    "prophetnet.decoder.layers",
    "backbone.layers",
    "backbone.blocks",
    "language_model.model.layers",
    "language_model.model.blocks",
    "language_model.model.encoder.layers",
    "model.language_model.layers",
    "language_model.layers",
    "model.text_model.layers",
    "model.language_model.model.layers",
    "model.llm.layers",
    "decoder.model.layers",
    "git.encoder.layer",
    "text_model.model.layers",
    "model.transformer.blocks",
    "language_model.backbone.layers",
    "language_model.model.decoder.layers",
    "model.layers.layers",
    "transformer.layers",
)

# The BERT family's decoders (config.json says `is_decoder`): bert.encoder.layer,
# roberta.encoder.layer, ….
DECODER_SUFFIX = "encoder.layer"

# Numbered stacks that belong to the decoder but not to its depth: multi-token prediction, if a part
# of the name is "mtp" or begins with "mtp_" (mtp.layers in qwen3_next,
# model.mtp_block and model.mtp_linear_proj in ernie4_5_moe, model.mtp_layers in hy_v4). Depth
# up-scaling leaves them as they are.
MTP_STACK = re.compile(r"(^|\.)mtp(_|\.|$)")

# --- lists that a model class computes if the file lacks them -------------------------------------


def every(
    period: int,
    kind: Any,
    others: Any,
    *,
    key: str | None = None,
    phase: int = 1,
    last: bool = False,
) -> Derivation:
    """The derivation of a list with `kind` in layers i where (i + phase) is a multiple of the
    period, and `others` elsewhere.

    The config may give the period under `key`. With `last`, the last layer has `kind` too.
    """

    def of(fields: Fields, num_layers: int) -> list[Any]:
        p = _period(fields, key, period) if key else period
        kinds = [others if (layer + phase) % p else kind for layer in range(num_layers)]
        return [*kinds[:-1], kind] if last else kinds

    return of


def head(
    count: int,
    first: str,
    rest: str,
    *,
    key: str | None = None,
    only_if: Mapping[str, Any] = MappingProxyType({}),
) -> Derivation:
    """The derivation of a list with `first` in the first `count` layers and `rest` in the others.

    All layers are `first` unless the switches `only_if` are on; each switch is given with the
    class's default.
    """

    def of(fields: Fields, num_layers: int) -> list[str]:
        k = _number(fields, key, count) if key else count
        k = (
            k
            if all(fields.get(switch, default) for switch, default in only_if.items())
            else num_layers
        )
        return [first if layer < k else rest for layer in range(num_layers)]

    return of


def _full_and_sliding(key: str | None = None, period: int = 4, phase: int = 1) -> Derived:
    of = every(period, "full_attention", "sliding_attention", key=key, phase=phase)
    return Derived("layer_types", of, (key,) if key else ())


def _full_and_linear(key: str | None = None, period: int = 4) -> Derived:
    of = every(period, "full_attention", "linear_attention", key=key)
    return Derived("layer_types", of, (key,) if key else ())


def _dense_first(
    count: int, key: str | None = None, dense: str = "dense", sparse: str = "sparse"
) -> Derived:
    return Derived("mlp_layer_types", head(count, dense, sparse, key=key), (key,) if key else ())


def _windows_from(key: str, default: int) -> Derived:
    switches = {"use_sliding_window": False, "sliding_window": 4096}
    return Derived(
        "layer_types",
        head(default, "full_attention", "sliding_attention", key=key, only_if=switches),
        (key,),
    )


def _number(fields: Fields, key: str, default: int) -> int:
    value = fields.get(key)
    if value is None:
        return default
    if type(value) is not int or value < 0:
        raise ConfigError(f"config.json: {key} is {described(value)}, not a number of layers")
    return value


def _period(fields: Fields, key: str, default: int) -> int:
    value = fields.get(key)
    return default if value is None else check_period(key, value)


def _sparse_after(fields: Fields, num_layers: int) -> list[str]:
    """axk1, dots3_note: experts after the first k layers, in every p-th layer or by a list."""
    k, listed = _number(fields, "first_k_dense_replace", 1), fields.get("moe_layer_freq")
    if not isinstance(listed, list):
        freq = _period(fields, "moe_layer_freq", 1)
        listed = [layer % freq == 0 for layer in range(num_layers)]
    if len(listed) != num_layers:
        return []
    return ["sparse" if layer >= k and listed[layer] else "dense" for layer in range(num_layers)]


def _cohere2_moe(fields: Fields, num_layers: int) -> list[str]:
    k = _number(fields, "first_k_dense_replace", 0)
    first = _period(fields, "prefix_dense_sliding_window_pattern", 1)
    rest = _period(fields, "sliding_window_pattern", 4)
    places = [(i + 1) % first for i in range(k)] + [(i + 1) % rest for i in range(num_layers - k)]
    return ["sliding_attention" if place else "full_attention" for place in places]


def _deepseek_v4(fields: Fields, num_layers: int) -> list[str]:
    names = {
        0: "sliding_attention",
        4: "compressed_sparse_attention",
        128: "heavily_compressed_attention",
    }
    ratios = fields.get("compress_ratios")
    if isinstance(ratios, list):
        return [names.get(ratio, "") for ratio in ratios[:num_layers]]
    return [names[128] if layer < 2 or layer % 2 == 0 else names[4] for layer in range(num_layers)]


def _backward(kind: Any, others: Any) -> Callable[[int], list[Any]]:
    """muse_glimmer, muse_spark: `kind` in every fourth layer, counted backward from the last."""
    return lambda num_layers: [
        others if (num_layers - 1 - layer) % 4 else kind for layer in range(num_layers)
    ]


def _muse_kinds(fields: Fields, num_layers: int) -> list[str]:
    return _backward("full_attention", "sliding_attention")(num_layers)


def _muse_theta(fields: Fields, num_layers: int) -> list[Any]:
    """[] if the file does not give the base of its rotary angles: then the list is unknown."""
    theta = (fields.get("rope_parameters") or {}).get("rope_theta")
    return [] if theta is None else _backward(0, theta)(num_layers)


def _step3p5(fields: Fields, num_layers: int) -> list[str]:
    listed = fields.get("moe_layers_enum")
    numbers = listed.split(",") if isinstance(listed, str) else listed
    sparse = (
        range(3, num_layers)
        if numbers is None
        else {int(number) for number in numbers if str(number).strip()}
    )
    return ["sparse" if layer in sparse else "dense" for layer in range(num_layers)]


def _dots1(fields: Fields, num_layers: int) -> list[str]:
    first = (
        _number(fields, "max_window_layers", 62)
        if fields.get("sliding_window", 4096)
        else num_layers
    )
    return [
        "sliding_attention" if layer >= first else "full_attention" for layer in range(num_layers)
    ]


def _dots3_note(fields: Fields, num_layers: int) -> list[str]:
    full = "full_attention" if fields.get("use_dsa") is False else "indexed_attention"
    return [
        full
        if not fields.get("use_sliding_window", True) or layer < 2 or layer % 4 == 1
        else "sliding_attention"
        for layer in range(num_layers)
    ]


def _exaone4(fields: Fields, num_layers: int) -> list[str]:
    pattern = fields.get("sliding_window_pattern", 4)
    if type(pattern) is not int or pattern < 1 or fields.get("sliding_window", 4096) is None:
        return []  # such a file must list its layers: transformers cannot derive the list either
    return every(pattern, "full_attention", "sliding_attention")(fields, num_layers)  # type: ignore[return-value]


def _flint(fields: Fields, num_layers: int) -> list[str]:
    full = [layer < 2 or layer % 4 == 1 or layer == num_layers - 1 for layer in range(num_layers)]
    return ["full_attention" if is_full else "sliding_attention" for is_full in full]


def _glm_moe_dsa(fields: Fields, num_layers: int) -> list[str]:
    pattern = fields.get("index_topk_pattern")
    if pattern is not None:
        names = {"F": "full", "S": "shared"}
        return [names.get(kind, kind) for kind in pattern] if len(pattern) == num_layers else []
    freq, offset = (
        max(_number(fields, "index_topk_freq", 1), 1),
        _number(fields, "index_skip_topk_offset", 2),
    )
    return [
        "shared" if max(layer - offset + 1, 0) % freq else "full" for layer in range(num_layers)
    ]


def _hy_v4(fields: Fields, num_layers: int) -> list[str]:
    return [
        "full" if layer == 0 or (layer - 1) % 4 == 0 else "shared" for layer in range(num_layers)
    ]


def _inkling(fields: Fields, num_layers: int) -> list[str]:
    local = fields.get("local_layer_ids")
    is_local = [
        (layer + 1) % 6 != 0 if local is None else layer in local for layer in range(num_layers)
    ]
    return ["hybrid_sliding" if sliding else "hybrid" for sliding in is_local]


def _lara_mini(_fields: Fields, num_layers: int) -> list[str]:
    pattern = ("linear", "sliding", "linear", "full", "sliding")
    return [f"{pattern[layer % len(pattern)]}_attention" for layer in range(num_layers)]


def _kimi_linear(fields: Fields, num_layers: int) -> list[str]:
    linear = fields.get("linear_attn_config") or {}
    full, kda = linear.get("full_attn_layers"), linear.get("kda_layers")
    if isinstance(full, list) and isinstance(kda, list):  # counted from 1
        return [
            "full_attention" if layer + 1 in full else "linear_attention"
            for layer in range(num_layers)
        ]
    return [
        "full_attention" if layer and layer % 4 == 0 else "linear_attention"
        for layer in range(num_layers)
    ]


def _lfm3(fields: Fields, num_layers: int) -> list[str]:
    names = {2: "full_attention", 0: "sliding_attention"}
    return [names.get(layer % 4, "conv") if layer else "conv" for layer in range(num_layers)]


def _llama4_experts(fields: Fields, num_layers: int) -> list[int]:
    step = _period(fields, "interleave_moe_layer_step", 1)
    return list(range(step - 1, num_layers, step))


_NO_ROPE = every(4, 0, 1, key="no_rope_layer_interval")


def _llama4(fields: Fields, num_layers: int) -> list[str]:
    rope = fields.get("no_rope_layers") or _NO_ROPE(fields, num_layers)
    return ["chunked_attention" if has_rope else "full_attention" for has_rope in rope]


def _mimo_v2_flash(fields: Fields, num_layers: int) -> list[str]:
    return [
        "sliding_attention" if layer and (layer + 1) % 6 else "full_attention"
        for layer in range(num_layers)
    ]


def _olmo_hybrid(fields: Fields, num_layers: int) -> list[str]:
    kinds = [
        "full_attention" if layer % 4 == 3 else "linear_attention" for layer in range(num_layers)
    ]
    return kinds if "full_attention" in kinds else [*kinds[:-1], "full_attention"]


def _qwen2_moe(fields: Fields, num_layers: int) -> list[str]:
    last = _number(fields, "max_window_layers", 28) if fields.get("use_sliding_window") else 0
    return [
        "full_attention" if layer % 2 or layer >= last else "sliding_attention"
        for layer in range(num_layers)
    ]


def _smollm3(fields: Fields, num_layers: int) -> list[str]:
    rope = fields.get("no_rope_layers") or _NO_ROPE(fields, num_layers)
    slides = fields.get("use_sliding_window") and fields.get("sliding_window") is not None
    return [
        "sliding_attention" if slides and not has_rope else "full_attention" for has_rope in rope
    ]


def _gemma3n_sparsity(_fields: Fields, num_layers: int) -> list[float]:
    sparse = 10 if num_layers > 10 else 0
    return [0.95] * sparse + [0.0] * (num_layers - sparse)


_gemma4 = every(6, "full_attention", "sliding_attention", last=True)

# --- the table ------------------------------------------------------------------------------------


class Tables(NamedTuple):
    """Modules outside the layers whose tensors have a block for each layer, and the axis along
    which these lie.

    The field `width_key` says how long a block is, 0 that there are none; `default_width` is what
    the class takes where the file is silent.
    """

    axes: Mapping[str, int]
    width_key: str
    default_width: int


class Architecture(NamedTuple):
    """The particulars of a model type. Fields that none of its rules reads follow the general rules
    below.

    Attributes:
        rules: rules for fields of the decoder's config.
        depth: the fields with the number of layers, if DEPTH_KEYS are not right.
        depth_of: lists (or texts) whose length is the depth instead.
        needs: endings of tensors that the checkpoint must have, because the class would compute
            them from the layers' numbers.
        beside: endings of prefixes, outside the layers, with one tensor for each layer, and the
            layer that has number 0 there.
        apart: prefixes of numbered tensors that are not per layer.
        refused: why the type cannot be deepened at all.
        wrapper: rules for the whole config.json of a multimodal model of this type, whose decoder
            has an entry of its own.
        tables: tensors outside the layers with a block for each layer.
    """

    rules: tuple[Rule, ...] = ()
    depth: tuple[str, ...] = ()
    depth_of: tuple[str, ...] = ()
    needs: tuple[str, ...] = ()
    beside: Mapping[str, int] = MappingProxyType({})
    apart: tuple[str, ...] = ()
    refused: str | None = None
    wrapper: tuple[Rule, ...] = ()
    tables: Tables | None = None


def _refused(why: str) -> Architecture:
    return Architecture(refused=why)


# It has a head and an embedding for each codebook.
_MUSICGEN = Architecture(apart=("lm_heads", "model.decoder.embed_tokens"))
_EXPERT_STEP = SparseStep()
# Decoders of encoder-decoder models. Their class also has the number of encoder layers, although
# there is no encoder, and sizes the generation cache by it (the configuration's num_hidden_layers):
# it follows the map if it was the decoder's depth.
_BART = Architecture(
    depth=("decoder_layers",),
    rules=(
        MultipleOfDepth("num_hidden_layers", may_differ=True),
        MultipleOfDepth("encoder_layers", may_differ=True),
    ),
)
_GEMMA4 = Architecture(
    rules=(
        Derived("layer_types", _gemma4),
        LastLayerIs("layer_types", "full_attention", _gemma4),
        ByLayer("per_layer_config"),
        SharedKeys("num_kv_shared_layers", 0, _gemma4),
    )
)
# In the modeling code: get_per_layer_inputs and project_per_layer_inputs.
_PER_LAYER_EMBEDDINGS = Tables(
    {"embed_tokens_per_layer": 1, "per_layer_model_projection": 0},
    "hidden_size_per_layer_input",
    256,
)
_QWEN2_VL = Architecture(rules=(_windows_from("max_window_layers", 80),))
_DEEPSTACK = FirstStay(
    ("vision_config", "deepstack_visual_indexes"), 3, "visual features are added after each of them"
)
_DEEP_VISION = Architecture(wrapper=(_DEEPSTACK,))
_ENCODER_DECODER = _refused(
    "it is an encoder-decoder model, and dus deepens decoder-only language models"
)
_MUSE = Architecture(
    rules=(Derived("layer_types", _muse_kinds), Derived("layer_rope_theta", _muse_theta))
)
_QWEN35 = Architecture(rules=(_full_and_linear("full_attention_interval"),))
_GRANITE_SWA = Architecture(rules=(_full_and_sliding(phase=0),))

# The types with particulars; a multimodal model's type is that of its `text_config`. The comments
# say where transformers has them, if not in the configuration's __post_init__.
ARCHITECTURES: Mapping[str, Architecture] = {
    "afmoe": Architecture(
        rules=(
            _full_and_sliding("global_attn_every_n_layers"),
            Threshold("num_dense_layers", default=1),
        )
    ),
    "axk1": Architecture(
        rules=(
            Derived("mlp_layer_types", _sparse_after, ("first_k_dense_replace", "moe_layer_freq")),
        )
    ),
    "axk2": Architecture(
        rules=(
            Derived("mlp_layer_types", _sparse_after, ("first_k_dense_replace", "moe_layer_freq")),
        )
    ),
    "bailing_hybrid": Architecture(
        rules=(_full_and_linear("layer_group_size", 6), _dense_first(2, "first_k_dense_replace"))
    ),
    "bart": _BART,
    # In the modeling code: depth_scaled_residual_add.
    "beam": _refused("its residual additions are scaled by the layer's number"),
    "bigbird_pegasus": _BART,
    "blenderbot": _BART,
    "blenderbot-small": _BART,
    "blip": _refused(
        "its text decoder reads the image through cross-attention in every layer, it is no "
        "decoder alone"
    ),
    "blt": _refused(
        "it is made of several stacks of layers (patcher, encoder, global and local decoder)"
    ),
    "cohere2": Architecture(
        rules=(
            _full_and_sliding("sliding_window_pattern"),
            # "local_attn_first" in published files; not read
            Kept(("order_of_interleaved_layers",)),
        )
    ),
    "cohere2_moe": Architecture(
        rules=(
            Derived(
                "layer_types",
                _cohere2_moe,
                (
                    "first_k_dense_replace",
                    "prefix_dense_sliding_window_pattern",
                    "sliding_window_pattern",
                ),
            ),
            _dense_first(0, "first_k_dense_replace"),
        )
    ),
    "cohere_compass": _DEEP_VISION,
    "cosmos3_omni": Architecture(wrapper=(_DEEPSTACK,), apart=("blocks",)),
    "cwm": Architecture(rules=(_full_and_sliding(phase=0),)),
    "deepseek_ocr2_text": Architecture(
        rules=(Threshold("first_k_dense_replace", instead="mlp_layer_types"),)
    ),
    "deepseek_v2": Architecture(rules=(Threshold("first_k_dense_replace"),)),
    "deepseek_v3": Architecture(rules=(Threshold("first_k_dense_replace", default=3),)),
    "deepseek_v32": Architecture(rules=(_dense_first(3, "first_k_dense_replace"),)),
    "deepseek_v4": Architecture(
        rules=(
            Derived("layer_types", _deepseek_v4),
            _dense_first(3, "num_hash_layers", "hash_moe", "moe"),
            PerLayer("compress_ratios", beyond="num_nextn_predict_layers"),
        )
    ),
    "diffllama": _refused("a constant in its attention is computed from the layer's number"),
    "diffusion_gemma": _refused(
        "it denoises blocks of text, with an encoder and a decoder that share one stack of layers"
    ),
    "dory": _refused(
        "its middle layers are run in several passes, and its config.json counts attention and MLP "
        "blocks apart"
    ),
    "dots1": Architecture(
        rules=(
            Derived("layer_types", _dots1, ("max_window_layers",)),
            Threshold("first_k_dense_replace"),
        )
    ),
    "dots3_note_text": Architecture(
        rules=(
            Derived("mlp_layer_types", _sparse_after, ("first_k_dense_replace", "moe_layer_freq")),
            Derived("layer_types", _dots3_note),
            ByLayer("per_layer_config"),
        )
    ),
    "ernie4_5_moe": Architecture(rules=(Stretch(),)),  # modeling: Ernie4_5_MoeDecoderLayer.__init__
    "ernie4_5_vl_moe_text": Architecture(rules=(_dense_first(1), Kept(("moe_intermediate_size",)))),
    "evolla": _refused(
        "its adapters stand in every (depth / aligner_num_add_layers)-th layer, which changes "
        "with the depth"
    ),
    "exaone4": Architecture(rules=(Derived("layer_types", _exaone4, ("sliding_window_pattern",)),)),
    "exaone_moe": Architecture(
        rules=(
            Derived("layer_types", _exaone4, ("sliding_window_pattern",)),
            _dense_first(1, "first_k_dense_replace"),
        )
    ),
    "flint": Architecture(rules=(Derived("layer_types", _flint), SparseStep(default_dense=(0, 1)))),
    "florence2": _ENCODER_DECODER,
    "gemma2": Architecture(rules=(_full_and_sliding(period=2),)),
    "gemma3_text": Architecture(
        rules=(_full_and_sliding("sliding_window_pattern", 6), Kept(("_sliding_window_pattern",)))
    ),
    "gemma3n_text": Architecture(
        rules=(
            _full_and_sliding(period=5),
            Derived("activation_sparsity_pattern", _gemma3n_sparsity),
            SharedKeys("num_kv_shared_layers", 15, every(5, "full_attention", "sliding_attention")),
            Kept(("hidden_size_per_layer_input", "altup_active_idx")),
        ),
        tables=_PER_LAYER_EMBEDDINGS,
        apart=tuple(
            f"{prefix}altup_{kind}"
            for prefix in ("", "model.", "language_model.", "model.language_model.")
            for kind in ("projections", "unembed_projections")
        ),
    ),
    "gemma4_assistant": _refused("its layers read the keys and values of another model"),
    "gemma4_text": _GEMMA4._replace(
        rules=(*_GEMMA4.rules, Kept(("hidden_size_per_layer_input",))), tables=_PER_LAYER_EMBEDDINGS
    ),
    "gemma4_unified_assistant": _refused("its layers read the keys and values of another model"),
    "gemma4_unified_text": _GEMMA4,
    "glm4_moe": Architecture(rules=(Threshold("first_k_dense_replace", default=1),)),
    "glm4_moe_lite": Architecture(rules=(_dense_first(1),)),
    "glm4v_moe_text": Architecture(rules=(Threshold("first_k_dense_replace", default=1),)),
    "glm5_next_text": Architecture(
        rules=(
            Derived("layer_types", every(4, "indexed_attention", "linear_attention")),
            Derived(
                "indexer_types",
                _glm_moe_dsa,
                ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
            ),
            _dense_first(3),
        )
    ),
    "glm_moe_dsa": Architecture(
        rules=(
            Derived(
                "indexer_types",
                _glm_moe_dsa,
                ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
            ),
            _dense_first(3, "first_k_dense_replace"),
        )
    ),
    "gpt_neo": Architecture(rules=(Groups("attention_types"), PerLayer("attention_layers"))),
    # In the modeling code: use_bias.
    "gpt_neox_japanese": Architecture(rules=(Unlike(-1, "only its attention has a bias"),)),
    "gpt_oss": Architecture(rules=(_full_and_sliding(period=2),)),
    "granite4_vision": Architecture(
        wrapper=(
            Places("deepstack_layer_map", in_pairs=True),
            Places("spatial_target_layers", default=(12, 15, 18, 21)),
        )
    ),
    "granite_docling": _DEEP_VISION,
    "granite_swa": _GRANITE_SWA,
    "granitemoe_swa": _GRANITE_SWA,
    "hrm_text": _refused("its layers form stacks that are run in cycles"),
    "hy_v3": Architecture(rules=(_dense_first(1),)),
    "hy_v4": Architecture(rules=(_dense_first(1), Derived("indexer_types", _hy_v4))),
    "idefics": _refused(
        "its cross-attention stands in a stack of its own, found by the layer's number"
    ),
    "inkling2_loop_text": _refused("its middle layers are run in several passes"),
    "inkling2_text": Architecture(  # modeling: is_block_boundary, attention_input
        rules=(
            Derived("layer_types", every(6, "hybrid", "hybrid_sliding")),
            Period("n_layers_per_attn_res_block", default=6, phase=0),
            Unlike(0, "only it attends to no block before it"),
        ),
        beside={"attn_res.attn_queries": 1, "attn_res.mlp_queries": 0},  # conversion_mapping.py
    ),
    "inkling_text": Architecture(
        rules=(
            IndexSet("local_layer_ids"),
            Derived("layer_types", _inkling),
            _dense_first(0, "dense_mlp_idx"),
        )
    ),
    "jamba": Architecture(
        rules=(
            PeriodAndOffset("attn_layer_period", "attn_layer_offset", (8, 4), "attention", "mamba"),
            PeriodAndOffset(
                "expert_layer_period", "expert_layer_offset", (2, 1), "expert", "dense"
            ),
        )
    ),
    "kimi_linear": Architecture(
        rules=(
            Inside(
                "linear_attn_config",
                (IndexSet("full_attn_layers", first=1), IndexSet("kda_layers", first=1)),
            ),
            Derived("layer_types", _kimi_linear),
            _dense_first(1, "first_k_dense_replace"),
            Kept(("moe_layer_freq",)),  # not read
        )
    ),
    "kolibri1": Architecture(rules=(_full_and_sliding(period=5),)),
    "kosmos_2_5_text_model": Architecture(depth=("layers",)),
    "kosmos_2_text_model": Architecture(depth=("layers",)),
    "laguna": Architecture(rules=(_dense_first(1),)),
    "lara_mini": Architecture(rules=(Derived("layer_types", _lara_mini),)),
    "lfm2_moe": Architecture(rules=(Threshold("num_dense_layers", default=2),)),
    "lfm3": Architecture(rules=(Derived("layer_types", _lfm3),)),
    "llama4_text": Architecture(
        rules=(
            Derived("no_rope_layers", _NO_ROPE, ("no_rope_layer_interval",)),
            Derived(
                "moe_layers", _llama4_experts, ("interleave_moe_layer_step",), is_index_set=True
            ),
            Derived("layer_types", _llama4),
        )
    ),
    "longcat_flash": Architecture(
        depth=("num_layers",), rules=(MultipleOfDepth("num_hidden_layers", 2),)
    ),
    "marian": _BART,
    "mbart": _BART,
    "mimo_v2_flash": Architecture(
        rules=(
            Derived("layer_types", _mimo_v2_flash),
            _dense_first(1),
            # The published file's lists say the same for its own code; transformers ignores them.
            PerLayer("hybrid_layer_pattern"),
            PerLayer("moe_layer_freq"),
        )
    ),
    "minicpm3": Architecture(rules=(DepthScaled("scale_depth", 1.4),)),  # modeling: residual scale
    "minimax": Architecture(
        rules=(Derived("layer_types", every(2, "linear_attention", "full_attention")),),
        # modeling: get_slope_rate computes decay rates from the layer's number, unless the file
        # has them
        needs=("slope_rate", "query_decay", "key_decay", "diagonal_decay"),
    ),
    "minimax_m3_vl_text": Architecture(
        rules=(
            Inside("sparse_attention_config", (PerLayer("sparse_attention_freq"),)),
            PerLayer("moe_layer_freq"),
        )
    ),
    "mistral4": Architecture(rules=(Threshold("first_k_dense_replace"),)),
    "mistral_large4_text": Architecture(
        rules=(
            Derived("no_rope_layers", _NO_ROPE, ("no_rope_layer_interval",)),
            Derived(
                "indexer_types",
                _glm_moe_dsa,
                ("index_topk_pattern", "index_topk_freq", "index_skip_topk_offset"),
            ),
            _dense_first(1, "first_k_dense_replace"),
            OwnSource("kv_source_layers"),
        )
    ),
    "modernbert-decoder": Architecture(
        rules=(
            _full_and_sliding("global_attn_every_n_layers", 3, phase=0),
            Unlike(0, "only it has no norm before its attention"),  # modeling: attn_norm
        )
    ),
    "molmo2_text": Architecture(rules=(IndexSet("rope_scaling_layers"),)),
    "muse_glimmer_text": _MUSE,
    "muse_spark_text": _MUSE,
    "musicgen_decoder": _MUSICGEN,
    "musicgen_melody_decoder": _MUSICGEN,
    "mvp": _BART,
    "nemotron_h": Architecture(
        depth_of=("layers_block_type", "layer_types", "hybrid_override_pattern"),
        rules=(
            Spelled("hybrid_override_pattern"),
            Kept(("mtp_layers_block_type", "mtp_hybrid_override_pattern")),
        ),
    ),
    "olmo3": Architecture(rules=(_full_and_sliding(),)),
    "olmo_hybrid": Architecture(rules=(Derived("layer_types", _olmo_hybrid),)),
    "pegasus": _BART,
    "pi0": _refused(
        "it is two models, a language model and an action expert, layer by layer side by side"
    ),
    "pix2struct": _ENCODER_DECODER,
    "plbart": _BART,
    "pp_formulanet": _ENCODER_DECODER,
    "prophetnet": Architecture(
        depth=("num_decoder_layers",),
        rules=(
            MultipleOfDepth("num_hidden_layers", may_differ=True),
            MultipleOfDepth("num_encoder_layers", may_differ=True),
        ),
    ),
    "qwen2": Architecture(rules=(_windows_from("max_window_layers", 28),)),
    "qwen2_5_omni_text": Architecture(rules=(_windows_from("max_window_layers", 28),)),
    "qwen2_5_vl_text": _QWEN2_VL,
    "qwen2_moe": Architecture(
        rules=(Derived("layer_types", _qwen2_moe, ("max_window_layers",)), _EXPERT_STEP)
    ),
    "qwen2_vl_text": _QWEN2_VL,
    "qwen3": Architecture(rules=(_windows_from("max_window_layers", 28),)),
    "qwen3_5_moe_text": _QWEN35,
    "qwen3_5_text": _QWEN35,
    # read by no layer
    "qwen3_moe": Architecture(rules=(_EXPERT_STEP, Kept(("max_window_layers",)))),
    "qwen3_next": Architecture(rules=(_full_and_linear("full_attention_interval"), _EXPERT_STEP)),
    "qwen3_omni_moe_text": Architecture(rules=(_EXPERT_STEP,)),
    "qwen3_omni_moe_thinker": _DEEP_VISION,
    "qwen3_vl": _DEEP_VISION,
    "qwen3_vl_moe": _DEEP_VISION,
    "qwen3_vl_moe_text": Architecture(rules=(_EXPERT_STEP,)),
    "qwen4_exp_text": Architecture(
        rules=(
            Derived(
                "layer_types",
                every(4, "indexed_attention", "linear_attention", key="full_attention_interval"),
                ("full_attention_interval",),
            ),
            Refused(
                "ple_layer_ids",
                "its n-gram tables are sized by the layer's place among those that have one",
            ),
        )
    ),
    "recurrent_gemma": Architecture(
        rules=(Cycle("block_types", ("recurrent", "recurrent", "attention")),)
    ),
    "reformer": Architecture(
        depth_of=("attn_layers",),
        rules=(PerLayer("attn_layers"),),
        apart=("reformer.embeddings.position_embeddings.weights",),
    ),
    # In the modeling code: pre_ln.
    "rwkv": Architecture(rules=(Unlike(0, "only it has a norm before its block"),)),
    **dict.fromkeys(
        ("sarvam_mla", "sarvam_moe"),
        Architecture(rules=(Threshold("first_k_dense_replace", default=1),)),
    ),
    "smollm3": Architecture(
        rules=(
            Derived("no_rope_layers", _NO_ROPE, ("no_rope_layer_interval",)),
            Derived("layer_types", _smollm3),
        )
    ),
    "step3p5": Architecture(
        rules=(
            PerLayer("layer_types", beyond="num_nextn_predict_layers"),
            Derived("mlp_layer_types", _step3p5, ("moe_layers_enum",)),
            *(
                PerLayer(key, beyond="num_nextn_predict_layers")
                for key in (
                    "swiglu_limits",
                    "swiglu_limits_shared",
                    "rope_theta",
                    "partial_rotary_factors",
                )
            ),
            ByLayer("per_layer_config"),
        )
    ),
    "t5": _ENCODER_DECODER,  # beside an image encoder: blip-2, instructblip
    "t5gemma2": _ENCODER_DECODER,
    "trocr": _BART,
    "udop": _ENCODER_DECODER,
    "unlimited_ocr_text": Architecture(rules=(_dense_first(1, "first_k_dense_replace"),)),
    "vaultgemma": Architecture(rules=(_full_and_sliding(period=2),)),
    "vision-encoder-decoder": _ENCODER_DECODER,
    "whisper": _BART,
    "xlm": _refused("its layers are spread over several stacks of modules"),
    "xlstm": Architecture(depth=("num_blocks", "num_hidden_layers")),
    "zamba": _refused("its layers share one attention block"),
    "zamba2": _refused("its layers share attention blocks"),
    # In the modeling code: use_eda.
    "zaya": Architecture(rules=(Unlike(0, "only its router takes nothing from the layer below"),)),
}

# Types that transformers does not have, or has under another name: their code is published with the
# checkpoints (`auto_map`). dus does not run it; how it uses a layer's number was read in it.
_DEEPSEEK_V3 = ARCHITECTURES["deepseek_v3"]
_LIGHTNING = Architecture(needs=ARCHITECTURES["minimax"].needs, rules=(PerLayer("attn_type_list"),))
CUSTOM_ARCHITECTURES: Mapping[str, Architecture] = {
    "bailing_moe_linear": _refused(
        "the decay of its linear attention is computed from the layer's number"
    ),
    "deepseek": Architecture(rules=(Threshold("first_k_dense_replace"), Period("moe_layer_freq"))),
    "kimi_k2": _DEEPSEEK_V3,
    "minicpm": Architecture(rules=(DepthScaled("scale_depth", 1.0),)),
    # on MiniCPM, Llama or Qwen
    "minicpmv": Architecture(rules=(DepthScaled("scale_depth", None),)),
    "minimax_m1": _LIGHTNING,
    "minimax_text_01": _LIGHTNING,
    "openelm": Architecture(
        rules=(
            PerLayer("num_query_heads"),
            PerLayer("num_kv_heads"),
            Stretched("ffn_multipliers"),
            Stretched("qkv_multipliers", instead="num_query_heads"),
        ),
    ),
    "phi3small": Architecture(rules=(Period("dense_attention_every_n_layers"),)),
    "plamo2": Architecture(
        rules=(Period("mamba_step", only_if="mamba_enabled"), IndexSet("full_attention_idx"))
    ),
    "step3_text": Architecture(rules=(IndexSet("moe_layers_enum"),)),
    **dict.fromkeys(
        """
        Yi aquila baichuan chatglm exaone internlm internlm2 orion plamo qwen skywork stablelm_epoch
        telechat xverse
        """.split(),
        Architecture(),
    ),
}

# Model types that need only the general rules, as tests/test_zoo.py and tests/test_wrappers.py
# check. A type in no table is accepted with a warning if its config shows nothing per layer.
PLAIN_TYPES = frozenset(
    """
    apertus apertus1p5_text arcee aria_text bamba bert bert-generation big_bird biogpt bitnet
    bloom camembert chameleon codegen cohere cohere_compass_text cosmos3_edge_text cpmant ctrl
    data2vec-text dbrx doge electra emu3_text_model ernie ernie4_5 exaone falcon falcon_h1
    falcon_mamba flex_olmo gemma git glm glm4 glm4v_text glm_ocr_text gpt2 gpt_bigcode
    gpt_neox gptj granite granite4_vision_text granite_docling_text granitemoe
    granitemoehybrid granitemoeshared helium hunyuan_v1_dense hunyuan_v1_moe hunyuan_vl_text
    hyperclovax internlm3 iquestcoder jais2 jetmoe lfm2 llama mamba mamba2 megatron-bert
    mellum minimax_m2 ministral ministral3 mistral mixtral mllama_text_model moshi mpt
    nanochat nemotron olmo olmo2 olmoe openai-gpt opt paddleocr_vl_text persimmon phi phi3
    phi4_multimodal phimoe qwen3_vl_text rembert roberta roberta-prelayernorm roc_bert
    roformer seed_oss solar_open stablelm starcoder2 xglm xlm-roberta xlm-roberta-xl xlnet
    xmod youtu
    """.split()
)
# The types that the tests compare with transformers' classes, and all types in the tables.
TRIED_TYPES = PLAIN_TYPES | {name for name, entry in ARCHITECTURES.items() if entry.refused is None}
KNOWN_TYPES = TRIED_TYPES | {
    name for name, entry in CUSTOM_ARCHITECTURES.items() if entry.refused is None
}

# The type of a class in published code, for configs that only name the class.
TYPE_OF_CLASS: Mapping[str, str] = {
    name.replace("_", "").lower(): name for name in CUSTOM_ARCHITECTURES
}

# The rules for fields of these names, in any type whose own rules do not read them.
GENERAL_RULES: tuple[Rule, ...] = (
    *map(
        PerLayer,
        """
        layer_types mlp_layer_types no_rope_layers layer_rope_theta num_attention_heads_per_layer
        indexer_types layers_block_type intermediate_size num_key_value_heads num_attention_heads
        num_query_heads ffn_multipliers num_kv_heads num_key_value_heads_per_layer moe_topk
        num_experts_per_tok num_shared_expert block_configs activation_sparsity_pattern
        attention_layers attn_type_list
        """.split(),
    ),
    *map(
        IndexSet,
        "cross_attention_layers attn_layer_indices full_attn_idxs moe_layers "
        "local_layer_ids".split(),
    ),
    IndexSet("mlp_only_layers"),
    IndexSet("moe_layers_enum"),
    ByLayer("pruned_heads"),
    Period("decoder_sparse_step"),
    Spelled("hybrid_override_pattern"),
    Period("sliding_window_pattern", instead="layer_types"),
    Period("_sliding_window_pattern", instead="layer_types"),
    Period("full_attention_interval", instead="layer_types"),
    Period("global_attn_every_n_layers", instead="layer_types"),
    Period("layer_group_size", instead="layer_types"),
    Period("no_rope_layer_interval", instead="no_rope_layers"),
    Period("interleave_moe_layer_step", instead="moe_layers"),
    Period("moe_layer_freq", instead="mlp_layer_types"),
    Period("moe_layer_interval"),
    Period("attn_layer_period"),
    Period("expert_layer_period"),
    Period("mamba_step", only_if="mamba_enabled"),
    Period("cla_share_factor", only_if="use_cla"),
    Period("dense_attention_every_n_layers"),
    Threshold("max_window_layers", instead="layer_types", only_if="use_sliding_window"),
    Threshold("first_k_dense_replace", instead="mlp_layer_types"),
    Threshold("num_dense_layers", instead="mlp_layer_types"),
    Refused(
        "scale_attn_by_inverse_layer_idx",
        "it divides attention by the layer's number, which changes with the depth",
    ),
    Refused(
        "scale_depth",
        "it scales residuals by the square root of the depth",
        otherwise=DepthScaled("scale_depth", None),
    ),
    Refused("num_kv_shared_layers", "its layers share keys and values, counted from the last"),
    Refused("hidden_size_per_layer_input", "its per-layer embeddings stand outside the layers"),
    Refused(
        "per_layer_config", "its keys are layer numbers", otherwise=ByLayer("per_layer_config")
    ),
    Refused(
        "attention_types",
        "it spells the kinds of the layers as repeated groups",
        otherwise=Groups("attention_types"),
    ),
    Refused("block_types", "it is read cyclically along the depth", otherwise=Cycle("block_types")),
    Refused("linear_attn_config", "it holds lists of layer numbers"),
    Refused("compress_ratios", "it is a pattern along the depth"),
    # Fields whose names are suspicious but that say nothing about single layers, and lists whose
    # length may equal the depth by chance.
    Kept(
        tuple(
            """
            num_nextn_predict_layers num_mtp_layers mtp_num_hidden_layers mtp_transformer_layers
            encoder_layers decoder_layers vocab_size_per_layer_input attn_layer_offset
            expert_layer_offset architectures eos_token_id bos_token_id pad_token_id bad_words_ids
            suppress_tokens begin_suppress_tokens forced_decoder_ids mrope_section time_step_limit
            ssm_multipliers rope_local_base_freq mlp_multipliers languages dtypes
            keys_to_ignore_at_inference mtp_layer_types mtp_mlp_layer_types
            """.split()
        )
    ),
)

# Endings of class names of encoders and encoder-decoders, which dus does not deepen.
ENCODER_HEADS = (
    "ForMaskedLM",
    "ForPreTraining",
    "ForImageClassification",
    "ForCTC",
    "ForMaskedImageModeling",
)


def architecture(model_type: str) -> Architecture:
    """The entry of this type; an empty one if it has none."""
    return ARCHITECTURES.get(model_type) or CUSTOM_ARCHITECTURES.get(model_type, Architecture())


def general_rules_for(model_type: str) -> tuple[Rule, ...]:
    """The general rules for fields that the type's own do not read."""
    own = architecture(model_type).rules
    own_keys = {key for rule in own for key in rule.reads}
    general: list[Rule] = []
    for rule in GENERAL_RULES:
        if isinstance(rule, Kept):
            general.append(Kept(tuple(key for key in rule.reads if key not in own_keys)))
        elif not own_keys.intersection(rule.reads):
            general.append(rule)
    return tuple(general)


def rules_for(model_type: str) -> tuple[Rule, ...]:
    """The type's own rules, then the general ones."""
    return (*architecture(model_type).rules, *general_rules_for(model_type))
