"""How per-layer fields of a config follow a layer map: one class for each way of writing them.

The tables in `architectures` say which fields of which model type are written in which way. A rule
is pure: it maps the base's fields and a layer map to the fields that change. `kinds` gives the kind
of each base layer by the rule, for the drawing of the plan.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any, Protocol

from dus_cli.errors import ConfigError, described, shown
from dus_cli.maps.layers import LayerMap, largest_trim, source_layers

Fields = Mapping[str, Any]
# By name (mostly a field's), the kind of each base layer.
Kinds = dict[str, list[str]]


class Rule(Protocol):
    """Fields that are read together, and how they follow a layer map."""

    @property
    def reads(self) -> tuple[str, ...]:
        """The fields that this rule handles."""

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        """The fields that change or are added, with their values for the output.

        Raises:
            ConfigError: the fields cannot express the result, or the config contradicts itself.
        """

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        """The kind of each base layer; empty if the rule does not tell layers apart."""


class _Quiet:
    """A rule that handles no field and tells no layers apart: a condition on the map."""

    @property
    def reads(self) -> tuple[str, ...]:
        return ()

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        return {}


@dataclass(frozen=True)
class _OneField(_Quiet):
    """A rule about one field, which does nothing if the field is absent, null, empty or false."""

    key: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.key,)

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        value = fields.get(self.key)
        if value in (None, [], {}, "") or value is False:
            return {}
        return {self.key: self.carry(value, fields, layer_map)}

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        raise NotImplementedError


@dataclass(frozen=True)
class PerLayer(_OneField):
    """A list with one entry per layer. A number in its place is the value of all layers.

    `beyond` names the field with the number of entries for layers after the last (multi-token
    prediction), which stay.
    """

    beyond: str | None = None

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        if not isinstance(value, list):
            return value
        extra = fields.get(self.beyond) if self.beyond else None
        n = layer_map.num_base_layers
        if type(extra) is int and len(value) == n + extra:
            return [*follow_list(self.key, value[:n], layer_map), *value[n:]]
        return follow_list(self.key, value, layer_map)

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        value = fields.get(self.key)
        return (
            {self.key: [str(kind) for kind in value[:num_layers]]}
            if isinstance(value, list)
            else {}
        )


@dataclass(frozen=True)
class Stretched(_OneField):
    """A list with one entry per layer, or only the first and last of evenly spaced values, as in
    openelm.

    Such a pair is written out as a list, rounded as the class does, unless its ends are equal or
    the config has the list `instead`, which the class computes from it.
    """

    instead: str | None = None

    def _spread(self, value: Any, num_layers: int) -> list[Any] | None:
        """The value of each layer; None if all have the same."""
        if not isinstance(value, list) or (len(value) == 2 and value[0] == value[1]):
            return None
        if len(value) != 2 or num_layers <= 2:
            return value
        first, last = value
        return [
            round(first + (last - first) * layer / (num_layers - 1), 2)
            for layer in range(num_layers)
        ]

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        spread = self._spread(value, layer_map.num_base_layers)
        if spread is None or (self.instead and fields.get(self.instead)):
            return value
        if self.instead:
            raise ConfigError(
                f"config.json: {self.key} is {shown(value)}, from the first layer to the last, and "
                f"the list {self.instead} that is computed from it is missing; load and save the "
                "base once with its own code"
            )
        return follow_list(self.key, spread, layer_map)

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        spread = None if self.instead else self._spread(fields.get(self.key), num_layers)
        return {} if spread is None else {self.key: [str(value) for value in spread]}


@dataclass(frozen=True)
class Spelled(_OneField):
    """A text with one character per layer, such as nemotron_h's "M-M*-"."""

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        if not isinstance(value, str):
            raise ConfigError(
                f"config.json: {self.key} is {shown(value)}, not a text with a character per layer"
            )
        return "".join(follow_list(self.key, value, layer_map))

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        value = fields.get(self.key)
        return {self.key: list(value)} if isinstance(value, str) else {}


