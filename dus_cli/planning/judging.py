"""Which inference engines compute a map's output as config.json says, and with which trims they do.

Base and output are checked by the tables of `maps.engines`, without the engines themselves, which
takes no more time than comparing lists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any, NamedTuple

from dus_cli.errors import ConfigError, EngineError, listed
from dus_cli.maps.architectures import rules_for
from dus_cli.maps.engines import (
    ENGINES,
    ConfigFacts,
    Engine,
    Fault,
    Judgement,
    Verdict,
    judge,
    may_depart,
)
from dus_cli.maps.layers import LayerMap, default_trim, largest_trim, stack
from dus_cli.maps.model_config import DecoderConfig, decoder_config, deepen_config
from dus_cli.maps.naming import NO_ASSUMPTIONS, Assumption, NumberedNames
from dus_cli.maps.rules import DepthScaled, Kinds, Rule

# The least number of trims that are tried on each side of a quarter; the number of layers that may
# be checked, which covers all trims of any real model; and how many trims a message names.
_TRIED = 24
_WORK = 400_000
_NAMED = 3


class Judged(NamedTuple):
    """Whether an engine computes what an output's config says.

    Attributes:
        engine: the engine.
        verdict: on the output.
        of_base: on the base.
        faults: how it departs from the output's config.
        trims: the nearest trims with which it would be right.
    """

    engine: Engine
    verdict: Verdict
    of_base: Verdict
    faults: tuple[Fault, ...] = ()
    trims: tuple[int, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """For the reports and dus.json; docs/layout.md describes each field."""
        return {
            "engine": self.engine.name,
            "version": self.engine.version,
            "verdict": self.verdict.value,
            "base": self.of_base.value,
            "why": "; ".join(_sentence(fault, [self]) for fault in self.faults) or None,
            "trims": list(self.trims),
        }


class Chosen(NamedTuple):
    """A trim that dus chose. `why` says why it is not a quarter of the layers; None if it is."""

    trim: int
    why: str | None = None


@dataclass(frozen=True)
class Maps:
    """Judges layer maps of one base. `copies`, `assume` and `names` are the plan's."""

    config: dict[str, Any]
    decoder: DecoderConfig
    copies: int = 2
    assume: Mapping[str, Assumption] = field(default_factory=dict)
    names: NumberedNames | None = None
    _of_trims: dict[int, tuple[Judged, ...]] = field(default_factory=dict, repr=False)

    @property
    def types(self) -> tuple[str, str]:
        return self.decoder.wrapper_type, self.decoder.model_type

    @cached_property
    def may_depart(self) -> bool:
        return may_depart(self.types)

    @cached_property
    def distinctions(self) -> Kinds:
        """By field, all by which the config distinguishes the base's layers; empty if dus does not
        understand it.
        """
        whole = LayerMap(tuple(range(self.decoder.num_layers)), self.decoder.num_layers)
        try:
            distinctions = deepen_config(self.config, whole, self.assume, self.names).distinctions
        except ConfigError:
            return {}
        return {
            name: kinds
            for name, kinds in distinctions.items()
            if len(kinds) == self.decoder.num_layers
        }

    def judge(self, layer_map: LayerMap) -> tuple[Judged, ...]:
        """Judge each engine on a map's output, whose layers have their sources' kinds."""
        decoder = self.decoder
        mapped = {
            name: [kinds[base] for base in layer_map.sources]
            for name, kinds in self.distinctions.items()
        }
        scaled = [rule.follow(decoder.fields, layer_map) for rule in self._scales]
        fields = {
            **decoder.fields,
            **{key: value for changed in scaled for key, value in changed.items()},
        }
        output = judge(ConfigFacts(fields, len(layer_map), mapped), self.types)
        return tuple(
            Judged(ours.engine, ours.verdict, theirs.verdict, ours.faults)
            for ours, theirs in zip(output, self._of_base, strict=True)
        )

    @cached_property
    def _of_base(self) -> tuple[Judgement, ...]:
        return tuple(
            judge(
                ConfigFacts(self.decoder.fields, self.decoder.num_layers, self.distinctions),
                self.types,
            )
        )

    @cached_property
    def _scales(self) -> tuple[Rule, ...]:
        """The rules for numbers that change with the depth."""
        return tuple(
            rule for rule in rules_for(self.decoder.model_type) if isinstance(rule, DepthScaled)
        )

    def with_trims(self, judged: Sequence[Judged], near: int | None) -> tuple[Judged, ...]:
        """Add, for each engine that is wrong, the trims with which it would be right."""
        near = self._near(near)
        return tuple(
            one._replace(trims=tuple(islice(self.right_trims([one.engine.name], near), _NAMED)))
            if one.verdict.is_wrong
            else one
            for one in judged
        )

    def right_trims(self, engines: Sequence[str], near: int) -> Iterator[int]:
        """The trims with which none of these engines is wrong, nearest first."""
        return self._trims(near, lambda judged: not _wrong(judged) & set(engines))

    def trims_without(
        self, faults: Sequence[Fault], engines: Sequence[str], near: int | None
    ) -> list[int]:
        """The nearest trims with which these engines have none of these faults, by size."""

        def fits(judged: Sequence[Judged]) -> bool:
            return not any(
                fault in faults
                for one in judged
                if one.engine.name in engines
                for fault in one.faults
            )

        return sorted(islice(self._trims(self._near(near), fits), _NAMED))

    def _near(self, trim: int | None) -> int:
        return default_trim(self.decoder.num_layers) if trim is None else trim

    def of_trim(self, trim: int) -> tuple[Judged, ...]:
        """Judge each engine on a depthwise scaling."""
        if trim not in self._of_trims:
            self._of_trims[trim] = self.judge(stack(self.decoder.num_layers, trim, self.copies))
        return self._of_trims[trim]

    def can_be(self, trim: int) -> bool:
        """Whether config.json can express a depthwise scaling."""
        try:
            deepen_config(
                self.config,
                stack(self.decoder.num_layers, trim, self.copies),
                self.assume,
                self.names,
            )
        except ConfigError:
            return False
        return True

    def _trims(self, near: int, fits: Callable[[Sequence[Judged]], bool]) -> Iterator[int]:
        for trim in outwards(near, self.decoder.num_layers):
            if fits(self.of_trim(trim)) and self.can_be(trim):
                yield trim


