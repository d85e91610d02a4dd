"""From the base's config to the deeper one's, each layer keeping its kind. Pure: dict to dict.

What is not understood is refused by name: a config that is wrong in silence gives a model that loads
and computes something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Literal

from dus_cli.errors import ConfigError, shown
from dus_cli.maps import architectures as arch
from dus_cli.maps.layers import MAX_OUTPUT_LAYERS, LayerMap, split_name
from dus_cli.maps.rules import Kinds, follow_list

# Names that speak of single layers. A field named so that stands in no table is refused.
_SUSPICIOUS = re.compile(
    r"pattern|interval|period|freq(uency)?($|_)|every_n|(^|_)(idx|idxs|indices|indexes)($|_)|_index$|layer_index"
    r"|layer_(id|ids|types?|offset)s?($|_)|_layers$|^layers_|_sparse_step$|first_k_|_per_layer($|_)"
)

# What a person may decide about a field that dus does not know: leave it, or let it follow the layer map.
Assumption = Literal["keep", "map"]
_ASSUMED = {"keep": "was kept", "map": "followed the map"}
_NOTHING: Mapping[str, Assumption] = MappingProxyType({})

# Where a config lists modules by name for a quantiser (compressed-tensors wrote the second before transformers did).
_QUANTIZATION_KEYS = ("quantization_config", "compression_config")

# Expressions over module names: `re:` (compressed-tensors, torchao), `+:` and `-:` (GPTQModel's `dynamic`), or shell
# patterns (quark, modelopt). What says "any number" or counts inside a name (w1, w[13]) names no layer.
_EXPRESSION = re.compile(r"^(re|[+-]):|[\\*?\[\](){}+^$|]")
_ANY_NUMBER = re.compile(r"(\[0-9\]|\\d)([+*]|\{1,\d*\})\??|(?<=[A-Za-z_])(\[[\d-]+\]|\d+)")
_SINGLE_NUMBER = re.compile(r"\d|\\d")


@dataclass(frozen=True)
class DecoderConfig:
    """The part of config.json that describes the decoder: the whole of it, or its `text_config`.

    `depth_keys` are the fields that hold the depth as a number; where there are none, a list's length does.
    `wrapper_type` is the `model_type` of the whole.
    """

    model_type: str
    wrapper_type: str
    fields: dict[str, Any]
    depth_keys: tuple[str, ...]
    num_layers: int
    nested_in: str | None
    is_multimodal: bool

    @property
    def is_causal_bert(self) -> bool:
        """Of the BERT family, but a decoder: its config says so."""
        return self.fields.get("is_decoder") is True


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Find the decoder's depth in a parsed config.json.

    Raises:
        ConfigError: no depth, several that disagree, or one that is no number of layers.
    """
    nested_in = _nested_in(config)
    fields: dict[str, Any] = config[nested_in] if nested_in else config
    model_type, wrapper_type = _model_type(config, nested_in), str(config.get("model_type") or "")
    entry = arch.architecture(model_type)
    if nested_in and not entry.depth_of and not any(key in fields for key in (*entry.depth, *arch.DEPTH_KEYS)):
        if not any(config.get(key) is not None for key in arch.DEPTH_KEYS):
            raise ConfigError(
                f"config.json: {nested_in} does not say how many layers the decoder has (older files leave that to "
                "the model's class); load and save the base once with a current transformers, which writes it"
            )
        nested_in, fields = None, config
        model_type = _model_type(config, None)
        entry = arch.architecture(model_type)
    is_multimodal = nested_in is not None or any(config.get(key) for key in arch.ENCODER_KEYS)
    listed = next((key for key in entry.depth_of if fields.get(key)), None)
    if listed is not None:
        counted = ("num_hidden_layers",) if fields.get("num_hidden_layers") is not None else ()
        return DecoderConfig(model_type, wrapper_type, fields, counted, len(fields[listed]), nested_in, is_multimodal)
    names = entry.depth or arch.DEPTH_KEYS
    keys = tuple(key for key in names if fields.get(key) is not None)
    if not keys:
        raise ConfigError(
            "config.json does not say how many layers the model has (looked for "
            f"{', '.join(names)}, also in text_config); is this a decoder-only language model?"
        )
    depths = {key: fields[key] for key in keys}
    if nested_in:  # some wrappers repeat the decoder's depth
        depths |= {f"{key} (top level)": config[key] for key in arch.DEPTH_KEYS if config.get(key) is not None}
    for key, depth in depths.items():
        if type(depth) is not int or not 1 <= depth <= MAX_OUTPUT_LAYERS:
            raise ConfigError(f"config.json: {key} is {shown(depth)}, not a number of layers")
    if len(set(depths.values())) > 1:
        said = ", ".join(f"{key} {depth}" for key, depth in depths.items())
        raise ConfigError(f"config.json gives several depths that disagree ({said}); refusing to guess")
    return DecoderConfig(model_type, wrapper_type, fields, keys, fields[keys[0]], nested_in, is_multimodal)


