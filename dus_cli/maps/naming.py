"""Names and numbers of layers anywhere in a JSON value, and how they follow a layer map. Pure.

Examples are a quantiser's lists of modules, settings keyed by module or by layer number, and nested
lists with an entry per layer. A name of base layer i becomes the names of all output layers that
copy it. A value that may or may not name a layer is refused with its path, and the user may decide:
`--assume PATH=keep` or `=map`.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal

from dus_cli.errors import ConfigError, shown
from dus_cli.maps.layers import LayerMap, split_name

# The user's decision about a field that dus does not know: keep it, or let it follow the map.
Assumption = Literal["keep", "map"]
_ASSUMED = {"keep": "was kept", "map": "followed the map"}
NO_ASSUMPTIONS: Mapping[str, Assumption] = MappingProxyType({})

# The fields with a quantiser's settings: compressed-tensors wrote the second before transformers
# did, MLX reads the third.
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")

# Expressions over module names: `re:` (compressed-tensors, torchao), `+:` and `-:` (GPTQModel's
# `dynamic`), or shell patterns (quark, modelopt). A part that means "any number", or a number that
# is part of a name (w1, w[13]), names no layer.
_EXPRESSION = re.compile(r"^(re|[+-]):|[\\*?\[\](){}+^$|]")
_ANY_NUMBER = re.compile(r"(\[0-9\]|\\d)([+*]|\{1,\d*\})\??|(?<=[A-Za-z_])(\[[\d-]+\]|\d+)")
_SINGLE_NUMBER = re.compile(r"\d|\\d")
_LAYER_EXPRESSION = re.compile(r"(^|[^A-Za-z])(layers?|blocks?|blk|h)[^A-Za-z0-9]{1,6}(\d|\\d)")

# The last part of a module's name before a layer's number, and names with a layer's number without
# a dot.
_LAYER_WORDS = frozenset("layers layer blocks block blk h".split())
_UNDOTTED = re.compile(
    r"(?:^|[._/-])(?:layers?|blocks?|blk)[_/\[: -]?(\d{1,6})\]?(?=$|[._/:-])", re.ASCII
)
# Parts of names of numbered stacks that are not the decoder's.
_OTHER_STACK = re.compile(
    r"vision|visual|(^|[._])vit([._]|$)|image|video|audio|speech|encoder|tower|(^|[._])mtp|draft|eagle|medusa|projector"
    r"|resampler|experts?$"
)

# Keys whose numbers are layer numbers, or whose lists have an entry per layer.
_OF_LAYERS = re.compile(
    r"(^|_)(layer|layers|layerwise|block|blocks|depths?|idxs?|indices|indexes)(_|$)(?!size|shape)"
)
# Keys whose numbers are something else, however many they are: ids of tokens and labels, sizes of
# images, sections of rotary embeddings, tiles of a quantiser.
_NOT_OF_LAYERS = re.compile(
    r"token|vocab|label|lang|(^|_)ids?$|^rope_(scaling|parameters)$|factors?$|section|kernel|stride|dilation|patch"
    r"|pinpoints|image|video|audio|vision|visual|pixel|crop|_mean$|_std$|betas?$|block_(size|shape)|version|multipliers$"
)
# Keys whose number is one layer's, or a pattern along the depth.
_ONE_LAYER = re.compile(r"(^|_)(layer|block)(_(id|idx|index|number))?$")
_PATTERN = re.compile(
    r"every_n|(layer|block)s?_(interval|freq|frequency|period|step|offset)$|pattern$|attention_interval$|sparse_step$"
    r"|^first_k_"
)
_END_OF_RANGE = re.compile(r"start|end|first|last|from|to|begin|stop")
# Keys whose texts are not names of modules.
_NOT_NAMES = re.compile(
    r"path|(^|_)(dir|file|url|version|act|dtype|license|template|type|name)s?$|auto_map|architectures"
)

_NUMBERS_AS_TEXT = re.compile(r"\d{1,6}(\s*[,;]\s*\d{1,6})+", re.ASCII)
_RANGE = re.compile(r"\d{1,6}\s*(-|:|\.\.)\s*\d{1,6}", re.ASCII)
_LONGEST_TEXT = 10_000  # a longer one is something else, such as a chat template

# The keys from the top of the file to a value, without positions in lists.
Path = tuple[str, ...]


@dataclass(frozen=True)
class NumberedNames:
    """The numbered prefixes of a checkpoint's tensors.

    Attributes:
        stack: the prefix of the decoder's layers; None if not known.
        others: all other prefixes.
        known: usual prefixes of decoders' layers, for names from before a library renamed its
            modules.
    """

    stack: str | None
    others: frozenset[str] = frozenset()
    known: Collection[str] = ()

    def is_layer(self, prefix: str) -> bool | None:
        """Whether a number after this prefix is that of a decoder layer; None if not certain."""
        if prefix in self.others:
            return False
        if self.stack is not None and _is_same_place(prefix, self.stack):
            return _OTHER_STACK.search(
                prefix.removesuffix(self.stack)
            ) is None or self.stack.endswith(prefix)
        if any(_is_same_place(prefix, other) for other in self.others):
            return False
        if prefix in self.known:
            return True
        is_like_a_stack = prefix.rpartition(".")[2] in _LAYER_WORDS
        return None if is_like_a_stack and not _OTHER_STACK.search(prefix) else False


def _is_same_place(prefix: str, stack: str) -> bool:
    """Whether two prefixes are equal, or one is the other within a module: `layers` and
    `model.layers`.
    """
    return prefix == stack or stack.endswith(f".{prefix}") or prefix.endswith(f".{stack}")


@dataclass
class Carrier:
    """Lets names and numbers of layers in JSON values follow a layer map.

    Attributes:
        layer_map: the map.
        names: the numbered names of the checkpoint.
        assume: the user's decisions (--assume), by path.
        file: the file's name in messages.
        of_quantiser: all of the file is a quantiser's settings.
        by_length: a list follows the map if it has an entry per layer, whatever its name.
        followed: the fields in which something followed the map.
        distinctions: by field, what it says about each base layer.
        warnings: what a person should check.
    """

    layer_map: LayerMap
    names: NumberedNames
    assume: Mapping[str, Assumption] = field(default_factory=dict)
    file: str = "config.json"
    of_quantiser: bool = False
    by_length: bool = True
    followed: list[str] = field(default_factory=list)
    distinctions: dict[str, list[str]] = field(default_factory=dict)
    warnings: list[str] = field(default_factory=list)
    # While a value that belongs to one base layer is carried: that layer, and the output layer.
    _own: tuple[int, int] | None = None

    @property
    def _depth(self) -> int:
        return self.layer_map.num_base_layers

    def carry(self, path: Path, value: Any) -> Any:
        """The value for the depth of the map; unchanged if it is not about single layers.

        Raises:
            ConfigError: it names layers, or may name some, in a way that cannot follow the map.
        """
        decided = self._decided(path)
        if decided == "keep" or (isinstance(value, dict) and is_a_model(path, value)):
            return value
        if isinstance(value, dict):
            return self.carry_mapping(path, value, forced=decided == "map")
        if isinstance(value, list):
            return self._carry_list(path, value, forced=decided == "map")
        if isinstance(value, str):
            return self._carry_text(path, value, forced=decided == "map")
        return self._carry_number(path, value) if type(value) is int and len(path) > 1 else value

    def _is_of_quantiser(self, path: Path) -> bool:
        return self.of_quantiser or any(key in QUANTIZATION_KEYS for key in path)

    def _decided(self, path: Path) -> Assumption | None:
        """The user's decision about this path, or about a value that contains it."""
        name = ".".join(path)
        about = [key for key in self.assume if name == key or name.startswith(f"{key}.")]
        if name in about:
            self.note_assumption(name)
        return self.assume[max(about, key=len)] if about else None

    def note_assumption(self, name: str) -> None:
        """Add a warning that the user's decision was applied."""
        warning = f"{self.file}: {shown(name)} {_ASSUMED[self.assume[name]]}, as --assume says"
        if warning not in self.warnings:
            self.warnings.append(warning)

    def refuse(self, path: Path, content: str, *, can_follow: bool = True) -> ConfigError:
        """The error that names a path, its content, and the user's choice of decisions."""
        name = shown(".".join(path))
        choice = (
            "keep, or =map to let it follow the layers"
            if can_follow
            else "keep to leave it as it is"
        )
        return ConfigError(
            f"{self.file}: {name} looks like it describes single layers: it {content}; give "
            f"--assume {name}={choice}"
        )

    # --- mappings ---------------------------------------------------------------------------------

    def carry_mapping(self, path: Path, value: dict[str, Any], *, forced: bool) -> dict[str, Any]:
        numbered = {key: int(key) for key in value if _is_number(key)}
        if numbered and self._are_layers(path, list(numbered.values()), forced=forced):
            return self._carry_numbered(path, value, numbered)
        if any(_RANGE.fullmatch(key) for key in value) and not _NOT_OF_LAYERS.search(_last(path)):
            raise self.refuse(
                path, "has ranges of numbers as its keys, which may be layers", can_follow=False
            )
        if self._sorts_layers(list(value.values())) and not _is_of_something_else(path):
            if not forced:
                raise self.refuse(path, "has lists of numbers that sort the layers")
            return {key: self.carry_numbers((*path, key), entry) for key, entry in value.items()}
        carried: dict[str, Any] = {}
        for key, entry in value.items():
            outputs = self.output_names(path, key, forced=forced)
            if outputs == [key]:
                carried[key] = self.carry((*path, key), entry)
                continue
            self._note_layer(path, key, shown(entry))
            for output in outputs:
                split, copied = split_name(key), split_name(output)
                layers = (
                    (split.index, copied.index)
                    if split is not None and copied is not None
                    else None
                )
                carried[output] = self._carry_own(layers, (*path, key), entry)
        return carried

    def _carry_own(self, layers: tuple[int, int] | None, path: Path, value: Any) -> Any:
        """Carry a value of one base layer to an output layer that copies it: the base layer's
        number in it becomes the output layer's. `layers` are the two.
        """
        outer, self._own = self._own, layers
        try:
            return self.carry(path, value)
        finally:
            self._own = outer

    def _sorts_layers(self, value: list[Any]) -> bool:
        """Whether these are lists of numbers that together hold each layer's number once."""
        if len(value) < 2 or not all(isinstance(entry, list) and entry for entry in value):
            return False
        numbers = [number for entry in value for number in entry]
        return all(type(number) is int for number in numbers) and sorted(numbers) == list(
            range(self._depth)
        )

    def _are_layers(self, path: Path, numbers: list[int], *, forced: bool) -> bool:
        """Whether the numeric keys of a mapping are layer numbers, counted from 0 or 1."""
        depth = self._depth
        if _is_of_something_else(path) and not forced:
            return False
        if sorted(numbers) in (list(range(depth)), list(range(1, depth + 1))):
            return True
        if forced and max(numbers) < depth:
            return True
        if max(numbers) >= depth and not _is_of_layers(path):
            return False
        raise self.refuse(
            path, "has numbers as its keys, which may be layers", can_follow=max(numbers) < depth
        )

    def _carry_numbered(
        self, path: Path, value: dict[str, Any], numbered: dict[str, int]
    ) -> dict[str, Any]:
        first = 1 if max(numbered.values()) == self._depth else 0
        contents = {number - first: ((*path, key), value[key]) for key, number in numbered.items()}
        self._note(
            path,
            f"is keyed by the layers' numbers (from {first}) and followed the map",
            [
                shown(contents[layer][1]) if layer in contents else ""
                for layer in range(self._depth)
            ],
        )
        unnumbered = {
            key: self.carry((*path, key), entry)
            for key, entry in value.items()
            if key not in numbered
        }
        outputs = [
            (output, base) for output, base in enumerate(self.layer_map.sources) if base in contents
        ]
        return unnumbered | {
            str(output + first): self._carry_own((base, output), *contents[base])
            for output, base in outputs
        }

    # --- lists and numbers ------------------------------------------------------------------------

    def _carry_list(self, path: Path, value: list[Any], *, forced: bool) -> list[Any]:
        if any(isinstance(entry, str) and self._names_a_layer(path, entry) for entry in value):
            return list(self._renamed(path, value, forced=forced))
        if self._has_entry_per_layer(path, value, forced=forced):
            content = f"is a list with one entry per layer ({self._depth}) and followed the map"
            self._note(path, content, [str(entry) for entry in value])
            return [
                self._carry_own((base, output), path, value[base])
                if isinstance(value[base], dict)
                else value[base]
                for output, base in enumerate(self.layer_map.sources)
            ]
        if self._sorts_layers(value) and not _is_of_something_else(path) and not forced:
            raise self.refuse(path, "has lists of numbers that sort the layers", can_follow=False)
        if self.may_number_layers(path, value):
            if not forced or min(value) < 0:
                raise self.refuse(
                    path,
                    f"is {shown(value)}, which may be layers' numbers",
                    can_follow=min(value) >= 0,
                )
            return self.carry_numbers(path, value)
        return list(self._renamed(path, value, forced=forced))

    def _renamed(self, path: Path, value: list[Any], *, forced: bool) -> Iterator[Any]:
        """The entries of a list: a name once for each output layer that copies its layer, anything
        else carried in its place.
        """
        for entry in value:
            if not isinstance(entry, str):
                yield self.carry(path, entry)
                continue
            outputs = self.output_names(path, entry, forced=forced)
            if outputs != [entry]:
                self._note_layer(path, entry, "listed")
            yield from outputs

    def _has_entry_per_layer(self, path: Path, value: list[Any], *, forced: bool) -> bool:
        if len(value) != self._depth or any(
            isinstance(entry, str) and "." in entry for entry in _flat(value)
        ):
            return False
        if forced:
            return True
        if _is_of_something_else(path):
            return False
        # a quantiser's tile sizes are lists of two or three numbers
        shortest = 4 if self._is_of_quantiser(path) else 1
        return _is_of_layers(path[-1:]) or (self.by_length and len(value) > shortest)

    def may_number_layers(self, path: Path, value: list[Any]) -> bool:
        """Whether a list may hold layer numbers: distinct numbers within the depth, under a key
        about layers.
        """
        if (
            not value
            or not all(type(entry) is int for entry in value)
            or len(set(value)) != len(value)
        ):
            return False
        within = -self._depth <= min(value) and max(value) <= self._depth
        return within and _is_of_layers(path) and not _is_of_something_else(path)

    def carry_numbers(self, path: Path, value: Sequence[int]) -> list[int]:
        """The numbers of the output layers that copy these base layers. Numbers are counted from 1
        if one of them is the depth, else from 0.
        """
        first = 1 if max(value) == self._depth else 0
        members = {number - first for number in value}
        by_layer = ["yes" if layer in members else "no" for layer in range(self._depth)]
        self._note(path, f"lists layers' numbers (from {first}) and followed the map", by_layer)
        return [
            output + first for output, base in enumerate(self.layer_map.sources) if base in members
        ]

    def _carry_number(self, path: Path, value: int) -> int:
        key = path[-1]
        is_layer = 0 <= value < self._depth and (
            _ONE_LAYER.search(key) or (_END_OF_RANGE.fullmatch(key) and _is_of_layers(path[-2:-1]))
        )
        if is_layer and self._own is not None and value == self._own[0]:
            return self._own[1]
        if (is_layer or (_PATTERN.search(key) and value > 1)) and not _is_of_something_else(path):
            raise self.refuse(
                path, f"is {value}, which may be a layer's number or a pattern", can_follow=False
            )
        return value

    # --- texts and names --------------------------------------------------------------------------

    def _carry_text(self, path: Path, value: str, *, forced: bool) -> str:
        if _NOT_NAMES.search(_last(path)) or len(value) > _LONGEST_TEXT or "\n" in value:
            return value
        if _NUMBERS_AS_TEXT.fullmatch(value.strip()):
            numbers = [int(number) for number in re.split(r"[,;]", value)]
            if not self.may_number_layers(path, numbers):
                return value
            if not forced:
                raise self.refuse(path, f"is {shown(value)!r}, which may be layers' numbers")
            return ",".join(map(str, self.carry_numbers(path, numbers)))
        if len(value) == self._depth and len(path) > 1 and value.isalnum() and _is_spelled(path):
            if not forced:
                raise self.refuse(path, f"is {shown(value)!r}, a character for each layer")
            self._note(path, "has a character for each layer and followed the map", list(value))
            return "".join(value[base] for base in self.layer_map.sources)
        # auto-round writes names of blocks with commas
        before = [name.strip() for name in value.split(",")]
        after = [
            output for name in before for output in self.output_names(path, name, forced=forced)
        ]
        if after == before:
            return value
        if len(before) == 1 and len(after) != 1 and not forced and not self._is_of_quantiser(path):
            raise self.refuse(path, f"is {shown(value)!r}, one layer that the map repeats or drops")
        for name in before:
            self._note_layer(path, name, "named")
        return ",".join(after)

    def _names_a_layer(self, path: Path, name: str) -> bool:
        split = split_name(name)
        is_layer = split is not None and self.names.is_layer(split.prefix) is not False
        return (
            is_layer or _undotted_layer(name) is not None or self._is_layer_expression(path, name)
        )

    def output_names(self, path: Path, name: str, *, forced: bool = False) -> list[str]:
        """The names in the output for a module's name: one for each output layer that copies its
        layer. A name without a layer's number stays.

        Raises:
            ConfigError: it is an expression that names single layers, or its number may or may not
                be a layer's.
        """
        split = split_name(name)
        is_layer = self.names.is_layer(split.prefix) if split is not None else False
        if split is not None and (is_layer or (is_layer is None and forced)):
            if split.index >= self._depth:  # multi-token prediction: keeps its place after the last
                return [split.at(split.index - self._depth + len(self.layer_map))]
            if self._own is not None and split.index == self._own[0]:
                return [split.at(self._own[1])]
            # the dot at the end is kept: without it, "layers.1" would also be the start of
            # "layers.10"
            end = "." if name.endswith(".") and not split.suffix else ""
            return [split.at(output) + end for output in self.layer_map.outputs[split.index]]
        if self._is_layer_expression(path, name):
            raise self.refuse(
                path,
                f"has the expression {shown(name)!r}, which names single layers, and dus cannot "
                "rewrite expressions: list the modules by their full names",
                can_follow=False,
            )
        if split is not None and is_layer is None and split.index < self._depth:
            raise self.refuse(
                path, f"has {shown(name)!r}, which may be a module of layer {split.index}"
            )
        return self._undotted_outputs(path, name, forced=forced)

    def _undotted_outputs(self, path: Path, name: str, *, forced: bool) -> list[str]:
        number = _undotted_layer(name)
        if number is None or int(number[1]) > self._depth:
            return [name]
        if not forced or int(number[1]) == self._depth:
            raise self.refuse(path, f"has {shown(name)!r}, which may be layer {number[1]}")
        start, end = number.span(1)
        return [
            f"{name[:start]}{output}{name[end:]}"
            for output in self.layer_map.outputs[int(number[1])]
        ]

    def _is_layer_expression(self, path: Path, name: str) -> bool:
        if len(name) > _LONGEST_TEXT or not _EXPRESSION.search(name):
            return False
        single = _SINGLE_NUMBER if self._is_of_quantiser(path) else _LAYER_EXPRESSION
        return bool(single.search(_ANY_NUMBER.sub("", name)))

    # --- what was found ---------------------------------------------------------------------------

    def _note(self, path: Path, content: str, by_layer: list[str]) -> None:
        """Record that a field followed the map, and what it says about each base layer."""
        name = ".".join(path)
        before = self.distinctions.get(name, [""] * self._depth)
        self.distinctions[name] = [f"{old}{new}" for old, new in zip(before, by_layer, strict=True)]
        warning = f"{self.file}: {shown(name)} {content}"
        if name not in self.followed:
            self.followed.append(name)
        if warning not in self.warnings:
            self.warnings.append(warning)

    def _note_layer(self, path: Path, name: str, content: str) -> None:
        """Record that a field names one layer, and what it says about it."""
        top = path[0] if path else self.file
        if top not in self.followed:
            self.followed.append(top)
        split = split_name(name)
        if split is not None and split.index < self._depth:
            by_layer = self.distinctions.setdefault(f"{top} (names)", [""] * self._depth)
            by_layer[split.index] += f"{split.suffix}={content};"