@dataclass(frozen=True)
class IndexSet(_OneField):
    """A list of layer numbers, counted from `first`: it becomes the numbers of the output layers
    whose source is in it.

    A text of numbers with commas stays a text (step3's "4,5,6").
    """

    first: int = 0

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        members = self._members(value, layer_map.num_base_layers)
        outputs = [
            output + self.first for output, base in enumerate(layer_map.sources) if base in members
        ]
        return ",".join(map(str, outputs)) if isinstance(value, str) else outputs

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        value = fields.get(self.key)
        if not value:
            return {}
        members = self._members(value, num_layers)
        return {self.key: ["yes" if layer in members else "no" for layer in range(num_layers)]}

    def _members(self, value: Any, num_layers: int) -> set[int]:
        if isinstance(value, str):
            parts = [part.strip() for part in value.split(",")]
            value = [
                int(part) if part.isdecimal() and part.isascii() else part for part in parts if part
            ]
        if not isinstance(value, list) or not all(type(index) is int for index in value):
            raise ConfigError(
                f"config.json: {self.key} is {shown(value)}, not a list of layer numbers"
            )
        members = {index - self.first for index in value}
        if not all(0 <= index < num_layers for index in members):
            raise ConfigError(
                f"config.json: {self.key} names a layer beyond the model's {num_layers}"
            )
        return members


@dataclass(frozen=True)
class ByLayer(_OneField):
    """A mapping from layer numbers, as text, to settings."""

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        if not isinstance(value, dict):
            raise ConfigError(f"config.json: {self.key} is {shown(value)}, not a mapping")
        if not all(str(key).isdecimal() for key in value):
            return value  # the keys are kinds of layers, which do not change
        if not all(int(key) < layer_map.num_base_layers for key in value):
            raise ConfigError(
                f"config.json: {self.key} names a layer beyond the model's "
                f"{layer_map.num_base_layers}"
            )
        return {
            str(output): value[str(base)]
            for output, base in enumerate(layer_map.sources)
            if str(base) in value
        }


@dataclass(frozen=True)
class Groups(_OneField):
    """gpt_neo's [[kinds, times], …]: groups of kinds, repeated."""

    def _spread(self, value: Any, num_layers: int) -> list[str]:
        try:
            kinds = [kind for group, times in value for _ in range(times) for kind in group]
        except (TypeError, ValueError):
            kinds = []
        if len(kinds) != num_layers:
            raise ConfigError(
                f"config.json: {self.key} describes {len(kinds)} layers of {num_layers}; "
                "the config contradicts itself"
            )
        return kinds

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        kinds = self._spread(value, layer_map.num_base_layers)
        return [[[kinds[base]], 1] for base in layer_map.sources]

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        value = fields.get(self.key)
        return {self.key: self._spread(value, num_layers)} if value else {}


@dataclass(frozen=True)
class Cycle(_OneField):
    """A list that is repeated along the depth (recurrent_gemma): it becomes one entry per layer."""

    default: tuple[str, ...] = ()

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        kinds = self._spread(fields, layer_map.num_base_layers)
        return {self.key: [kinds[base] for base in layer_map.sources]}

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        return {self.key: self._spread(fields, num_layers)}

    def _spread(self, fields: Fields, num_layers: int) -> list[str]:
        cycle = fields.get(self.key) or list(self.default)
        if not isinstance(cycle, list):
            raise ConfigError(f"config.json: {self.key} is {shown(cycle)}, not a list of kinds")
        return [cycle[layer % len(cycle)] for layer in range(num_layers)]


@dataclass(frozen=True)
class Period(_OneField):
    """A pattern that repeats along the depth: the map must keep its phase. A list in its place
    follows the map.

    The field has no effect if the config has the list `instead`, or if the switch `only_if` is
    false. `default` is the class's default; with it, the pattern is drawn: layers i where
    (i + phase) is a multiple of the period.
    """

    instead: str | None = None
    default: int | None = None
    phase: int = 1
    only_if: str | None = None

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        if isinstance(fields.get(self.key), list):
            return PerLayer(self.key).follow(fields, layer_map)
        period = self.period(fields)
        if period is None or layer_map.keeps_phase(period):
            return {}
        raise ConfigError(
            f"config.json: {self.key} is {period}, a pattern along the depth that this layer map "
            "puts out of step"
            f"{trims_that_would(layer_map, lambda other: other.keeps_phase(period))}"
        )

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        if isinstance(fields.get(self.key), list):
            return PerLayer(self.key).kinds(fields, num_layers)
        period = self.period(fields) if self.default else None
        if period is None:
            return {}
        return {
            self.key: [
                "no" if (layer + self.phase) % period else "yes" for layer in range(num_layers)
            ]
        }

    def period(self, fields: Fields) -> int | None:
        """The period of the pattern; None if there is none, or if the model does not read it."""
        if self.only_if is not None and fields.get(self.only_if) is False:
            return None
        value = fields.get(self.key)
        value = self.default if value is None or value is False else value
        if value is None or (self.instead and fields.get(self.instead) is not None):
            return None
        return check_period(self.key, value)


