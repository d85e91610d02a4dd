"""Turn the base's config into the deeper model's; each layer keeps its source's kind. Pure.

A field that dus does not understand is refused by name: with a wrong config, a model would load and
silently compute something else.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dus_cli.errors import ConfigError, described, shown, shown_list
from dus_cli.maps import architectures as arch
from dus_cli.maps.layers import MAX_OUTPUT_LAYERS, LayerMap
from dus_cli.maps.naming import NO_ASSUMPTIONS, Assumption, Carrier, NumberedNames, is_a_model
from dus_cli.maps.rules import Fields, Kept, Kinds, Period, Refused, Rule, follow_list

# Names of fields that may describe single layers. Such a field that is in no table is refused.
_SUSPICIOUS = re.compile(
    r"pattern|interval|period|freq(uency)?($|_)|every_n|(^|_)(idx|idxs|indices|indexes)($|_)|_index$|layer_index"
    r"|layer_(id|ids|types?|offset)s?($|_)|_layers$|^layers_|_sparse_step$|first_k_|_per_layer($|_)"
)

# The rarer names of the depth that can be nothing else if they have the value of a usual one.
_SURELY_DEPTH = ("num_transformer_layers", "n_decoder_layers", "nlayers")


@dataclass(frozen=True)
class DecoderConfig:
    """The part of config.json that describes the decoder: all of it, or its `text_config`.

    Attributes:
        model_type: the decoder's type.
        wrapper_type: the `model_type` of the whole config.json.
        fields: the decoder's part.
        depth_keys: the fields that hold the depth as a number; empty if it is a list's length.
        num_layers: the depth.
        nested_in: the field that holds the decoder's part; None if it is all of config.json.
        is_multimodal: the model has encoders beside the decoder.
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
        """Whether it is a decoder of the BERT family, as its config says."""
        return self.fields.get("is_decoder") is True


def decoder_config(config: dict[str, Any]) -> DecoderConfig:
    """Find the decoder's depth in a parsed config.json.

    Raises:
        ConfigError: there is no depth, there are several different ones, or it is not a number of
            layers.
    """
    nested_in = _nested_in(config)
    fields: dict[str, Any] = config[nested_in] if nested_in else config
    model_type, wrapper_type = _model_type(config, nested_in), str(config.get("model_type") or "")
    entry = arch.architecture(model_type)
    known = (*entry.depth, *arch.DEPTH_KEYS, *arch.OTHER_DEPTH_KEYS)
    if nested_in and not entry.depth_of and not any(key in fields for key in known):
        if not any(config.get(key) is not None for key in arch.DEPTH_KEYS):
            raise ConfigError(
                f"config.json: {nested_in} does not give the decoder's number of layers (older "
                "files leave that to the model's class); load and save the base once with a "
                "current transformers, which writes it"
            )
        nested_in, fields = None, config
        model_type = _model_type(config, None)
        entry = arch.architecture(model_type)
    is_multimodal = nested_in is not None or any(config.get(key) for key in arch.ENCODER_KEYS)
    listed = next((key for key in entry.depth_of if fields.get(key)), None)
    if listed is not None:
        counted = ("num_hidden_layers",) if fields.get("num_hidden_layers") is not None else ()
        return DecoderConfig(
            model_type,
            wrapper_type,
            fields,
            depth_keys=counted,
            num_layers=len(fields[listed]),
            nested_in=nested_in,
            is_multimodal=is_multimodal,
        )
    names = entry.depth or arch.DEPTH_KEYS
    keys = _depth_keys(fields, names)
    if not keys:
        raise ConfigError(
            "config.json does not give the number of layers (looked for "
            f"{', '.join((*names, *arch.OTHER_DEPTH_KEYS))}, also in text_config); is this a "
            "decoder-only language model?"
        )
    depths = {key: fields[key] for key in keys}
    if nested_in:  # some wrappers repeat the decoder's depth
        depths |= {
            f"{key} (top level)": config[key]
            for key in arch.DEPTH_KEYS
            if config.get(key) is not None
        }
    for key, depth in depths.items():
        if type(depth) is not int or not 1 <= depth <= MAX_OUTPUT_LAYERS:
            raise ConfigError(f"config.json: {key} is {described(depth)}, not a number of layers")
    if len(set(depths.values())) > 1:
        values = ", ".join(f"{key} {depth}" for key, depth in depths.items())
        raise ConfigError(
            f"config.json gives several depths that disagree ({values}); correct the wrong one"
        )
    return DecoderConfig(
        model_type,
        wrapper_type,
        fields,
        depth_keys=keys,
        num_layers=fields[keys[0]],
        nested_in=nested_in,
        is_multimodal=is_multimodal,
    )


