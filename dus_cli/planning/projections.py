"""Output projections, as data: the matrices by which a layer's blocks write to the residual stream.

With a pre-norm layer h + f(norm(h)) whose f ends in zeros, the layer is the identity: what LLaMA Pro's block
expansion rests on (arXiv:2401.02415, section 3.2). Names were read from the files that transformers 5.23 writes and
from models/*/modeling_*.py; tests/test_recipes.py holds every model type of the zoo against its base.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping
from typing import Any

from dus_cli.errors import CheckpointError, ConfigError, LayerMapError, shown, shown_list
from dus_cli.maps.layers import LayerMap, split_name
from dus_cli.maps.model_config import DecoderConfig
from dus_cli.maps.stacks import LayerStack
from dus_cli.planning.dtypes import FLOATS
from dus_cli.source.headers import TensorInfo

# The general rule: whatever bears one of these names writes to the residual stream.
PROJECTIONS = frozenset(
    """
    o_proj out_proj c_proj down_proj dense_4h_to_h fc2 fc_out w2 output_linear linear_out proj_down
    attention_out w_out wo_ud
    """.split()
)

# Names that mean other things elsewhere, with the block in which they are the output projection.
IN_BLOCK = frozenset(
    [
        ("attention", "dense"),  # gpt_neox, bailing_hybrid
        ("self_attention", "dense"),  # bloom, falcon
        ("self_attn", "dense"),  # phi, persimmon
        ("multi_head_attention", "dense"),  # ctrl
    ]
)

# What else a model type adds to the stream, as the names end; `*` is a number.
BY_TYPE: Mapping[str, tuple[str, ...]] = {
    "ctrl": ("ffn.*.weight", "ffn.*.bias"),  # two matrices by number; the first may be zeros as well
    "jetmoe": ("mlp.bias", "self_attention.experts.bias"),
}

# Model types whose layer is not h + f(h): zeros would not make it the identity.
NOT_IDENTITIES: Mapping[str, str] = {
    "beam": "its residual is scaled by the layer's number",
    "deepseek_v4": "it mixes several residual streams",
    "doge": "it scales the residual",
    "gemma4_text": "it scales the stream behind each layer",
    "gemma4_unified_text": "it scales the stream behind each layer",
    "glm_moe_dsa": "a layer hands on which tokens the next ones attend to",
    "hy_v4": "it mixes several residual streams",
    "inkling2_text": "later layers read each block of layers by itself",
    "longcat_flash": "some of its experts hand their input on",
    "minimax": "its residual is the normed input",
} | dict.fromkeys(
    "bart blenderbot-small marian mvp openai-gpt plbart trocr".split(),
    "its norms stand on the residual stream, behind each block",
)

# Fields of the config under which a layer is not h + f(h), with the value that makes it so.
NOT_WITH: Mapping[str, tuple[Any, str]] = {
    "do_layer_norm_before": (False, "norms then stand on the residual stream, behind each block"),  # opt
    "apply_residual_connection_post_layernorm": (True, "the residual is then the normed input"),  # bloom
}

# Where a block's tensors stand under something that is no block (dbrx).
_WRAPPERS = ("norm_attn_norm.",)

# Behind a block, and zero where it is: convolutions without bias (inkling_text).
_AFTER_BLOCKS = frozenset(["attn_sconv", "mlp_sconv"])

# Matrices that stand in a layer without a block around them, and the block that they are (opt, xglm, biogpt).
_BARE = frozenset(["fc1", "fc2"])

_NORM = re.compile(r"norm\d?$|norm_\w+$|^ln_?|layernorm", re.IGNORECASE)
_GATE = re.compile(r"gates?$|^router$")
_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


def pattern(suffix: str) -> str:
    """A tensor's name within its layer, numbers (of experts) as `*`.

    >>> pattern("mlp.experts.31.down_proj.weight")
    'mlp.experts.*.down_proj.weight'
    """
    return _NUMBER.sub("*", suffix)


def is_output_projection(suffix: str, model_type: str = "") -> bool:
    """Whether a tensor, by its name within its layer, is an output projection's weight or bias.

    >>> is_output_projection("self_attn.o_proj.weight"), is_output_projection("mlp.up_proj.weight")
    (True, False)
    """
    if pattern(suffix) in BY_TYPE.get(model_type, ()):
        return True
    parts = suffix.split(".")
    if parts[-1] in {"weight", "bias"}:
        parts.pop()
    if len(parts) > 1 and parts[-1] == "linear":  # moshi
        parts.pop()
    leaf = parts[-1].removesuffix("_bias").removesuffix("_weight") if parts else ""
    return leaf in PROJECTIONS or (len(parts) > 1 and (parts[-2], leaf) in IN_BLOCK)


def zero_patterns(
    decoder: DecoderConfig, stack: LayerStack, tensors: Iterable[TensorInfo], layer_map: LayerMap
) -> frozenset[str]:
    """The tensors of new layers that must be zeros for the model to compute what its base does; see `pattern`.

    Every tensor of the layers that stand twice is accounted for: in a norm, or in a block that ends in zeros.

    Raises:
        LayerMapError: the base does not stand in the output whole and in order, or nothing is new.
        ConfigError: the layers of this model are not h + f(h).
        CheckpointError: a block without an output projection, or with a quantised one.
    """
    _check_map(layer_map)
    _check_config(decoder)
    copied = {layer_map.sources[output] for output in layer_map.new_layers}
    layers: dict[int, list[TensorInfo]] = defaultdict(list)
    suffixes: dict[str, str] = {}
    for tensor in tensors:
        split = split_name(tensor.name)
        if split is not None and split.prefix == stack.prefix and split.index in copied:
            layers[split.index].append(tensor)
            suffixes[tensor.name] = split.suffix
    found: set[str] = set()
    for layer in sorted(layers):
        found |= _zeros_of([(suffixes[tensor.name], tensor) for tensor in layers[layer]], decoder.model_type)
    return frozenset(found)


def _check_map(layer_map: LayerMap) -> None:
    if not layer_map.new_layers:
        raise LayerMapError("--identity: this map has no new layer; leave it out, or give a deeper map")
    if not layer_map.holds_base:
        left_out = [str(layer) for layer, outputs in enumerate(layer_map.outputs) if not outputs]
        why = f"leaves out layers {shown_list(left_out)}" if left_out else "has them in another order"
        raise LayerMapError(
            f"--identity needs the base's layers in the output, all and in order, and this map {why}: "
            "the model could not start as its base; leave out --identity"
        )


def _check_config(decoder: DecoderConfig) -> None:
    reason = NOT_IDENTITIES.get(decoder.model_type)
    if reason is not None:
        raise ConfigError(f"--identity: layers of model type {decoder.model_type!r} cannot be identities: {reason}")
    for key, (value, reason) in NOT_WITH.items():
        if decoder.fields.get(key) is value:
            raise ConfigError(f"--identity: config.json has {key} {value}, so layers cannot be identities: {reason}")


def _zeros_of(layer: list[tuple[str, TensorInfo]], model_type: str) -> set[str]:
    """The patterns of one layer's output projections, once every block has one."""
    blocks: dict[str, list[str]] = defaultdict(list)
    zeros: set[str] = set()
    ended: set[str] = set()
    for suffix, tensor in layer:
        block = _block_of(suffix)
        if block is None:
            continue
        blocks[block].append(tensor.name)
        if is_output_projection(suffix, model_type):
            _check_float(tensor)
            zeros.add(pattern(suffix))
            ended |= {block, block.partition(".")[0]}  # experts end the block whose router chooses them
        elif any(
            part in PROJECTIONS or part.startswith(tuple(f"{p}_" for p in PROJECTIONS)) for part in suffix.split(".")
        ):
            raise _quantised(tensor)
    for block, names in blocks.items():
        if block not in ended:
            raise CheckpointError(
                f"--identity: no output projection is known in {shown_list(names)}: dus cannot make this layer an "
                "identity; leave out --identity"
            )
    return zeros


def _block_of(suffix: str) -> str | None:
    """The block that a tensor belongs to; None for a layer's own norms and for what only scales a block.

    Experts and shared experts are blocks of their own: each of them writes to the stream.
    """
    for wrapper in _WRAPPERS:
        suffix = suffix.removeprefix(wrapper)
    parts = suffix.split(".")
    if _NORM.search(parts[0]) or any(map(_GATE.search, parts)) or (parts[0] in _AFTER_BLOCKS and parts[-1] != "bias"):
        return None
    if parts[0] in _BARE:
        return "fc"
    path = [part for part in parts if not part.isdecimal()]
    if (
        len(path) > 2
        and re.search("expert|shared", path[1])
        and not _GATE.search(path[1])
        and not path[2].endswith("_bias")
    ):
        return f"{path[0]}.{path[1]}"
    return path[0]


def _check_float(tensor: TensorInfo) -> None:
    if tensor.dtype not in FLOATS:
        raise _quantised(tensor)


def _quantised(tensor: TensorInfo) -> CheckpointError:
    return CheckpointError(
        f"--identity: {shown(tensor.name)} ({tensor.dtype}) is a quantised output projection, and dus does not know "
        "which of its values mean zero; use the unquantised model, or leave out --identity"
    )