@dataclass(frozen=True)
class Threshold(_OneField):
    """A number k: the first k layers are of another kind than the rest.

    The field has no effect if the config has the list `instead`, or if the switch `only_if` is off.
    `default` is the class's default.
    """

    default: int = 0
    instead: str | None = None
    only_if: str | None = None

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        if self._is_inert(fields):
            return {}
        count = self._count(fields)
        below = [base < count for base in layer_map.sources]
        moved = sum(below)
        if not all(below[:moved]):
            raise ConfigError(
                f"config.json: {self.key} is {count}: the first {count} layers are of another kind "
                "than the rest, and this map repeats some of them further up, which the field "
                f"cannot express; use a trim of {count} or more"
            )
        if all(below):
            moved = max(count, moved)
        return {} if moved == count else {self.key: moved}

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        if self._is_inert(fields):
            return {}
        count = self._count(fields)
        return {self.key: ["first" if layer < count else "rest" for layer in range(num_layers)]}

    def _is_inert(self, fields: Fields) -> bool:
        overruled = self.instead is not None and fields.get(self.instead) is not None
        return overruled or (self.only_if is not None and not fields.get(self.only_if))

    def _count(self, fields: Fields) -> int:
        value = fields.get(self.key)
        if value is None or value is False:
            return self.default
        if type(value) is not int or value < 0:
            raise ConfigError(
                f"config.json: {self.key} is {described(value)}, not a number of layers"
            )
        return value


Derivation = Callable[[Fields, int], Sequence[Any]]


@dataclass(frozen=True)
class Derived:
    """A per-layer list that the class derives from the layers' numbers if the file lacks it.

    `of` derives it as the class does (its configuration_*.py, __post_init__). The list is written
    to the output if the class would derive another one at the new depth. The fields that `of` reads
    (`from_fields`) have no effect then, and stay.
    """

    key: str
    of: Derivation
    from_fields: tuple[str, ...] = ()
    is_index_set: bool = False

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.key, *self.from_fields)

    def _list_rule(self) -> _OneField:
        return IndexSet(self.key) if self.is_index_set else PerLayer(self.key)

    def _is_listed(self, fields: Fields) -> bool:
        """Whether the file has the list. An empty set of numbers is one; an empty list counts as
        missing (llama4's no_rope_layers).
        """
        value = fields.get(self.key)
        return value is not None if self.is_index_set else bool(value)

    def effective(self, fields: Fields, num_layers: int) -> list[Any]:
        """The list that the model is built with at this depth."""
        return fields[self.key] if self._is_listed(fields) else list(self.of(fields, num_layers))

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        listed = {key: fields[key] for key in self.from_fields if isinstance(fields.get(key), list)}
        changed = {key: follow_list(key, value, layer_map) for key, value in listed.items()}
        if self._is_listed(fields):
            return changed | self._list_rule().follow(fields, layer_map)
        base = self.effective(fields, layer_map.num_base_layers)
        if not base:
            if self.is_index_set:
                return changed
            raise ConfigError(
                f"config.json lacks {self.key}, and dus does not know what the model's class "
                "derives instead; "
                "load and save the base once with a current transformers, which writes it"
            )
        wanted = self._list_rule().follow({self.key: base}, layer_map)
        return (
            changed
            if wanted[self.key] == list(self.of(fields, len(layer_map)))
            else changed | wanted
        )

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        return self._list_rule().kinds({self.key: self.effective(fields, num_layers)}, num_layers)