def _depth_keys(fields: Fields, names: tuple[str, ...]) -> tuple[str, ...]:
    """The fields that hold the depth: those with a usual name, and rarer ones with the same value;
    without a usual name, all rarer ones.
    """
    usual = tuple(key for key in names if fields.get(key) is not None)
    others = tuple(
        key for key in arch.OTHER_DEPTH_KEYS if key not in usual and fields.get(key) is not None
    )
    if not usual:
        return others
    same = (key for key in others if key in _SURELY_DEPTH and fields[key] == fields[usual[0]])
    return (*usual, *same)


def _nested_in(config: dict[str, Any]) -> str | None:
    """The field that holds the decoder's config in a multimodal model's."""
    return next((key for key in arch.DECODER_KEYS if isinstance(config.get(key), dict)), None)


def _model_type(config: dict[str, Any], nested_in: str | None) -> str:
    """The decoder's type. For older multimodal files that do not give it, or have no `text_config`,
    it is the wrapper's with "_text".
    """
    outer = str(config.get("model_type") or "")
    inner = config[nested_in].get("model_type") if nested_in else None
    if inner:
        return str(inner)
    if not outer and not nested_in:
        return _type_of_class(config)
    entry = arch.ARCHITECTURES.get(outer)
    is_decoder = outer in arch.KNOWN_TYPES and not (entry and entry.wrapper)
    return outer if is_decoder or f"{outer}_text" not in arch.KNOWN_TYPES else f"{outer}_text"


def _type_of_class(config: dict[str, Any]) -> str:
    """The type for a file without `model_type`: the one whose published code has the class that
    the file names; "" if there is none.
    """
    named, mapped = config.get("architectures"), config.get("auto_map")
    classes = [
        *(named if isinstance(named, list) else ()),
        *(mapped.values() if isinstance(mapped, dict) else ()),
    ]
    for name in classes:
        base = re.sub(r"(For[A-Z]\w*|LMHeadModel|Model|Config)$", "", str(name).rpartition(".")[2])
        model_type = arch.TYPE_OF_CLASS.get(base.replace("_", "").lower())
        if model_type is not None:
            return model_type
    return ""


@dataclass(frozen=True)
class DeeperConfig:
    """The config of the deeper model.

    Attributes:
        config: with its keys in their order.
        kinds: by field, the kind of each base layer; every output layer keeps its source's kinds.
        distinctions: `kinds` and everything else that followed the map: all by which the config
            distinguishes layers.
        warnings: what a person should check.
    """

    config: dict[str, Any]
    kinds: Kinds
    distinctions: Kinds
    warnings: tuple[str, ...]


def deepen_config(
    config: dict[str, Any],
    layer_map: LayerMap,
    assume: Mapping[str, Assumption] = NO_ASSUMPTIONS,
    names: NumberedNames | None = None,
) -> DeeperConfig:
    """Make the config for the depth of the map.

    Args:
        config: the parsed config.json.
        layer_map: the map.
        assume: the user's decisions (--assume) about fields that no rule can carry, by name ("a.b"
            is b in a).
        names: the numbered names of the checkpoint's tensors; without them, layers are recognised
            by the usual names.

    Raises:
        ConfigError: a per-layer field cannot follow the map, or is not understood.
    """
    refuse_types(config)
    decoder = decoder_config(config)
    assert decoder.num_layers == layer_map.num_base_layers
    names = names or NumberedNames(None)
    names = NumberedNames(names.stack, names.others, (*arch.LAYER_STACKS, *names.known))
    _check_assumptions(assume, decoder, config, names)
    carrier = Carrier(layer_map, names, assume)
    by_rule = _RuleRun(carrier)
    of_wrapper: dict[str, Any] = {}
    for rule in arch.architecture(decoder.wrapper_type).wrapper:
        of_wrapper |= rule.follow(config, layer_map)
    changed = by_rule.by_rules(decoder)
    for key, value in decoder.fields.items():
        if key not in by_rule.taken and not (decoder.nested_in is None and key in of_wrapper):
            changed |= _unknown_field(key, value, carrier)
    changed |= dict.fromkeys(decoder.depth_keys, len(layer_map))
    deeper = decoder.fields | changed
    if decoder.nested_in:
        repeated = {key: len(layer_map) for key in arch.DEPTH_KEYS if config.get(key) is not None}
        deeper = _carried_wrapper(config, decoder, carrier) | {decoder.nested_in: deeper} | repeated
    deeper |= of_wrapper
    kinds = {name: values for name, values in by_rule.kinds.items() if len(set(values)) > 1}
    return DeeperConfig(
        deeper,
        kinds,
        by_rule.distinctions | carrier.distinctions,
        (*_about_type(decoder, carrier), *carrier.warnings),
    )