def _nested_in(config: dict[str, Any]) -> str | None:
    """The field that holds the decoder's config in a multimodal model's."""
    return next((key for key in arch.DECODER_KEYS if isinstance(config.get(key), dict)), None)


def _model_type(config: dict[str, Any], nested_in: str | None) -> str:
    """The decoder's type: of older multimodal files, that do not give it or have no `text_config`, the wrapper's with
    "_text".
    """
    outer = str(config.get("model_type") or "")
    inner = config[nested_in].get("model_type") if nested_in else None
    if inner:
        return str(inner)
    entry = arch.ARCHITECTURES.get(outer)
    is_decoder = outer in arch.KNOWN_TYPES and not (entry and entry.wrapper)
    return outer if is_decoder or f"{outer}_text" not in arch.KNOWN_TYPES else f"{outer}_text"


@dataclass(frozen=True)
class DeeperConfig:
    """The config of the deeper model, key order kept.

    `kinds` says what the config says of each base layer, a name for each way of saying it: every output layer
    keeps the kinds of its source. `warnings` are for what a person should look at.
    """

    config: dict[str, Any]
    kinds: Kinds
    warnings: tuple[str, ...]


def deepen_config(
    config: dict[str, Any], layer_map: LayerMap, assume: Mapping[str, Assumption] = _NOTHING
) -> DeeperConfig:
    """Carry a config to the depth of the map.

    Args:
        config: the parsed config.json.
        layer_map: the map.
        assume: what a person decided about fields that no rule reads, by name.

    Raises:
        ConfigError: a per-layer field that cannot follow the map, or that is not understood.
    """
    refuse_types(config)
    decoder = decoder_config(config)
    assert decoder.num_layers == layer_map.num_base_layers
    rules = arch.rules_for(decoder.model_type)
    taken = {*decoder.depth_keys, *(key for rule in rules for key in rule.reads)}
    _check_assumptions(assume, decoder, taken)
    warnings: list[str] = []
    if decoder.model_type not in arch.KNOWN_TYPES:
        warnings.append(
            f"model type {shown(decoder.model_type)!r} is not one dus knows; nothing per-layer was found in "
            "its config, but check the result before you spend compute on it"
        )
    of_wrapper: dict[str, Any] = {}
    for rule in arch.architecture(decoder.wrapper_type).wrapper:
        of_wrapper |= rule.follow(config, layer_map)
    changed: dict[str, Any] = {}
    kinds: Kinds = {}
    for rule in rules:
        changed |= rule.follow(decoder.fields, layer_map)
        kinds |= rule.kinds(decoder.fields, decoder.num_layers)
    for key, value in decoder.fields.items():
        if key not in taken:
            changed |= _unknown_field(key, value, layer_map, assume.get(key), warnings)
    changed |= dict.fromkeys(decoder.depth_keys, len(layer_map))
    deeper = _with_quantization(decoder.fields | changed, layer_map)
    if decoder.nested_in:
        repeated = {key: len(layer_map) for key in arch.DEPTH_KEYS if config.get(key) is not None}
        deeper = _with_quantization(config | {decoder.nested_in: deeper} | repeated, layer_map)
    deeper |= of_wrapper
    several = {name: found for name, found in kinds.items() if len(set(found)) > 1}
    return DeeperConfig(deeper, several, tuple(warnings))


def refuse_types(config: dict[str, Any]) -> None:
    """Nothing, unless the model or its decoder is of a type that no layer map can deepen.

    Raises:
        ConfigError: it is.
    """
    for model_type in (_model_type(config, None), _model_type(config, _nested_in(config))):
        refused = arch.architecture(model_type).refused
        if refused is not None:
            raise ConfigError(f"model type {model_type!r} cannot be deepened by copying layers: {refused}")


