"""Layer maps: which base layer each output layer copies. Pure."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from dus_cli.errors import LayerMapError, shown

# A longer map is a typing error: the deepest known models have about 200 layers.
MAX_OUTPUT_LAYERS = 100_000


@dataclass(frozen=True)
class Seam:
    """A place where two adjacent output layers were not adjacent, in this order, in the base.

    `distance` is how far apart the two layers were in the base; adjacent layers have distance 1.
    SOLAR's seam joins layer 23 to layer 8, distance 15 (arXiv:2312.15166, section 2, "layer
    distance").
    """

    output_layers: tuple[int, int]
    base_layers: tuple[int, int]

    @property
    def distance(self) -> int:
        below, above = self.base_layers
        return abs(below - above)


@dataclass(frozen=True)
class LayerMap:
    """The base layer that each output layer copies (`sources`), in output order.

    `trim` is None for a map that is not a depthwise scaling, or was typed with `--layers`.
    """

    sources: tuple[int, ...]
    num_base_layers: int
    trim: int | None = None

    def __len__(self) -> int:
        return len(self.sources)

    @property
    def is_deeper(self) -> bool:
        return len(self.sources) > self.num_base_layers

    @property
    def seams(self) -> tuple[Seam, ...]:
        return tuple(
            Seam((above - 1, above), pair)
            for above, pair in enumerate(pairwise(self.sources), start=1)
            if pair[1] != pair[0] + 1
        )

    @property
    def runs(self) -> tuple[range, ...]:
        """The map as runs of consecutive base layers: [0…23, 8…31] is (range(0, 24), range(8,
        32)).
        """
        starts = [0, *(seam.output_layers[1] for seam in self.seams), len(self.sources)]
        return tuple(range(self.sources[a], self.sources[b - 1] + 1) for a, b in pairwise(starts))

    @cached_property  # used once per tensor
    def outputs(self) -> tuple[tuple[int, ...], ...]:
        """For every base layer, the output layers that copy it."""
        copies: list[list[int]] = [[] for _ in range(self.num_base_layers)]
        for output, base in enumerate(self.sources):
            copies[base].append(output)
        return tuple(map(tuple, copies))

    @property
    def holds_base(self) -> bool:
        """Whether the output has all base layers in their order, perhaps with others in between."""
        return self._in_order() is not None

    @property
    def base_outputs(self) -> tuple[int | None, ...]:
        """For every base layer, the output layer that counts as the base's own; its other copies
        are new layers.

        If the output has all base layers in their order, these are the earliest such output layers:
        for depth up-scaling the first n − m and the last m. Else it is each layer's first copy, or
        None for a layer that is left out.

        >>> stack(4, trim=1).base_outputs
        (0, 1, 2, 5)
        """
        return self._in_order() or tuple(
            outputs[0] if outputs else None for outputs in self.outputs
        )

    @property
    def new_layers(self) -> tuple[int, ...]:
        """The output layers that are not the base's own (`base_outputs`).

        >>> stack(4, trim=1).new_layers
        (3, 4)
        """
        return tuple(sorted(set(range(len(self))) - set(self.base_outputs)))

    def _in_order(self) -> tuple[int, ...] | None:
        """The earliest output layers that copy base layers 0, 1, …, n − 1 in this order; None if
        there are none.
        """
        outputs: list[int] = []
        for output, base in enumerate(self.sources):
            if base == len(outputs):
                outputs.append(output)
        return tuple(outputs) if len(outputs) == self.num_base_layers else None

    def keeps_phase(self, period: int) -> bool:
        """Whether every output layer keeps its source's position in a pattern of this period."""
        return all(output % period == base % period for output, base in enumerate(self.sources))

    def __str__(self) -> str:
        """The map in the grammar of `--layers`.

        >>> str(stack(32, trim=8))
        '0:24,8:32'
        """
        return ",".join(str(r.start) if len(r) == 1 else f"{r.start}:{r.stop}" for r in self.runs)