class _RuleRun:
    """Applies the rules to a decoder's config. `taken` are the fields that they handle."""

    def __init__(self, carrier: Carrier) -> None:
        self.carrier = carrier
        self.kinds: Kinds = {}
        self.distinctions: Kinds = {}
        self.taken: set[str] = set()

    def by_rules(self, decoder: DecoderConfig) -> dict[str, Any]:
        """Apply the type's own rules and the general ones; return the fields that change."""
        changed: dict[str, Any] = {}
        self.taken.update(decoder.depth_keys)
        own = arch.architecture(decoder.model_type).rules
        for rule in (*own, *arch.general_rules_for(decoder.model_type)):
            self.taken.update(rule.reads)
            decided = {
                key: self.carrier.assume[key] for key in rule.reads if key in self.carrier.assume
            }
            changed |= self._by_rule(rule, decoder, decided, is_general=rule not in own)
        return changed

    def _by_rule(
        self,
        rule: Rule,
        decoder: DecoderConfig,
        decided: Mapping[str, Assumption],
        *,
        is_general: bool,
    ) -> dict[str, Any]:
        layer_map, fields = self.carrier.layer_map, decoder.fields
        try:
            changed = rule.follow(fields, layer_map)
            kinds = rule.kinds(fields, decoder.num_layers)
        except ConfigError as error:
            present = [key for key in rule.reads if key in fields]
            if not is_general or not present:
                raise
            if not decided:
                raise ConfigError(
                    f"{error}; or give --assume {present[0]}=keep to leave it as it is"
                ) from error
            return self._as_decided(rule, fields, decided)
        for key in decided:
            raise ConfigError(
                f"--assume {shown(key)}: dus knows how this field follows the map; leave it out"
            )
        self.kinds |= kinds
        self.distinctions |= kinds
        period = rule.period(fields) if isinstance(rule, Period) and not kinds else None
        if period is not None:  # the map keeps its phase, so the class may use it in any way
            self.distinctions[rule.reads[0]] = [
                str(layer % period) for layer in range(decoder.num_layers)
            ]
        if is_general or decoder.model_type not in arch.KNOWN_TYPES:
            self.carrier.followed += _per_layer_fields(rule, fields, changed, kinds)
        return changed

    def _as_decided(
        self, rule: Rule, fields: Fields, decided: Mapping[str, Assumption]
    ) -> dict[str, Any]:
        """Apply the user's decisions about fields that a general rule cannot carry."""
        changed: dict[str, Any] = {}
        for key, assumption in decided.items():
            self.carrier.note_assumption(key)
            if assumption == "keep":
                continue
            if not isinstance(rule, Refused) or rule.otherwise is None:
                raise ConfigError(
                    f"--assume {shown(key)}=map: dus does not know how it would follow the map; "
                    "only =keep is possible"
                )
            changed |= rule.otherwise.follow(fields, self.carrier.layer_map)
            kinds = rule.otherwise.kinds(fields, self.carrier.layer_map.num_base_layers)
            self.kinds |= kinds
            self.distinctions |= kinds
        return changed


def _per_layer_fields(
    rule: Rule, fields: Fields, changed: dict[str, Any], kinds: Kinds
) -> list[str]:
    """The fields in which a rule found per-layer values."""
    if isinstance(rule, Kept):
        return []
    keys = [key for key, value in changed.items() if value != fields.get(key)]
    keys += [key for key, values in kinds.items() if len(set(values)) > 1 and key not in keys]
    if isinstance(rule, Period) and rule.key not in keys and (rule.period(fields) or 1) > 1:
        keys.append(rule.key)
    return keys


def _about_type(decoder: DecoderConfig, carrier: Carrier) -> tuple[str, ...]:
    """The warning about a type in no table."""
    if decoder.model_type in arch.KNOWN_TYPES:
        return ()
    finding = "nothing per-layer was found in its config"
    if carrier.followed:
        names = list(dict.fromkeys(carrier.followed))
        finding = (
            "what its config says per layer followed the map by general rules "
            f"({shown_list(names, 8)})"
        )
    elif any("--assume" in warning for warning in carrier.warnings):
        finding = "what its config says per layer was carried as decided"
    name = f"model type {shown(decoder.model_type)!r}"
    warning = (
        f"{name} is not one dus knows; {finding}, but check the result before you spend compute on "
        "it"
    )
    return (warning,)


