"""From the base's config to the deeper one's, each layer keeping its kind. Pure: dict to dict.

What is not understood is refused by name: a config that is wrong in silence gives a model that loads
and computes something else.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any

from dus_cli import architectures as arch
from dus_cli.errors import ConfigError, shown
from dus_cli.layers import MAX_OUTPUT_LAYERS, LayerMap, largest_trim, source_layers, split_name

# Names that speak of single layers. A field named so that stands in no table is refused.
_SUSPICIOUS = re.compile(
    r"pattern|interval|period|freq(uency)?($|_)|every_n|(^|_)(idx|idxs|index|indices|indexes)($|_)"
    r"|layer_(id|ids|types?|offset)s?($|_)|_layers$|^layers_|_sparse_step$|first_k_|_per_layer($|_)"
)

# A regular expression (it has a backslash, star, bracket, …) in which a layer number stands.
_NUMBERED_EXPRESSION = re.compile(r"^(?=.*[\\\\*\[(+^$|]).*(layers?|blocks?|\bh)\W{1,3}\d")


@dataclass(frozen=True)
class DecoderConfig:
    """The part of config.json that describes the decoder: the whole of it, or its `text_config`."""

    model_type: str
    fields: dict[str, Any]
    depth_keys: tuple[str, ...]
    num_layers: int
    is_nested: bool
    is_multimodal: bool


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Find the decoder's depth in a parsed config.json.

    Raises:
        ConfigError: no depth, several that disagree, or one that is no number of layers.
    """
    nested = config.get("text_config")
    is_nested = isinstance(nested, dict) and any(key in nested for key in arch.DEPTH_KEYS)
    fields = nested if is_nested and isinstance(nested, dict) else config
    keys = tuple(key for key in arch.DEPTH_KEYS if fields.get(key) is not None)
    if not keys:
        raise ConfigError(
            "config.json does not say how many layers the model has (looked for "
            f"{', '.join(arch.DEPTH_KEYS)}, also in text_config); is this a decoder-only language model?"
        )
    depths = {key: fields[key] for key in keys}
    if is_nested:  # some wrappers repeat the decoder's depth
        depths |= {f"{key} (top level)": config[key] for key in arch.DEPTH_KEYS if config.get(key) is not None}
    for key, depth in depths.items():
        if type(depth) is not int or not 1 <= depth <= MAX_OUTPUT_LAYERS:
            raise ConfigError(f"config.json: {key} is {shown(depth)}, not a number of layers")
    if len(set(depths.values())) > 1:
        said = ", ".join(f"{key} {depth}" for key, depth in depths.items())
        raise ConfigError(f"config.json gives several depths that disagree ({said}); refusing to guess")
    model_type = fields.get("model_type") or config.get("model_type") or ""
    is_multimodal = is_nested or any(config.get(key) for key in ("vision_config", "audio_config"))
    return DecoderConfig(str(model_type), fields, keys, fields[keys[0]], is_nested, is_multimodal)


def deepen_config(config: dict[str, Any], layer_map: LayerMap) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The config of the deeper model, key order kept, and warnings for what a person should look at.

    Raises:
        ConfigError: a per-layer field that cannot follow the map, or that is not understood.
    """
    decoder = decoder_config(config)
    assert decoder.num_layers == layer_map.num_base_layers
    _refuse_types(decoder)
    decoder = _with_derived_kinds(decoder)
    warnings: list[str] = []
    if decoder.model_type not in arch.KNOWN_TYPES:
        warnings.append(
            f"model type {shown(decoder.model_type)!r} is not one dus knows; nothing per-layer was found in "
            "its config, but check the result before you spend compute on it"
        )
    deeper = {key: _deepen_field(key, value, decoder, layer_map, warnings) for key, value in decoder.fields.items()}
    deeper = _with_quantization(deeper, layer_map)
    if not decoder.is_nested:
        return deeper, tuple(warnings)
    whole = {
        key: deeper
        if key == "text_config"
        else len(layer_map)
        if key in arch.DEPTH_KEYS and value is not None
        else value
        for key, value in config.items()
    }
    return _with_quantization(whole, layer_map), tuple(warnings)


def _with_derived_kinds(decoder: DecoderConfig) -> DecoderConfig:
    """Write out the `layer_types` that the class would derive, so that they can follow the map."""
    rule = arch.DERIVED_KINDS.get(decoder.model_type)
    if rule is None or decoder.fields.get("layer_types") is not None:
        return decoder
    period = decoder.fields.get(rule.period_key, rule.period) if rule.period_key else rule.period
    if type(period) is not int or period < 1:
        raise ConfigError(f"config.json: {rule.period_key} is {shown(period)}, not a number of layers")
    kinds = [rule.kind if (layer + 1) % period else rule.every_pth for layer in range(decoder.num_layers)]
    return replace(decoder, fields=decoder.fields | {"layer_types": kinds})


def _refuse_types(decoder: DecoderConfig) -> None:
    model_type, fields = decoder.model_type, decoder.fields
    if model_type in arch.REFUSED_TYPES:
        raise ConfigError(
            f"model type {model_type!r} cannot be deepened by copying layers: {arch.REFUSED_TYPES[model_type]}"
        )
    needed = arch.FILLED_BY_THE_CLASS.get(model_type)
    if needed and fields.get(needed) is None:
        raise ConfigError(
            f"config.json lacks {needed}: {model_type} then derives each layer's kind from its number, which "
            "changes with the depth; load and save the base once with a current transformers, which writes it"
        )


def _deepen_field(key: str, value: Any, decoder: DecoderConfig, layer_map: LayerMap, warnings: list[str]) -> Any:
    """One field of the decoder's config, carried to the new depth by the rule its name stands under."""
    if key in decoder.depth_keys:
        return len(layer_map)
    if value in (None, [], {}) or value is False:
        return value
    if key in arch.INDEX_ARITHMETIC and value != 0:
        raise ConfigError(f"config.json: {key} cannot follow the layer map: {arch.INDEX_ARITHMETIC[key]}")
    if key in arch.PER_LAYER_LISTS and isinstance(value, list):
        return _follow(key, value, layer_map)
    if key in arch.INDEX_SETS:
        return _index_set(key, value, layer_map)
    if key in arch.PERIODS:
        return _period(key, value, decoder, layer_map)
    if key in arch.THRESHOLDS:
        return _threshold(key, value, decoder, layer_map)
    if key in arch.PERIOD_OFFSETS or key in arch.HARMLESS or key in arch.NOT_PER_LAYER:
        return value
    if isinstance(value, list) and len(value) == layer_map.num_base_layers:
        warnings.append(
            f"config.json: {shown(key)} is a list with one entry per layer ({len(value)}) and followed the map"
        )
        return _follow(key, value, layer_map)
    if _SUSPICIOUS.search(key) and not isinstance(value, (bool, float)):
        raise ConfigError(
            f"config.json: {shown(key)} looks like it describes single layers, and dus does not know how it "
            f"follows the layer map (value {shown(value)}); refusing to guess"
        )
    return value