@dataclass(frozen=True)
class SparseStep:
    """Experts in every p-th layer that is not listed in `dense` (qwen3_moe). If the map puts the
    step out of phase, it becomes 1, and every dense layer is listed.
    """

    step: str = "decoder_sparse_step"
    dense: str = "mlp_only_layers"
    default_dense: tuple[int, ...] = ()

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.step, self.dense)

    def _is_dense(self, fields: Fields, num_layers: int) -> list[bool]:
        step, dense = fields.get(self.step), fields.get(self.dense)
        step = 1 if step is None else step
        check_period(self.step, step)
        listed = list(self.default_dense) if dense is None else dense
        IndexSet(self.dense).follow(
            {self.dense: listed}, LayerMap(tuple(range(num_layers)), num_layers)
        )
        return [layer in listed or (layer + 1) % step != 0 for layer in range(num_layers)]

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        base = self._is_dense(fields, layer_map.num_base_layers)
        wanted = [base[layer] for layer in layer_map.sources]
        if wanted == self._is_dense(fields, len(layer_map)):
            return {}
        dense = [layer for layer, is_dense in enumerate(wanted) if is_dense]
        changed: dict[str, Any] = {self.dense: dense}
        if fields.get(self.step) not in (None, 1):
            changed[self.step] = 1
        return changed

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        return {
            self.dense: [
                "dense" if is_dense else "expert" for is_dense in self._is_dense(fields, num_layers)
            ]
        }


@dataclass(frozen=True)
class PeriodAndOffset:
    """Layer i is of another kind if i % period == offset (jamba). If the map shifts these layers,
    another period and offset are searched.
    """

    period: str
    offset: str
    default: tuple[int, int]
    kind: str
    others: str

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.period, self.offset)

    def _pair(self, fields: Fields) -> tuple[int, int]:
        period = self.default[0] if fields.get(self.period) is None else fields[self.period]
        offset = self.default[1] if fields.get(self.offset) is None else fields[self.offset]
        check_period(self.period, period)
        if type(offset) is not int or not 0 <= offset < period:
            raise ConfigError(
                f"config.json: {self.offset} is {shown(offset)}, not below {self.period} ({period})"
            )
        return period, offset

    def _fitting(self, fields: Fields, layer_map: LayerMap) -> tuple[int, int] | None:
        period, offset = self._pair(fields)
        wanted = [base % period == offset for base in layer_map.sources]
        places = [layer for layer, is_it in enumerate(wanted) if is_it]
        candidates = [(period, offset)]
        if places:  # the first two places determine the only other pair that can fit
            first = places[0]
            step = places[1] - first if len(places) > 1 else max(first + 1, len(wanted) - first)
            candidates += [(step, first)] if first < step else []
        return next(
            (pair for pair in candidates if wanted == self._pattern(pair, len(wanted))), None
        )

    @staticmethod
    def _pattern(pair: tuple[int, int], num_layers: int) -> list[bool]:
        return [layer % pair[0] == pair[1] for layer in range(num_layers)]

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        values = self._fitting(fields, layer_map)
        if values is None:
            period, _ = self._pair(fields)
            would = trims_that_would(
                layer_map, lambda other: self._fitting(fields, other) is not None
            )
            raise ConfigError(
                f"config.json: {self.period} is {period}, a pattern along the depth that this "
                f"layer map puts out of step{would}"
            )
        return {} if values == self._pair(fields) else dict(zip(self.reads, values, strict=True))

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        pattern = self._pattern(self._pair(fields), num_layers)
        return {self.period: [self.kind if is_it else self.others for is_it in pattern]}