def _carried_wrapper(
    config: dict[str, Any], decoder: DecoderConfig, carrier: Carrier
) -> dict[str, Any]:
    """The config.json around the decoder's config: names and numbers of layers follow the map,
    encoders stay as they are.
    """
    read = {key for rule in arch.architecture(decoder.wrapper_type).wrapper for key in rule.reads}
    carried = dict(config)
    carrier.by_length = False
    for key, value in config.items():
        if (
            key != decoder.nested_in
            and key not in read
            and key not in arch.ENCODER_KEYS
            and not _is_harmless(key)
        ):
            carried[key] = carrier.carry((key,), value)
    return carried


def _is_harmless(key: str) -> bool:
    """Whether a general rule says that the field is not about single layers."""
    return any(key in rule.reads for rule in arch.GENERAL_RULES if isinstance(rule, Kept))


def refuse_types(config: dict[str, Any]) -> None:
    """Refuse models of a type that no layer map can deepen.

    Raises:
        ConfigError: the model, or its decoder, has such a type.
    """
    for model_type in (_model_type(config, None), _model_type(config, _nested_in(config))):
        refused = arch.architecture(model_type).refused
        if refused is not None:
            raise ConfigError(
                f"model type {model_type!r} cannot be deepened by copying layers: {refused}"
            )


def _check_assumptions(
    assume: Mapping[str, Assumption],
    decoder: DecoderConfig,
    config: dict[str, Any],
    names: NumberedNames,
) -> None:
    for key in assume:
        known = key in decoder.depth_keys or any(
            key in rule.reads for rule in arch.rules_for(decoder.model_type)
        )
        is_prefix = key == names.stack or key in names.others
        if (
            not known
            and not is_prefix
            and not _is_there(key, decoder.fields)
            and not _is_there(key, config)
        ):
            where = f"config.json's {decoder.nested_in}" if decoder.nested_in else "config.json"
            raise ConfigError(f"--assume {shown(key)}: {where} has no such field")
        if key in decoder.depth_keys or (known and _is_harmless(key)):
            raise ConfigError(
                f"--assume {shown(key)}: dus knows how this field follows the map; leave it out"
            )


def _is_there(path: str, value: Any) -> bool:
    """Whether a dotted path exists in a JSON value; module names in it have dots of their own."""
    if isinstance(value, list):  # positions in lists are not part of a path
        return any(_is_there(path, entry) for entry in value)
    if not isinstance(value, dict):
        return False
    begun = [key for key in value if path == key or path.startswith(f"{key}.")]
    return any(path == key or _is_there(path[len(key) + 1 :], value[key]) for key in begun)


def _unknown_field(key: str, value: Any, carrier: Carrier) -> dict[str, Any]:
    """Carry a field that no rule reads: by the user's decision, as it is if it is harmless, or by
    its content.

    Raises:
        ConfigError: it looks like it describes single layers, and it is not known how.
    """
    if key in carrier.assume:
        return _decided_field(key, value, carrier)
    if value in (None, [], {}) or (
        isinstance(value, dict) and (key in arch.ENCODER_KEYS or is_a_model((key,), value))
    ):
        return {}
    outputs = carrier.output_names((key,), key)
    if outputs != [key]:
        return dict.fromkeys(outputs, carrier.carry((key,), value))
    if isinstance(value, (bool, float)):
        return {}
    carried = carrier.carry((key,), value)
    if (
        _SUSPICIOUS.search(key)
        and carried == value
        and not (isinstance(value, list) and key in carrier.followed)
    ):
        raise ConfigError(
            f"config.json: {shown(key)} looks like it describes single layers, and dus does not "
            f"know how it follows the layer map (value {shown(value)}); give --assume "
            f"{shown(key)}=keep, or =map if it has an entry per layer or lists layers' numbers"
        )
    return {} if carried == value else {key: carried}


def _decided_field(key: str, value: Any, carrier: Carrier) -> dict[str, Any]:
    """Carry a field by the user's decision (--assume)."""
    if carrier.assume[key] == "keep":
        carrier.note_assumption(key)
        return {}
    if isinstance(value, str) and len(value) == carrier.layer_map.num_base_layers:
        carrier.note_assumption(key)
        return {key: "".join(follow_list(key, value, carrier.layer_map))}
    followed = len(carrier.followed)
    carried = carrier.carry((key,), value)
    if len(carrier.followed) > followed or carried != value:
        return {key: carried}
    if isinstance(value, list):
        follow_list(key, value, carrier.layer_map)  # raises if the number of entries is wrong
    raise ConfigError(
        f"--assume {shown(key)}=map: its value {shown(value)} is neither a list nor a text with "
        "one entry per layer, and names no layers"
    )