def _check_assumptions(assume: Mapping[str, Assumption], decoder: DecoderConfig, taken: set[str]) -> None:
    for key in assume:
        if key in taken:
            raise ConfigError(f"--assume {shown(key)}: dus knows how this field follows the map; leave it out")
        if key not in decoder.fields:
            where = f"config.json's {decoder.nested_in}" if decoder.nested_in else "config.json"
            raise ConfigError(f"--assume {shown(key)}: {where} has no such field")


def _unknown_field(
    key: str, value: Any, layer_map: LayerMap, assumed: Assumption | None, warnings: list[str]
) -> dict[str, Any]:
    """A field that no rule reads: decided by a person, plainly harmless, a list per layer, or refused."""
    n = layer_map.num_base_layers
    if assumed is not None:
        warnings.append(f"config.json: {shown(key)} {_ASSUMED[assumed]}, as --assume says")
        if assumed == "keep":
            return {}
        if isinstance(value, str):
            return {key: "".join(follow_list(key, value, layer_map))}
        if isinstance(value, list):
            return {key: follow_list(key, value, layer_map)}
        raise ConfigError(
            f"--assume {shown(key)}=map: its value {shown(value)} is neither a list nor a text with one entry per layer"
        )
    if value in (None, [], {}) or isinstance(value, (bool, float)):
        return {}
    if isinstance(value, list) and len(value) == n:
        warnings.append(f"config.json: {shown(key)} is a list with one entry per layer ({n}) and followed the map")
        return {key: follow_list(key, value, layer_map)}
    if _SUSPICIOUS.search(key):
        raise ConfigError(
            f"config.json: {shown(key)} looks like it describes single layers, and dus does not know how it "
            f"follows the layer map (value {shown(value)}); say --assume {shown(key)}=keep, or =map if it has an "
            "entry per layer"
        )
    return {}


def _with_quantization(config: dict[str, Any], layer_map: LayerMap) -> dict[str, Any]:
    """Lists of module names in `quantization_config` (`modules_to_not_convert`, `ignore`, …) follow their layers.

    Whatever the field is called: transformers' utils/quantization_config.py knows a dozen names for them.
    """
    found = {key: config[key] for key in _QUANTIZATION_KEYS if isinstance(config.get(key), dict)}
    return config | {key: _follow_names(value, layer_map) for key, value in found.items()}


def _follow_names(value: Any, layer_map: LayerMap) -> Any:
    if isinstance(value, dict):
        follows: dict[str, Any] = {}
        for key, entry in value.items():
            for name in _output_names(key, layer_map):
                follows[name] = _follow_names(entry, layer_map)
        return follows
    if isinstance(value, list):
        follows_list: list[Any] = []
        for entry in value:
            if isinstance(entry, str):
                follows_list.extend(_output_names(entry, layer_map))
            else:
                follows_list.append(_follow_names(entry, layer_map))
        return follows_list
    if isinstance(value, str) and "." in value:  # auto-round's names of blocks, with commas between them
        names = [output for name in value.split(",") for output in _output_names(name.strip(), layer_map)]
        return value if names == [name.strip() for name in value.split(",")] else ",".join(names)
    return value


def _output_names(name: str, layer_map: LayerMap) -> list[str]:
    """A module name with a layer number, once for each output layer that copies that layer."""
    split = split_name(name)
    if split is None or split.prefix not in arch.LAYER_STACKS:
        if _EXPRESSION.search(name) and _SINGLE_NUMBER.search(_ANY_NUMBER.sub("", name)):
            raise ConfigError(
                f"quantization_config: the expression {shown(name)!r} names single layers, and dus cannot "
                "rewrite expressions; list the modules by their full names instead"
            )
        return [name]
    if split.index >= layer_map.num_base_layers:  # multi-token prediction: keeps its place after the last
        return [split.at(split.index - layer_map.num_base_layers + len(layer_map))]
    end = "." if name.endswith(".") and not split.suffix else ""  # "layers.1." is not the beginning of "layers.10."
    return [split.at(output) + end for output in layer_map.outputs[split.index]]
