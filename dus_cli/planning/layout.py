"""Lay out the output's tensors in shards, in an order that lets nearly all bytes be cloned.

A file system clones (reflinks) only whole blocks: a tensor can be cloned if its position in the
output agrees with its position in the source, modulo the block. safetensors allows no gaps between
tensors but does allow spaces after the header, so each output shard has one free choice: the
*phase*, its data start modulo the block. The rest depends on the order:

- tensors keep the source's order, and so their distances; a second copy whose size is a multiple of
  the block goes directly after the first, which keeps later positions modulo the block;
- second copies of other sizes (norms, biases) go to the end of the shard, or to a shard of their
  own if they are most of the bytes (as with an odd hidden size);
- the tensors of one source shard are cut into *runs* that keep their distances. A run follows
  another one in an output shard if its phase fits there; else it begins a shard, if it is large
  enough. The phase of a source shard depends on the length of its header, so an output has at least
  as many shards as its base has phases;
- smaller runs, at most a 256th of the output, go to the end of a shard with room, and are copied.

The layout depends only on the checkpoint, the map and the shard size, so the output is the same on
every machine and file system.
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

# The most digits of an output layer's number.
_MOST_DIGITS = 6

_NOWHERE: frozenset[int] = frozenset()

# The block size of every common file system on x86 and Arm. One with larger blocks copies what does
# not agree modulo these.
BLOCK = 4096

# Limit of the tensors' entries in a header: the rest is for metadata and padding.
_MOST_HEADER_BYTES = MAX_HEADER_BYTES * 3 // 4

# A run may begin a shard if it has this many bytes, or this part of the largest shard's.
_WORTH_A_SHARD, _PART_WORTH_A_SHARD = 1 << 20, 16

# A smaller output is one file if possible: copying it takes no time.
_SMALL = 16 << 20

# How many of the latest shards with the right phase are tried for a tensor.
_LOOKED_AT = 3

# The part of the output that may be copied so that there are fewer shards: one in this many bytes.
_SPARED = 256

# Second copies of odd sizes go to the end if they are at most one in this many bytes of the shard.
_FEW = 64


class Kind(NamedTuple):
    """What many tensors of one source shard have in common: everything but their names and
    positions.

    Attributes:
        shard: the source shard.
        dtype: the dtype of a copy.
        num_bytes: the bytes of a copy.
        zeroed: the layer numbers of copies that are zeros.
        scales: the factor of a copy, by its layer number.
        can_agree: positions in source and output can agree; not for a cast tensor, which has
            another length, and not for a strided one.
    """

    shard: Shard
    dtype: str
    num_bytes: int
    zeroed: frozenset[int]
    scales: Mapping[int, Scale]
    can_agree: bool


class SourceTensor(NamedTuple):
    """A base tensor that is copied to the output.

    `number` to `number_end` are the characters of the layer number in its name, which differs in
    its copies; both are 0 if there is none.
    """

    tensor: TensorInfo
    kind: Kind
    number: int
    number_end: int


class Placement(NamedTuple):
    """An output tensor: a copy of its origin, with `number` as the layer number in its name.

    A plan may hold a million of them: what can be derived is not stored, not even the name.
    """

    origin: SourceTensor
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
        """The base's tensor."""
        return self.origin.tensor

    @property
    def shard(self) -> Shard:
        """The base's shard."""
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
        """The factor on its numbers; None if there is none."""
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
        """The whole blocks inside, as positions in the output; empty if positions in source and
        output do not agree modulo the block.
        """
        if (self.source_start - self.start) % BLOCK:
            return range(0)
        first = -(-self.start // BLOCK) * BLOCK
        last = (self.start + self.length) // BLOCK * BLOCK
        return range(first, max(first, last))


@dataclass(frozen=True)
class ShardLayout:
    """An output shard: a header, then the tensors in this order. `num_bytes` is the file's size.

    `phase` is where the data starts, modulo the block. The header is not kept but encoded on each
    access: the headers of a deep model have hundreds of megabytes.
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
        """Every tensor with its position in the file, in order."""
        start = self.data_start
        for placement in self.placements:
            yield placement, start
            start += placement.origin.kind.num_bytes

    def segments(self) -> Iterator[Segment]:
        """The bytes to copy as they are. Tensors that are adjacent in both files are joined: a
        segment may span many layers.
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

    A tensor larger than `max_shard_bytes` gets a shard of its own, as in transformers. Without a
    treatment all tensors are copied as they are.

    Args:
        checkpoint: the base.
        stack: the names of its layers.
        layer_map: the base layer of each output layer.
        max_shard_bytes: size of the largest shard.
        treatment: which tensors are cast, scaled or zeros.

    Raises:
        CheckpointError: a header would exceed the format's limit.
    """
    treatment = treatment or Treatment()
    runs: list[_TensorRun] = []
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
    """The output tensors from one source shard, in sequences that keep the source's distances."""
    waiting = list(_origins(shard, stack, layer_map, treatment))
    sequence: list[Placement] = []
    size = num_placed = 0  # bytes of the sequence; copies of each waiting tensor that are placed
    while waiting:
        later: list[tuple[SourceTensor, tuple[int, ...]]] = []
        for origin, numbers in waiting:
            num_bytes = origin.tensor.num_bytes
            stop = len(numbers) if num_bytes % BLOCK == 0 else num_placed + 1
            placed = numbers[num_placed:stop]
            sequence.extend([Placement(origin, number) for number in placed])
            size += num_bytes * len(placed)
            if len(numbers) > stop:
                later.append((origin, numbers))
        waiting, num_placed = later, num_placed + 1
        if sum(origin.tensor.num_bytes for origin, _ in later) * _FEW > size:
            yield sequence
            sequence, size = [], 0
    if sequence:
        yield sequence


def _origins(
    shard: Shard, stack: LayerStack, layer_map: LayerMap, treatment: Treatment
) -> Iterator[tuple[SourceTensor, tuple[int, ...]]]:
    """The tensors of one source shard, and the layer numbers of their copies; one copy if a name
    has no number.
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
        yield SourceTensor(tensor, kind, start, end), numbers


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
    """A tensor's entry in a header, for `encode_header`."""
    tensor, kind, *_ = placement.origin
    return placement.name, kind.dtype, tensor.shape, kind.num_bytes


def _line_bytes(origin: SourceTensor) -> int:
    """An upper bound of the entry's bytes in the header."""
    return 2 * (len(origin.tensor.name) + _MOST_DIGITS) + 100 + 21 * len(origin.tensor.shape)


@dataclass(slots=True)
class _TensorRun:
    """Output tensors from one source shard that keep the source's distances from each other.

    They agree with the source if the first is placed at `entry` modulo the block. `num_agreeing` is
    the number of their bytes that can agree.
    """

    shard: Shard
    entry: int
    placements: list[Placement] = field(default_factory=list)
    num_bytes: int = 0
    num_agreeing: int = 0

    @property
    def exit(self) -> int:
        return (self.entry + self.num_bytes) % BLOCK


def _runs(shard: Shard, sequence: Sequence[Placement]) -> Iterator[_TensorRun]:
    """Split a sequence at each change of the difference between position in source and sequence."""
    run: _TensorRun | None = None
    offset = value = 0
    for placement in sequence:
        tensor, kind, *_ = placement.origin
        if kind.can_agree:  # else it stays with the run before it
            shift = (tensor.start - offset) % BLOCK
            if run is None or shift != value:
                if run is not None:
                    yield run
                run, value = _TensorRun(shard, (shift + offset) % BLOCK), shift
            run.num_agreeing += kind.num_bytes
        elif run is None:
            run = _TensorRun(shard, 0)
        run.placements.append(placement)
        run.num_bytes += kind.num_bytes
        offset += kind.num_bytes
    if run is not None:
        yield run


@dataclass(slots=True)
class _Group:
    """The tensors of one output shard: those that agree with their sources, then the others.

    `header` is an upper bound of the header's bytes.
    """

    agreeing: list[Placement] = field(default_factory=list)
    others: list[Placement] = field(default_factory=list)
    num_bytes: int = 0
    header: int = 0

    def has_room(self, num_bytes: int, line: int, max_shard_bytes: int) -> bool:
        """Whether a tensor of `num_bytes`, with `line` bytes in the header, fits; an empty shard
        takes any tensor.
        """
        header = self.header + line
        fits = (
            header + self.num_bytes + num_bytes <= max_shard_bytes - BLOCK
            and header <= _MOST_HEADER_BYTES
        )
        return fits or not self.header

    def add(self, num_bytes: int, line: int) -> None:
        """Count a tensor that is added to one of the lists."""
        self.num_bytes += num_bytes
        self.header += line


def _pack(runs: Sequence[_TensorRun], max_shard_bytes: int) -> list[_Group]:
    """Distribute runs over shards of at most this size; a larger tensor has a shard of its own."""
    worth = min(_WORTH_A_SHARD, max_shard_bytes // _PART_WORTH_A_SHARD)
    begins = _beginnings(runs, worth)
    groups: list[_Group] = []
    by_end: dict[int, list[_Group]] = {}
    of_shard: dict[str, _Group] = {}
    others: list[_TensorRun] = []
    for run in runs:
        is_long = run.num_agreeing >= worth and not run.shard.is_pickled
        follows = bool(by_end.get(run.entry)) and (is_long or run.num_bytes % BLOCK == 0)
        if not follows and not (is_long and run.entry in begins):
            others.append(run)  # a short run that is not whole blocks would shift those after it
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
    """The shard that takes a tensor: the first that has room, so that few remain nearly full.

    A tensor that is not whole blocks shifts those after it, so it must go to the last shard.
    """
    del groups[:-_LOOKED_AT]
    for group in groups if num_bytes % BLOCK == 0 else groups[-1:]:
        if group.has_room(num_bytes, line, max_shard_bytes):
            return group
    return None


def _beginnings(runs: Sequence[_TensorRun], worth: int) -> set[int]:
    """The phases with which shards begin: all but those with few bytes, which together are at most
    one in `_SPARED` bytes of the output.
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
    runs: Iterable[_TensorRun],
    groups: list[_Group],
    of_shard: Mapping[str, _Group],
    max_shard_bytes: int,
) -> None:
    """Add the tensors that will be copied to the shard with others from their source shard, or to
    any with room.
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
    # Every tensor must start at a multiple of its element size. If one does not, the copied tensors
    # are sorted by falling element size, as the library does, and if need be all of them.
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