def _follow(key: str, values: list[Any], layer_map: LayerMap) -> list[Any]:
    if len(values) != layer_map.num_base_layers:
        raise ConfigError(
            f"config.json: {shown(key)} has {len(values)} entries for {layer_map.num_base_layers} layers; "
            "the config disagrees with itself"
        )
    return [values[base] for base in layer_map.sources]


def _index_set(key: str, value: Any, layer_map: LayerMap) -> list[int]:
    if not isinstance(value, list) or not all(type(index) is int for index in value):
        raise ConfigError(f"config.json: {key} is {shown(value)}, not a list of layer numbers")
    if not all(0 <= index < layer_map.num_base_layers for index in value):
        raise ConfigError(f"config.json: {key} names a layer beyond the {layer_map.num_base_layers} that there are")
    members = set(value)
    return [output for output, base in enumerate(layer_map.sources) if base in members]


def _period(key: str, value: Any, decoder: DecoderConfig, layer_map: LayerMap) -> Any:
    overruled_by = arch.PERIODS[key].overruled_by
    if overruled_by and decoder.fields.get(overruled_by) is not None:
        return value
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json: {key} is {shown(value)}, not a number of layers")
    if layer_map.keeps_phase(value):
        return value
    raise ConfigError(
        f"config.json: {key} is {value}, a pattern along the depth that this layer map puts out of step"
        f"{_trims_in_phase(value, layer_map)}"
    )


def _trims_in_phase(period: int, layer_map: LayerMap) -> str:
    n = layer_map.num_base_layers
    trims = [trim for trim in range(largest_trim(n) + 1) if LayerMap(source_layers(n, trim), n).keeps_phase(period)]
    if not trims:
        return "; no trim keeps it"
    return f"; --trim {' or '.join(map(str, trims[:6]))} would keep it"


def _threshold(key: str, value: Any, decoder: DecoderConfig, layer_map: LayerMap) -> Any:
    rule = arch.THRESHOLDS[key]
    if rule.only_if and not decoder.fields.get(rule.only_if):
        return value
    if rule.overruled_by and decoder.fields.get(rule.overruled_by) is not None:
        return value
    if type(value) is not int or value < 0:
        raise ConfigError(f"config.json: {key} is {shown(value)}, not a number of layers")
    below = [base < value for base in layer_map.sources]
    moved = sum(below)
    if not all(below[:moved]):
        raise ConfigError(
            f"config.json: {key} is {value}: the first {value} layers are of another kind than the rest, and "
            f"this map repeats some of them further up, which the field cannot say; use a trim of {value} or more"
        )
    return max(value, moved) if all(below) else moved


def _with_quantization(config: dict[str, Any], layer_map: LayerMap) -> dict[str, Any]:
    """Lists of module names in `quantization_config` (`modules_to_not_convert`, `ignore`) follow their layers."""
    quantization = config.get("quantization_config")
    if not isinstance(quantization, dict):
        return config
    return config | {"quantization_config": _follow_names(quantization, layer_map)}


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
    return value


def _output_names(name: str, layer_map: LayerMap) -> list[str]:
    """A module name with a layer number, once for each output layer that copies that layer."""
    # A module name may end in the layer number itself, which `split_name` takes for no tensor's name.
    split = split_name(f"{name}.")
    if split is None or split.prefix not in arch.LAYER_STACKS:
        if _NUMBERED_EXPRESSION.search(name):
            raise ConfigError(
                f"quantization_config: the expression {shown(name)!r} names single layers, and dus cannot "
                "rewrite expressions; list the modules by their full names instead"
            )
        return [name]
    if split.index >= layer_map.num_base_layers:  # multi-token prediction: keeps its place after the last
        return [split.at(split.index - layer_map.num_base_layers + len(layer_map))[:-1]]
    return [split.at(output)[:-1] for output in layer_map.outputs[split.index]]