@dataclass(frozen=True)
class Stretch:
    """Experts in every p-th layer from a first to a last one (ernie4_5_moe): the ends move, and the
    period must fit.
    """

    start: str = "moe_layer_start_index"
    end: str = "moe_layer_end_index"
    period: str = "moe_layer_interval"
    default: tuple[int, int, int] = (1, -1, 1)

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.start, self.end, self.period)

    def _values(self, fields: Fields) -> tuple[int, int, int]:
        start, end, period = (
            default if fields.get(key) is None else fields[key]
            for key, default in zip(self.reads, self.default, strict=True)
        )
        check_period(self.period, period)
        for key, value in ((self.start, start), (self.end, end)):
            if type(value) is not int or value < -1:
                raise ConfigError(f"config.json: {key} is {shown(value)}, not a layer number")
        return start, end, period

    @staticmethod
    def _pattern(values: tuple[int, int, int], num_layers: int) -> list[bool]:
        start, end, period = values
        last = num_layers - 1 if end == -1 else end
        return [start <= layer <= last and (layer + 1) % period == 0 for layer in range(num_layers)]

    def _fitting(self, fields: Fields, layer_map: LayerMap) -> tuple[int, int, int] | None:
        values = self._values(fields)
        base = self._pattern(values, layer_map.num_base_layers)
        wanted = [base[layer] for layer in layer_map.sources]
        if not any(wanted):
            return None
        first, last = wanted.index(True), len(wanted) - 1 - wanted[::-1].index(True)
        candidates = [values, (first, last, values[2]), (first, last, 1)]
        return next(
            (found for found in candidates if self._pattern(found, len(wanted)) == wanted), None
        )

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        values = self._fitting(fields, layer_map)
        if values is None:
            would = trims_that_would(
                layer_map, lambda other: self._fitting(fields, other) is not None
            )
            raise ConfigError(
                f"config.json: {', '.join(self.reads)} say which layers hold experts, and cannot "
                f"express that for this layer map{would}"
            )
        before = self._values(fields)
        return {
            key: new for key, new, old in zip(self.reads, values, before, strict=True) if new != old
        }

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        pattern = self._pattern(self._values(fields), num_layers)
        return {self.period: ["expert" if is_expert else "dense" for is_expert in pattern]}


@dataclass(frozen=True)
class Inside(_OneField):
    """Rules for the fields of a nested mapping."""

    rules: tuple[Rule, ...] = ()

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        if not isinstance(value, dict):
            raise ConfigError(f"config.json: {self.key} is {shown(value)}, not a mapping")
        changed = dict(value)
        for rule in self.rules:
            changed |= rule.follow(value, layer_map)
        return changed


@dataclass(frozen=True)
class DepthScaled(_OneField):
    """A residual scale that the model divides by the square root of its depth (minicpm, minicpm3).

    The weights were trained with the quotient, so the field is multiplied by √(s/n), for s output
    and n base layers. Null means √depth, a quotient of one at any depth.
    """

    default: float | None = 1.0

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        value = fields.get(self.key, self.default)
        if value is None:
            return {}
        if not isinstance(value, (int, float)) or isinstance(value, bool):
            raise ConfigError(f"config.json: {self.key} is {described(value)}, not a number")
        return {self.key: value * math.sqrt(len(layer_map) / layer_map.num_base_layers)}


@dataclass(frozen=True)
class MultipleOfDepth(_OneField):
    """A number that is `times` the depth. Any other number is an error, or, with `may_differ`, is
    about something else and stays.
    """

    times: int = 1
    may_differ: bool = False

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        if value == self.times * layer_map.num_base_layers:
            return self.times * len(layer_map)
        if self.may_differ:
            return value
        raise ConfigError(
            f"config.json: {self.key} is {shown(value)}, not {self.times} × "
            f"{layer_map.num_base_layers} layers; the config contradicts itself"
        )


@dataclass(frozen=True)
class LastLayerIs(_Quiet):
    """The class forces the last layer to a kind, so the map must not end in a layer of another."""

    key: str
    kind: str
    of: Derivation

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        n, last = layer_map.num_base_layers, layer_map.sources[-1]
        kinds = fields.get(self.key) or self.of(fields, n)
        if last != n - 1 and kinds[last] != self.kind:
            raise ConfigError(
                f"this map ends in layer {last}, a {kinds[last]} layer, and the model's class "
                f"makes the last layer {self.kind}; end the map with layer {n - 1}"
            )
        return {}


@dataclass(frozen=True)
class Unlike(_Quiet):
    """The class builds the first (0) or last (-1) layer differently from the others."""

    layer: int
    why: str

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        unlike = self.layer % layer_map.num_base_layers
        if layer_map.outputs[unlike] != (self.layer % len(layer_map),):
            place = "first" if self.layer == 0 else "last"
            raise ConfigError(
                f"layer {unlike} is unlike the others ({self.why}), so it must stay the {place} "
                "layer, and occur once"
                f"{trims_that_would(layer_map, lambda other: len(other.outputs[unlike]) == 1)}"
            )
        return {}


