"""In which shard, and in which order, the output's tensors lie, so that nearly all bytes can be
cloned.

A file system clones (reflinks) whole blocks only: a tensor can be cloned where its position in the
output agrees with its position in the source modulo the block. safetensors allows no holes between
tensors but does allow spaces after the header, so each output shard has one free choice: the
*phase*, its data start modulo the block. The order does the rest:

- tensors keep the source's order, which keeps their distances; a second copy whose size is a
  multiple of the block goes right behind the first and shifts nothing;
- second copies of other sizes (norms, biases) go to the end of the shard, or to a shard of their
  own where they are most of the bytes (a hidden size that is no multiple of anything);
- what one source shard gives is cut into *runs*, whose tensors keep their distances. A run follows
  another one in an output shard where its phase is the one that has come up there; else it begins a
  shard, if it is worth one. A source shard has a phase by the length of its header, so an output
  has as many shards as its base has phases, or more;
- what is not worth a shard, at most a 256th of the output, goes to the end of a shard that has
  room, and is copied.

The layout depends on the checkpoint, the map and the shard size alone, so every machine and every
file system gets the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain
from typing import NamedTuple

from dus_cli.errors import CheckpointError
from dus_cli.maps.layers import LayerMap, number_span
from dus_cli.maps.stacks import LayerStack
from dus_cli.planning.scaling import Scale
from dus_cli.planning.tables import followed
from dus_cli.planning.treatment import UNSCALED, Making, Treatment, making_of
from dus_cli.source.checkpoint import Checkpoint, Shard
from dus_cli.source.headers import (
    DTYPE_BITS,
    MAX_HEADER_BYTES,
    TensorInfo,
    encode_header,
    header_size,
    is_aligned,
)

# As many as the number of an output layer has.
_MOST_DIGITS = 6

_NOWHERE: frozenset[int] = frozenset()

# Block of every common file system on x86 and Arm. Larger ones copy what does not agree with
# theirs.
BLOCK = 4096

# What the tensors' lines in a header may come to: the rest is for metadata and for the padding.
_MOST_HEADER_BYTES = MAX_HEADER_BYTES * 3 // 4

# A run is worth a shard of its own if it is this long, or this part of the largest shard.
_WORTH_A_SHARD, _PART_WORTH_A_SHARD = 1 << 20, 16

# An output of fewer bytes is one file where it can be: to copy them takes no time.
_SMALL = 16 << 20

# What does not fit into one shard is followed there by what is smaller, until this many later ones
# are begun.
_LOOKED_AT = 3

# The part of the output that may be copied, so that it has fewer shards.
_SPARED = 256

# Second copies of odd sizes up to this part of a source shard ride at its end.
_FEW = 64


class Kind(NamedTuple):
    """What many tensors of one source shard share: all that a layout asks of them but their names
    and places.

    `dtype` and `num_bytes` are a copy's, `zeroed` the numbers under which it is zeros, `scales` by
    what it is multiplied under which number. `can_agree`: positions in source and output can agree;
    a cast tensor has another length, a strided one no order.
    """

    shard: Shard
    dtype: str
    num_bytes: int
    zeroed: frozenset[int]
    scales: Mapping[int, Scale]
    can_agree: bool


class Origin(NamedTuple):
    """A base tensor that stands in the output.

    `number` to `number_end` are the characters of its name that are a number which its copies have
    others of; where there is none, both are 0.
    """

    tensor: TensorInfo
    kind: Kind
    number: int
    number_end: int


class Placement(NamedTuple):
    """An output tensor: a copy of its origin, with `number` for the one in its name if that has
    one.

    A plan may hold a million of them: what can be worked out is not stored, not even the name.
    """

    origin: Origin
    number: int = 0

    @property
    def name(self) -> str:
        origin = self.origin
        name = origin.tensor.name
        return (
            f"{name[: origin.number]}{self.number}{name[origin.number_end :]}"
            if origin.number
            else name
        )

    @property
    def tensor(self) -> TensorInfo:
        """The base's."""
        return self.origin.tensor

    @property
    def shard(self) -> Shard:
        """The base's."""
        return self.origin.kind.shard

    @property
    def dtype(self) -> str:
        return self.origin.kind.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in the output."""
        return self.origin.kind.num_bytes

    @property
    def making(self) -> Making:
        tensor, kind, *_ = self.origin
        if self.number in kind.zeroed:
            return Making.zeros
        return (
            Making.scaled
            if kind.scales and self.number in kind.scales
            else making_of(tensor, kind.dtype)
        )

    @property
    def scale(self) -> Scale | None:
        """What its numbers are multiplied by; None for one that is not."""
        return self.origin.kind.scales.get(self.number)


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes to move: `length` bytes from `source_start` in a source shard to `start` in an
    output shard.
    """

    shard: Shard
    source_start: int
    start: int
    length: int

    @property
    def clonable(self) -> range:
        """The whole blocks inside, as positions in the output; empty where source and output
        disagree.
        """
        if (self.source_start - self.start) % BLOCK:
            return range(0)
        first = -(-self.start // BLOCK) * BLOCK
        last = (self.start + self.length) // BLOCK * BLOCK
        return range(first, max(first, last))


@dataclass(frozen=True)
class ShardLayout:
    """An output shard: a header, then the tensors in this order. `num_bytes` is the file's size.

    `phase` is where the data starts, modulo the block. The header is encoded anew whenever it is
    asked for: those of a deep model are hundreds of megabytes.
    """

    metadata: Mapping[str, str]
    placements: tuple[Placement, ...]
    phase: int
    data_start: int
    num_bytes: int

    @property
    def header(self) -> bytes:
        """The file's bytes before the data."""
        return encode_header(self.metadata, map(_line, self.placements), BLOCK, self.phase)

    def positions(self) -> Iterator[tuple[Placement, int]]:
        """Every tensor with its position in the file."""
        start = self.data_start
        for placement in self.placements:
            yield placement, start
            start += placement.origin.kind.num_bytes

    def segments(self) -> Iterator[Segment]:
        """The bytes to move as they are, neighbours in both files joined: one segment may span
        many layers.
        """
        pending: Segment | None = None
        for placement, start in self.positions():
            tensor = placement.tensor
            if (
                placement.making is not Making.copied
                or not tensor.lies_in_order
                or not tensor.num_bytes
            ):
                continue
            if (
                pending is not None
                and pending.shard is placement.shard
                and pending.source_start + pending.length == tensor.start
                and pending.start + pending.length == start
            ):
                pending = Segment(
                    pending.shard,
                    pending.source_start,
                    pending.start,
                    tensor.end - pending.source_start,
                )
                continue
            if pending is not None:
                yield pending
            pending = Segment(placement.shard, tensor.start, start, tensor.num_bytes)
        if pending is not None:
            yield pending


def lay_out(
    checkpoint: Checkpoint,
    stack: LayerStack,
    layer_map: LayerMap,
    max_shard_bytes: int,
    treatment: Treatment | None = None,
) -> tuple[ShardLayout, ...]:
    """Place every output tensor. Linear in the number of tensors.

    A tensor larger than `max_shard_bytes` gets a shard to itself, as in transformers. Without a
    treatment all are copied as they are; zeros stand where the copies would.

    Raises:
        CheckpointError: the map leaves nothing, or a header would pass the format's limit.
    """
    treatment = treatment or Treatment()
    runs: list[_Run] = []
    for shard in checkpoint.shards:
        for sequence in _sequences(shard, stack, layer_map, treatment):
            runs += _runs(shard, sequence)
    if sum(run.num_bytes for run in runs) <= _SMALL:
        whole = _Group(list(chain.from_iterable(run.placements for run in runs)))
        for placement in whole.agreeing:
            whole.add(placement.origin.kind.num_bytes, _line_bytes(placement.origin))
        if whole.num_bytes + whole.header <= max_shard_bytes and whole.header <= _MOST_HEADER_BYTES:
            return (_finish(whole),)
    return tuple(map(_finish, _pack(runs, max_shard_bytes)))


def _sequences(
    shard: Shard, stack: LayerStack, layer_map: LayerMap, treatment: Treatment
) -> Iterator[list[Placement]]:
    """The output tensors that come from one source shard, in orders that keep the source's
    distances.
    """
    waiting = list(_origins(shard, stack, layer_map, treatment))
    sequence: list[Placement] = []
    size = done = 0  # bytes of the sequence; copies of each waiting tensor that are placed
    while waiting:
        later: list[tuple[Origin, tuple[int, ...]]] = []
        for origin, numbers in waiting:
            num_bytes = origin.tensor.num_bytes
            stop = len(numbers) if num_bytes % BLOCK == 0 else done + 1
            placed = numbers[done:stop]
            sequence.extend([Placement(origin, number) for number in placed])
            size += num_bytes * len(placed)
            if len(numbers) > stop:
                later.append((origin, numbers))
        waiting, done = later, done + 1
        if sum(origin.tensor.num_bytes for origin, _ in later) * _FEW > size:
            yield sequence
            sequence, size = [], 0
    if sequence:
        yield sequence


def _origins(
    shard: Shard, stack: LayerStack, layer_map: LayerMap, treatment: Treatment
) -> Iterator[tuple[Origin, tuple[int, ...]]]:
    """The tensors of one source shard, and the numbers that their copies have; one copy where
    there is no number.
    """
    kinds: dict[tuple[object, ...], Kind] = {}
    for stored in shard.header.tensors:
        tensor = followed(stored, stack, layer_map)
        name, zeroed, scales = tensor.name, _NOWHERE, UNSCALED
        start = end = 0
        numbers: tuple[int, ...] = (0,)
        span = number_span(name)
        if span is not None:
            start, end = span
            prefix = name[: start - 1]
            suffix = name[end + 1 :]
            zeroed, scales = (
                treatment.zeroed(prefix, suffix),
                treatment.scales(prefix, suffix, tensor),
            )
            numbers = stack.output_numbers(prefix, int(name[start:end]), layer_map)
        key = (tensor.dtype, tensor.shape, tensor.lies_in_order, zeroed, id(scales))
        kind = kinds.get(key)
        if kind is None:
            kind = kinds[key] = _kind(tensor, shard, treatment, zeroed, scales)
        yield Origin(tensor, kind, start, end), numbers


def _kind(
    tensor: TensorInfo,
    shard: Shard,
    treatment: Treatment,
    zeroed: frozenset[int],
    scales: Mapping[int, Scale],
) -> Kind:
    dtype = treatment.dtype_of(tensor)
    num_bytes = tensor.num_elements * DTYPE_BITS[dtype] // 8
    return Kind(
        shard, dtype, num_bytes, zeroed, scales, dtype == tensor.dtype and tensor.lies_in_order
    )


def _line(placement: Placement) -> tuple[str, str, tuple[int, ...], int]:
    """What a header says of a tensor."""
    tensor, kind, *_ = placement.origin
    return placement.name, kind.dtype, tensor.shape, kind.num_bytes


def _line_bytes(origin: Origin) -> int:
    """An upper bound of the bytes of that in the header."""
    return 2 * (len(origin.tensor.name) + _MOST_DIGITS) + 100 + 21 * len(origin.tensor.shape)


@dataclass(slots=True)
class _Run:
    """Output tensors from one source shard that keep the source's distances from each other.

    They agree with the source where the first is placed at `entry` modulo the block; `exit` is
    where the next one would be placed then. `num_agreeing` bytes of theirs can agree.
    """

    shard: Shard
    entry: int
    placements: list[Placement] = field(default_factory=list)
    num_bytes: int = 0
    num_agreeing: int = 0

    @property
    def exit(self) -> int:
        return (self.entry + self.num_bytes) % BLOCK


def _runs(shard: Shard, sequence: Sequence[Placement]) -> Iterator[_Run]:
    """Split a sequence where the distance between position in source and in sequence changes."""
    run: _Run | None = None
    offset = value = 0
    for placement in sequence:
        tensor, kind, *_ = placement.origin
        if kind.can_agree:  # else it stays with the run before it
            shift = (tensor.start - offset) % BLOCK
            if run is None or shift != value:
                if run is not None:
                    yield run
                run, value = _Run(shard, (shift + offset) % BLOCK), shift
            run.num_agreeing += kind.num_bytes
        elif run is None:
            run = _Run(shard, 0)
        run.placements.append(placement)
        run.num_bytes += kind.num_bytes
        offset += kind.num_bytes
    if run is not None:
        yield run


@dataclass(slots=True)
class _Group:
    """What comes into one output shard: tensors that agree with their sources, behind them the
    others.

    `header` is an upper bound of the header's bytes.
    """

    agreeing: list[Placement] = field(default_factory=list)
    others: list[Placement] = field(default_factory=list)
    num_bytes: int = 0
    header: int = 0

    def has_room(self, num_bytes: int, line: int, max_shard_bytes: int) -> bool:
        """Whether a tensor of these bytes, with this line in the header, fits; an empty shard
        takes any.
        """
        header = self.header + line
        fits = (
            header + self.num_bytes + num_bytes <= max_shard_bytes - BLOCK
            and header <= _MOST_HEADER_BYTES
        )
        return fits or not self.header

    def add(self, num_bytes: int, line: int) -> None:
        """Count a tensor that is put into one of the lists."""
        self.num_bytes += num_bytes
        self.header += line


def _pack(runs: Sequence[_Run], max_shard_bytes: int) -> list[_Group]:
    """Share the runs out among shards of at most this size; a larger tensor has one to itself."""
    worth = min(_WORTH_A_SHARD, max_shard_bytes // _PART_WORTH_A_SHARD)
    begins = _beginnings(runs, worth)
    groups: list[_Group] = []
    by_end: dict[int, list[_Group]] = {}
    of_shard: dict[str, _Group] = {}
    others: list[_Run] = []
    for run in runs:
        is_long = run.num_agreeing >= worth and not run.shard.is_pickled
        follows = bool(by_end.get(run.entry)) and (is_long or run.num_bytes % BLOCK == 0)
        if not follows and not (is_long and run.entry in begins):
            others.append(run)  # what is short and no whole blocks would shift what follows it
            continue
        end = run.entry
        for placement in run.placements:
            num_bytes, line = placement.origin.kind.num_bytes, _line_bytes(placement.origin)
            group = _with_room(by_end.setdefault(end, []), num_bytes, line, max_shard_bytes)
            if group is None:
                group = _Group()
                groups.append(group)
                by_end[end].append(group)
            group.add(num_bytes, line)
            group.agreeing.append(placement)
            if num_bytes % BLOCK:
                by_end[end].remove(group)
                end = (end + num_bytes) % BLOCK
                by_end.setdefault(end, []).append(group)
            of_shard[run.shard.name] = group
    _pack_others(others, groups, of_shard, max_shard_bytes)
    return groups


def _with_room(
    groups: list[_Group], num_bytes: int, line: int, max_shard_bytes: int
) -> _Group | None:
    """Which of some shards takes a tensor: the first that has room, so that few remain nearly full.

    What is no whole blocks shifts what follows it, and goes where that can follow: to the last one.
    """
    del groups[:-_LOOKED_AT]
    for group in groups if num_bytes % BLOCK == 0 else groups[-1:]:
        if group.has_room(num_bytes, line, max_shard_bytes):
            return group
    return None


def _beginnings(runs: Sequence[_Run], worth: int) -> set[int]:
    """The phases with which shards are begun: all but those of few bytes, together at most a
    part of the output.
    """
    num_bytes: Counter[int] = Counter()
    for run in runs:
        if run.entry % 8 == 0 and run.num_agreeing >= worth and not run.shard.is_pickled:
            num_bytes[run.entry] += run.num_agreeing
    spared = sum(run.num_bytes for run in runs) // _SPARED
    begins = set(num_bytes)
    for phase, size in sorted(num_bytes.items(), key=lambda item: (item[1], -item[0])):
        spared -= size
        if spared < 0 or len(begins) == 1:
            break
        begins.remove(phase)
    return begins


def _pack_others(
    runs: Iterable[_Run], groups: list[_Group], of_shard: Mapping[str, _Group], max_shard_bytes: int
) -> None:
    """Put what will be copied behind what comes from the same source shard, or where else there
    is room.
    """
    spare = iter(tuple(groups))
    group: _Group | None = None
    for run in runs:
        own = of_shard.get(run.shard.name)
        for placement in run.placements:
            num_bytes, line = placement.origin.kind.num_bytes, _line_bytes(placement.origin)
            if own is not None and own.has_room(num_bytes, line, max_shard_bytes):
                own.add(num_bytes, line)
                own.others.append(placement)
                continue
            while group is None or not group.has_room(num_bytes, line, max_shard_bytes):
                group = next(spare, None)
                if group is None:
                    group = _Group()
                    groups.append(group)
            group.add(num_bytes, line)
            group.others.append(placement)


def _finish(group: _Group) -> ShardLayout:
    placements = [*group.agreeing, *group.others]
    # Where it is not so of itself, what is copied, or else all, is ordered as the library does it:
    # then every tensor starts at a multiple of its element.
    if not _are_aligned(placements):
        placements = [*group.agreeing, *sorted(group.others, key=_falling)]
        if not _are_aligned(placements):
            placements = sorted(placements, key=_falling)
    metadata: dict[str, str] = {}
    for shard in {origin.kind.shard.name: origin.kind.shard for origin, _ in placements}.values():
        metadata = {**shard.header.metadata, **metadata}
    metadata = {"format": "pt", **metadata}
    phase = _best_phase(placements)
    data_start = header_size(metadata, map(_line, placements), BLOCK, phase)
    if data_start - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"an output shard would need a header of {data_start} bytes, over the format's limit "
            f"of {MAX_HEADER_BYTES}; use a smaller --max-shard-size"
        )
    num_bytes = data_start + sum(origin.kind.num_bytes for origin, _ in placements)
    return ShardLayout(metadata, tuple(placements), phase, data_start, num_bytes)


def _are_aligned(placements: Iterable[Placement]) -> bool:
    return is_aligned((origin.kind.dtype, origin.kind.num_bytes) for origin, _ in placements)


def _falling(placement: Placement) -> int:
    return -DTYPE_BITS[placement.dtype]


def _best_phase(placements: Iterable[Placement]) -> int:
    """The data start, modulo the block, at which most bytes agree with their source."""
    votes: Counter[int] = Counter({0: 0})
    offset = 0
    for (tensor, kind, *_), _ in placements:
        phase = (tensor.start - offset) % BLOCK
        if phase % 8 == 0 and kind.can_agree:  # the format's alignment of the data start
            votes[phase] += kind.num_bytes
        offset += kind.num_bytes
    return max(votes, key=lambda phase: (votes[phase], -phase))