def follow_settings(
    value: dict[str, Any],
    layer_map: LayerMap,
    names: NumberedNames,
    file: str,
    assume: Mapping[str, Assumption] = NO_ASSUMPTIONS,
) -> dict[str, Any]:
    """A quantiser's settings from a file beside config.json, with names and numbers of layers for
    the new depth.

    Raises:
        ConfigError: it names layers, or may name some, in a way that cannot follow the map; the
            message names `file`.
    """
    carrier = Carrier(layer_map, names, assume, file, of_quantiser=True)
    settings: dict[str, Any] = carrier.carry((), value)
    return settings


def is_a_model(path: Path, value: dict[str, Any]) -> bool:
    """Whether a mapping describes another model, such as an encoder, whose layers are not the
    decoder's.
    """
    if "model_type" in value or "num_hidden_layers" in value:
        return True
    return bool(path) and "." not in path[-1] and _OTHER_STACK.search(path[-1]) is not None


def _is_number(key: str) -> bool:
    return key.isascii() and key.isdecimal() and key == str(int(key[:9]))


def _undotted_layer(name: str) -> re.Match[str] | None:
    """The number in `layer_3` and the like."""
    return None if _OTHER_STACK.search(name) else _UNDOTTED.search(name)


def _is_of_layers(path: Path) -> bool:
    """Whether a key is about layers, among those after the last one that names a single module or
    layer.
    """
    below = next(
        (
            place
            for place in range(len(path), 0, -1)
            if "." in path[place - 1] or _is_number(path[place - 1])
        ),
        0,
    )
    return any(_OF_LAYERS.search(key) for key in path[below:])


def _is_spelled(path: Path) -> bool:
    return _PATTERN.search(path[-1]) is not None or _is_of_layers(path[-1:])


def _is_of_something_else(path: Path) -> bool:
    """Whether a key says that its numbers are not about layers, and no later one says that they
    are.
    """
    key = _last(path)
    if _OTHER_STACK.search(key) or ("token" in key and "layer" not in key):
        return True
    if _OF_LAYERS.search(key):
        return False
    return any(_NOT_OF_LAYERS.search(key) for key in path if "." not in key)


def _last(path: Path) -> str:
    """The last key that is not a number."""
    return next((key for key in reversed(path) if not key.isdecimal()), "")


def _flat(value: list[Any]) -> Iterator[Any]:
    for entry in value:
        if isinstance(entry, list):
            yield from _flat(entry)
        else:
            yield entry