@dataclass(frozen=True)
class FirstStay(_Quiet):
    """The model does something after each of its first k layers, by their numbers: they must stay
    the first, and occur once.

    k is the length of the list at `path` in the whole config.json; `default` without it.
    """

    path: tuple[str, str]
    default: int
    why: str

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        outer, key = self.path
        value = (fields.get(outer) or {}).get(key)
        if value is not None and not isinstance(value, list):
            raise ConfigError(f"config.json: {outer}.{key} is {shown(value)}, not a list")
        count = min(self.default if value is None else len(value), layer_map.num_base_layers)
        if not self._stay(count, layer_map):
            raise ConfigError(
                f"config.json: {outer}.{key} has {count} entries: layers 0 to {count - 1} are "
                f"known by their numbers ({self.why}), so they must keep these, and occur "
                f"once{trims_that_would(layer_map, lambda other: self._stay(count, other))}"
            )
        return {}

    @staticmethod
    def _stay(count: int, layer_map: LayerMap) -> bool:
        return all(layer_map.outputs[base] == (base,) for base in range(count))


@dataclass(frozen=True)
class Places(_OneField):
    """A list of layers at which the model does something once: they may move, but not be repeated
    or dropped.

    With `in_pairs` it is a list of [something, layer] (granite4_vision).
    """

    in_pairs: bool = False
    default: tuple[int, ...] = ()

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        value = fields.get(self.key)
        value = list(self.default) if value is None else value
        layers = self._layers(value, layer_map.num_base_layers)
        if not self._are_single(layers, layer_map):
            raise ConfigError(
                f"config.json: {self.key} is {shown(value)}, layers at which something happens "
                "once, and this map repeats or drops one of "
                f"them{trims_that_would(layer_map, lambda other: self._are_single(layers, other))}"
            )
        moved = [layer_map.outputs[layer][0] for layer in layers]
        if moved == layers:
            return {}
        return {
            self.key: [[*pair[:1], to] for pair, to in zip(value, moved, strict=True)]
            if self.in_pairs
            else moved
        }

    @staticmethod
    def _are_single(layers: list[int], layer_map: LayerMap) -> bool:
        return all(len(layer_map.outputs[layer]) == 1 for layer in layers)

    def _layers(self, value: Any, num_layers: int) -> list[int]:
        try:
            layers = [entry[1] for entry in value] if self.in_pairs else list(value)
        except (TypeError, IndexError, KeyError):
            layers = [None]
        if not all(type(layer) is int and 0 <= layer < num_layers for layer in layers):
            raise ConfigError(
                f"config.json: {self.key} is {shown(value)}, not a list of {num_layers} layers' "
                "numbers"
            )
        return layers


@dataclass(frozen=True)
class OwnSource(_OneField):
    """For each layer, the number of the layer whose keys and values it uses (mistral_large4). It
    must be its own.
    """

    def carry(self, value: Any, fields: Fields, layer_map: LayerMap) -> Any:
        if value != list(range(layer_map.num_base_layers)):
            raise ConfigError(
                f"config.json: {self.key} cannot follow the layer map: layers take keys and values "
                "from one that the map may repeat or drop"
            )
        return list(range(len(layer_map)))