def source_layers(num_layers: int, trim: int, copies: int = 2) -> tuple[int, ...]:
    """Base layer that each output layer copies (SOLAR, arXiv:2312.15166, section 2).

    The first copy loses its last `trim` layers, the last copy its first `trim`; with more than two
    copies the inner ones lose both. The length is copies · n − 2 · (copies − 1) · trim.

    >>> source_layers(4, trim=1)
    (0, 1, 2, 1, 2, 3)
    >>> source_layers(4, trim=1, copies=3)
    (0, 1, 2, 1, 2, 1, 2, 3)
    """
    first, inner, last = (
        range(num_layers - trim),
        range(trim, num_layers - trim),
        range(trim, num_layers),
    )
    return (*first, *(layer for _ in range(copies - 2) for layer in inner), *last)


def default_trim(num_layers: int) -> int:
    """SOLAR's ratio, m = n / 4 (8 of 32), rounded down."""
    return num_layers // 4


def largest_trim(num_layers: int) -> int:
    """The largest trim whose result is deeper than the base: s > n if and only if m < n / 2, for
    any number of copies.
    """
    return (num_layers - 1) // 2


def stack(num_layers: int, trim: int | None = None, copies: int = 2) -> LayerMap:
    """The depthwise scaling of `num_layers` layers; the default trim is SOLAR's ratio.

    Raises:
        LayerMapError: the result would not be deeper than the base, or would exceed the limit.
    """
    if copies < 2:
        raise LayerMapError(f"--copies {copies} would not deepen the model; use 2 or more")
    if trim is None:
        trim = default_trim(num_layers)
    span = largest_trim(num_layers)
    if not 0 <= trim <= span:
        num_left = max(0, copies * num_layers - 2 * (copies - 1) * trim) if trim >= 0 else None
        problem = (
            f"--trim {trim} would leave {num_left} of {num_layers} layers, no deeper than the base"
            if num_left is not None
            else f"--trim {trim} is negative"
        )
        raise LayerMapError(f"{problem}; use {f'0 to {span}' if span else '0'}")
    num_output = copies * num_layers - 2 * (copies - 1) * trim
    if num_output > MAX_OUTPUT_LAYERS:
        raise LayerMapError(
            f"--copies {copies} would make {num_output} layers; at most {MAX_OUTPUT_LAYERS}"
        )
    return LayerMap(source_layers(num_layers, trim, copies), num_layers, trim)


_STRETCH = re.compile(r"(\d{1,9})(?::(\d{1,9}))?", re.ASCII)
_RANGE = re.compile(r"(?:(\d{1,9})?:(\d{1,9})?|(\d{1,9}))", re.ASCII)


def parse_layers(text: str) -> tuple[tuple[int, int | None], ...]:
    """Parse `--layers`: half-open ranges like Python slices, and single layers.

    An omitted end is None: it is the base's depth, which is not known here.

    >>> parse_layers("0:24,8:32,5,20:")
    ((0, 24), (8, 32), (5, 6), (20, None))

    Raises:
        LayerMapError: the text is not of this form.
    """
    ranges: list[tuple[int, int | None]] = []
    for part in text.split(","):
        match = _RANGE.fullmatch(part.strip())
        if match is None:
            raise LayerMapError(
                f"--layers {shown(text)!r}: {shown(part)!r} is neither START:END nor a layer "
                "number; ranges are half-open like Python slices, for example 0:24,8:32"
            )
        start, end, single = match.groups()
        if single is not None:
            ranges.append((int(single), int(single) + 1))
        else:
            ranges.append((int(start or 0), int(end) if end else None))
    return tuple(ranges)


def typed_map(text: str, num_layers: int) -> LayerMap:
    """The map of `--layers`, for a base of this depth. A range may repeat.

    >>> typed_map("0:3,1:", 4).sources
    (0, 1, 2, 1, 2, 3)

    Raises:
        LayerMapError: the text is not of this form, a range is empty, or the base lacks a layer.
    """
    sources: list[int] = []
    for start, end in parse_layers(text):
        stop = num_layers if end is None else end
        if stop > num_layers or (start >= num_layers and start < stop):
            raise LayerMapError(
                f"--layers {start}:{stop} reaches beyond the base, which has {num_layers} layers "
                f"(0 to {num_layers - 1}); ranges are half-open, so {num_layers} is the largest end"
            )
        if start >= stop:
            raise LayerMapError(
                f"--layers {start}:{stop} is empty; the end must be greater than the start"
            )
        sources.extend(range(start, stop))
        if len(sources) > MAX_OUTPUT_LAYERS:
            raise LayerMapError(f"--layers names more than {MAX_OUTPUT_LAYERS} layers")
    return LayerMap(tuple(sources), num_layers)