def outwards(near: int, num_layers: int) -> Iterator[int]:
    """The trims that deepen the model, in order of their distance from `near`; the smaller first
    at the same distance.

    >>> list(outwards(2, 9))
    [2, 1, 3, 0, 4]
    """
    most = largest_trim(num_layers)
    yield near
    for distance in range(1, min(most, max(_TRIED, _WORK // num_layers)) + 1):
        yield from (trim for trim in (near - distance, near + distance) if 0 <= trim <= most)


def choose_trim(maps: Maps, engines: Sequence[str] = ()) -> Chosen:
    """The trim nearest to a quarter of the layers with which `engines` compute what config.json
    says.

    Without `engines` it is the nearest with which the fewest of all engines are wrong: one that
    keeps the phase of patterns along the depth.

    Raises:
        EngineError: there is none for `engines`.
        LayerMapError: there is no map of so many copies.
    """
    quarter = default_trim(maps.decoder.num_layers)
    stack(maps.decoder.num_layers, quarter, maps.copies)
    # there is nothing to judge; or there is no such map, and planning it raises the error
    if not maps.may_depart or not maps.can_be(quarter):
        return Chosen(quarter)
    counted = set(engines) or {engine.name for engine in ENGINES}
    trim = _fewest_wrong(maps, quarter, counted)
    judged, at_best = maps.of_trim(quarter), maps.of_trim(trim)
    if engines and _wrong(at_best) & counted:
        check_right(maps, judged, engines, None)
    if trim == quarter:
        return Chosen(quarter)
    remaining = {one.engine.name: one.faults for one in at_best}
    avoided = [
        one._replace(
            faults=tuple(fault for fault in one.faults if fault not in remaining[one.engine.name])
        )
        for one in judged
        if one.engine.name in counted
    ]
    because = "; ".join(text for text, _, _ in _sentences(avoided))
    return Chosen(trim, f"{trim}, not a quarter of the layers: with {quarter}, {because}")


def _fewest_wrong(maps: Maps, quarter: int, engines: set[str]) -> int:
    """The nearest trim to a quarter with which fewest of the engines are wrong."""
    best, fewest = quarter, len(engines) + 1
    for trim in outwards(quarter, maps.decoder.num_layers):
        count = len(_wrong(maps.of_trim(trim)) & engines)
        if count < fewest and maps.can_be(trim):
            best, fewest = trim, count
        if not fewest:
            break
    return best


def _wrong(judged: Sequence[Judged]) -> set[str]:
    return {one.engine.name for one in judged if one.verdict.is_wrong}


def judge_config(
    config: dict[str, Any], assume: Mapping[str, Assumption] = NO_ASSUMPTIONS
) -> tuple[Judged, ...]:
    """Judge each engine on a config as it is, from any source.

    Raises:
        ConfigError: dus does not understand what the config says about its layers.
    """
    decoder = decoder_config(config)
    whole = LayerMap(tuple(range(decoder.num_layers)), decoder.num_layers)
    return Maps(config, decoder, assume=assume).judge(whole)


def check_right(
    maps: Maps, judged: Sequence[Judged], engines: Sequence[str], trim: int | None
) -> None:
    """Check that `engines` compute what config.json says.

    Raises:
        EngineError: one does not; the message names the trims with which they all would.
    """
    wrong = [one for one in judged if one.engine.name in engines and one.verdict.is_wrong]
    if wrong:
        names = ",".join(engines)
        raise EngineError(f"--for {names}: {'; '.join(_with_advice(maps, wrong, trim))}")


def engine_warnings(
    maps: Maps, judged: Sequence[Judged], engines: Sequence[str], trim: int | None
) -> tuple[str, ...]:
    """Warnings about engines that would be wrong, and, for `engines`, about what is not known."""
    requested = [one for one in judged if one.engine.name in engines]
    return (
        *_with_advice(maps, [one for one in judged if one.verdict.is_wrong], trim),
        *asides(requested),
    )


def problems(judged: Sequence[Judged]) -> list[str]:
    """One line for each way in which engines are wrong."""
    return [text for text, _, _ in _sentences([one for one in judged if one.verdict.is_wrong])]


def asides(judged: Sequence[Judged]) -> list[str]:
    """Warnings about engines that were named with --for and are not wrong."""
    warnings = [
        f"{one.engine.title} {fault.why}"
        for one in judged
        for fault in one.faults
        if fault.verdict in (Verdict.within_window, Verdict.absent)
    ]
    unknown = [one.engine.title for one in judged if one.verdict is Verdict.unknown]
    if unknown:
        warnings.append(
            f"dus does not know what {listed(unknown)} make{'s' * (len(unknown) == 1)} of what "
            "this config says by layer; compare logits with transformers' before you rely on it"
        )
    return warnings


def _with_advice(maps: Maps, judged: Sequence[Judged], trim: int | None) -> list[str]:
    lines = []
    for text, faults, engines in _sentences(judged):
        trims = maps.trims_without(faults, engines, trim)
        keeps = "the step" if faults[0].period is not None else "it right"
        advice = f"no trim keeps {keeps}"
        if trims:
            advice = (
                f"--trim {listed([str(trim) for trim in trims], 'or')} "
                f"keep{'s' * (len(trims) == 1)} {keeps}"
            )
        lines.append(f"{text}; {advice}")
    return lines


def _sentences(judged: Sequence[Judged]) -> list[tuple[str, list[Fault], list[str]]]:
    """A sentence for each fault, with its faults and the names of its engines.

    Fields of the same period, and engines with the same fault, share a sentence.
    """
    groups: dict[tuple[Any, ...], tuple[list[Fault], list[Judged]]] = {}
    for one in judged:
        for fault in one.faults:
            if fault.verdict.is_wrong:
                faults, of_group = groups.setdefault(
                    (fault.verdict, fault.period, fault.why), ([], [])
                )
                faults += [fault] * (fault not in faults)
                of_group += [one] * (one not in of_group)
    return [
        (_sentence(_merged(faults), of_group), faults, [one.engine.name for one in of_group])
        for faults, of_group in groups.values()
    ]


def _merged(faults: Sequence[Fault]) -> Fault:
    fields = dict.fromkeys(field for fault in faults for field in fault.fields)
    return faults[0]._replace(fields=tuple(fields))


def _sentence(fault: Fault, judged: Sequence[Judged]) -> str:
    """How engines depart from a config, as a phrase without advice."""
    engines = listed([one.engine.title for one in judged])
    if fault.verdict in (Verdict.within_window, Verdict.absent):
        return f"{engines} {fault.why}"
    does = (
        "would not load it"
        if fault.verdict is Verdict.refuses
        else "would compute another model in silence"
    )
    if fault.period is None:
        return f"{engines} {fault.why}, and {does}"
    is_one, is_new = len(fault.fields) == 1, not any(one.of_base.is_wrong for one in judged)
    old = "does not repeat" if is_one else "do not repeat"
    repeats = f"no longer repeat{'s' * is_one}" if is_new else old
    count = "counts" if len(judged) == 1 else "count"
    return (
        f"{listed(fault.fields)} {repeats} every {fault.period} layers: {engines} {count} layers "
        f"and {does}"
    )