@dataclass(frozen=True)
class SharedKeys:
    """The last k layers take keys and values from the last layer of their kind before them
    (gemma3n, gemma4).

    So a map must end in such layers, have no others, and have just before them, of each kind, the
    layer from which they take what they do in the base. k becomes the number of them in the map.
    `default` is what the class takes where the file is silent, `kinds_of` what it makes of a
    missing `layer_types`.
    """

    key: str
    default: int
    kinds_of: Derivation

    @property
    def reads(self) -> tuple[str, ...]:
        return (self.key,)

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        n = layer_map.num_base_layers
        count = self._count(fields, n)
        if not count:
            return {}
        first, kinds = n - count, fields.get("layer_types") or list(self.kinds_of(fields, n))
        givers = {kinds[layer]: layer for layer in range(first)}
        lacking = {kinds[layer] for layer in range(first, n)} - givers.keys()
        if lacking:
            raise ConfigError(
                f"config.json: {self.key} is {count}, and none of the {first} layers before those "
                f"is a {shown(min(lacking))} layer like one of them; the config disagrees with "
                "itself"
            )
        if not self._fits(layer_map, first, kinds):
            raise ConfigError(self._refusal(layer_map, first, kinds))
        sharing = sum(base >= first for base in layer_map.sources)
        return {} if sharing == count else {self.key: sharing}

    def kinds(self, fields: Fields, num_layers: int) -> Kinds:
        first = num_layers - self._count(fields, num_layers)
        return {self.key: ["own" if layer < first else "shared" for layer in range(num_layers)]}

    def _count(self, fields: Fields, num_layers: int) -> int:
        value = fields.get(self.key)
        if value is None:
            value = self.default
        if type(value) is not int or not 0 <= value < num_layers:
            raise ConfigError(
                f"config.json: {self.key} is {described(value)}, not a number of some of the "
                f"{num_layers} layers"
            )
        return value

    @staticmethod
    def _fits(layer_map: LayerMap, first: int, kinds: Sequence[str]) -> bool:
        sources = layer_map.sources
        sharing = [base for base in sources if base >= first]
        before = sources[: len(sources) - len(sharing)]
        if any(base >= first for base in before):
            return False
        wanted = {kinds[layer]: layer for layer in range(first)}
        nearest = {kinds[base]: base for base in before}
        return all(nearest.get(kinds[base]) == wanted[kinds[base]] for base in sharing)

    def _refusal(self, layer_map: LayerMap, first: int, kinds: Sequence[str]) -> str:
        n = layer_map.num_base_layers
        would = trims_that_would(layer_map, lambda other: self._fits(other, first, kinds))
        trim = first // 4
        layers = f"0:{first - trim},{trim}:"
        other = LayerMap((*range(first - trim), *range(trim, n)), n)
        if self._fits(other, first, kinds):
            would += f"; or use --layers {layers}, which repeats only layers before those"
        return (
            f"config.json: {self.key} is {n - first}: layers {first} to {n - 1} take keys and "
            f"values from the last layers before them, and this map separates or drops "
            f"some of these{would}"
        )


@dataclass(frozen=True)
class Refused(_OneField):
    """A field that no map can carry, unless it is off (absent, null, false, 0 or empty).

    Attributes:
        why: the reason, in messages.
        default: the class's default if the file lacks the field; refused too unless it is falsy.
        otherwise: how it follows the map if the user says so (--assume FIELD=map).
    """

    why: str
    default: Any = None
    otherwise: Rule | None = None

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        if fields.get(self.key, self.default):
            raise ConfigError(f"config.json: {self.key} cannot follow the layer map: {self.why}")
        return {}


@dataclass(frozen=True)
class Kept(_Quiet):
    """Fields that say nothing about single layers, whatever their names suggest."""

    keys: tuple[str, ...]

    @property
    def reads(self) -> tuple[str, ...]:
        return self.keys

    def follow(self, fields: Fields, layer_map: LayerMap) -> dict[str, Any]:
        return {}


def follow_list(key: str, values: Sequence[Any], layer_map: LayerMap) -> list[Any]:
    """The entry of each output layer's source.

    Raises:
        ConfigError: the list does not have one entry per base layer.
    """
    if len(values) != layer_map.num_base_layers:
        raise ConfigError(
            f"config.json: {shown(key)} has {len(values)} entries for {layer_map.num_base_layers} "
            "layers; the config contradicts itself"
        )
    return [values[base] for base in layer_map.sources]


def check_period(key: str, value: Any) -> int:
    """Check that a field holds a period, a number of layers, and return it.

    Raises:
        ConfigError: it does not.
    """
    if type(value) is not int or value < 1:
        raise ConfigError(f"config.json: {key} is {described(value)}, not a number of layers")
    return value


def trims_that_would(layer_map: LayerMap, fits: Callable[[LayerMap], bool]) -> str:
    """The end of an error: the trims with which the field could be kept.

    >>> trims_that_would(LayerMap(source_layers(32, 7), 32), lambda other: other.keeps_phase(6))
    '; --trim 1 or 4 or 7 or 10 or 13 would keep it'
    """
    n = layer_map.num_base_layers
    fitting = (
        trim for trim in range(largest_trim(n) + 1) if fits(LayerMap(source_layers(n, trim), n))
    )
    trims = list(islice(fitting, 6))
    if not trims:
        return "; no trim keeps it"
    return f"; --trim {' or '.join(map(str, trims))} would keep it"