def parse_double(text: str) -> tuple[tuple[int, int], ...]:
    """Parse `--double`: half-open ranges like Python slices, and single layers, in ascending order.
    Both ends must be given.

    >>> parse_double("2:29"), parse_double("4,8:10")
    (((2, 29),), ((4, 5), (8, 10)))

    Raises:
        LayerMapError: the text is not of this form.
    """
    ranges: list[tuple[int, int]] = []
    for part in text.split(","):
        match = _STRETCH.fullmatch(part.strip())
        start = int(match[1]) if match else 0
        end = int(match[2] or start + 1) if match else 0
        if end <= start or (ranges and start < ranges[-1][1]):
            raise LayerMapError(
                f"--double {shown(text)!r}: {shown(part)!r} is not a range of layers after the "
                "previous one; give START:"
                "END of base layers, half-open like Python slices, for example 2:29"
            )
        ranges.append((start, end))
    return tuple(ranges)


def doubled_map(text: str, num_layers: int) -> LayerMap:
    """The map of `--double`: each layer in these ranges is followed by its copy.

    >>> str(doubled_map("1:3", 4)), doubled_map("1:3", 4).sources
    ('0:2,1:3,2:4', (0, 1, 1, 2, 2, 3))

    Raises:
        LayerMapError: the text is not of this form, or the base lacks a layer.
    """
    twice: set[int] = set()
    for start, end in parse_double(text):
        if end > num_layers:
            raise LayerMapError(
                f"--double {start}:{end} reaches beyond the base, which has {num_layers} layers (0 "
                f"to {num_layers - 1}); ranges are half-open, so {num_layers} is the largest end"
            )
        twice.update(range(start, end))
    return LayerMap(
        tuple(layer for layer in range(num_layers) for _ in range(1 + (layer in twice))), num_layers
    )


# Canonical decimal numbers only: no library writes an index as "007" or with non-ASCII digits.
_LAYER_NUMBER = re.compile(r"\.(0|[1-9][0-9]{0,8})(?=\.|\Z)")


def number_span(name: str) -> tuple[int, int] | None:
    """The start and end of the layer number in a tensor's name; None if it has none.

    It is the same number as in `split_name`, found faster for very many names.

    >>> number_span("model.layers.17.mlp.weight")
    (13, 15)
    """
    match = _LAYER_NUMBER.search(name)
    return None if match is None else match.span(1)


def number_spans(names: Iterable[str]) -> Iterator[tuple[int, int] | None]:
    """`number_span` of each name; consecutive names of one layer are given the same object.

    Files mostly have their tensors layer by layer, and then only one name of each layer is
    searched.

    >>> list(number_spans(["layers.3.k", "layers.3.v", "norm"]))
    [(7, 8), (7, 8), None]
    """
    span: tuple[int, int] | None = None
    beginning = ""
    for name in names:
        if span is None or not name.startswith(beginning):
            span = number_span(name)
            beginning = "" if span is None else f"{name[: span[1]]}."
        yield span


@dataclass(frozen=True)
class LayerName:
    """A tensor's name split at its layer number: prefix + "." + index, then "." + suffix unless
    that is empty.
    """

    prefix: str
    index: int
    suffix: str

    def at(self, index: int) -> str:
        """The name of the same tensor in another layer."""
        return f"{self.prefix}.{index}.{self.suffix}" if self.suffix else f"{self.prefix}.{index}"


def split_name(name: str) -> LayerName | None:
    """Split a tensor's name at its first number, the layer's; later ones (`experts.3`) are part of
    the suffix. None if there is no number.

    >>> split_name("model.layers.7.mlp.experts.3.up_proj.weight")
    LayerName(prefix='model.layers', index=7, suffix='mlp.experts.3.up_proj.weight')
    >>> split_name("attn_res.mlp_queries.5")
    LayerName(prefix='attn_res.mlp_queries', index=5, suffix='')
    >>> split_name("lm_head.weight") is None
    True
    """
    match = _LAYER_NUMBER.search(name)
    if match is None:
        return None
    return LayerName(name[: match.start()], int(match[1]), name[match.end() + 1 :])
