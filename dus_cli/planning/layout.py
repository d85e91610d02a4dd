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
from typing import NamedTuple

from dus_cli.errors import CheckpointError
from dus_cli.maps.layers import LayerMap, number_spans
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
    encoded_bytes,
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

# How many names are joined at once, to count their bytes.
_NAMES_AT_ONCE = 1024

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
        shape: its shape.
        num_elements: its numbers.
        num_bytes: the bytes of a copy.
        stored_bytes: the bytes of the base tensor.
        entry_bytes: an upper bound of its entry's bytes in a header, beside twice the name's.
        zeroed: the layer numbers of copies that are zeros.
        scales: the factor of a copy, by its layer number.
        can_agree: positions in source and output can agree; not for a cast tensor, which has
            another length, and not for a strided one.
    """

    shard: Shard
    dtype: str
    shape: tuple[int, ...]
    num_elements: int
    num_bytes: int
    stored_bytes: int
    entry_bytes: int
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

    A plan may have a million of them. They are made when they are asked for, and have no name of
    their own, because it can be derived.
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

    The tensors are copies of `origins`, with `numbers` as the layer numbers in their names.

    `phase` is where the data starts, modulo the block. The header is not kept but encoded on each
    access: the headers of a deep model have hundreds of megabytes.
    """

    metadata: Mapping[str, str]
    origins: Sequence[SourceTensor]
    numbers: Sequence[int]
    phase: int
    data_start: int
    num_bytes: int

    @property
    def num_tensors(self) -> int:
        return len(self.origins)

    @property
    def num_parameters(self) -> int:
        return sum(origin.kind.num_elements for origin in self.origins)

    @property
    def placements(self) -> Iterator[Placement]:
        """Every tensor, in order."""
        return map(Placement, self.origins, self.numbers)

    @property
    def header(self) -> bytes:
        """The file's bytes before the data."""
        return encode_header(self.metadata, map(_entry, self.placements), BLOCK, self.phase)

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
        shard: Shard | None = None
        source_start = source_end = start = 0
        position = self.data_start
        for (tensor, kind, _, _), number in zip(self.origins, self.numbers, strict=True):
            as_it_is = kind.can_agree and number not in kind.zeroed and number not in kind.scales
            if as_it_is and kind.num_bytes:
                if (
                    shard is kind.shard
                    and source_end == tensor.start
                    and position - start == source_end - source_start
                ):
                    source_end = tensor.end
                else:
                    if shard is not None:
                        yield Segment(shard, source_start, start, source_end - source_start)
                    shard, start = kind.shard, position
                    source_start, source_end = tensor.start, tensor.end
            position += kind.num_bytes
        if shard is not None:
            yield Segment(shard, source_start, start, source_end - source_start)


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
        for copies in _sequences(shard, stack, layer_map, treatment):
            runs += _runs(shard, copies)
    if sum(run.num_bytes for run in runs) <= _SMALL:
        whole = _Group()
        for run in runs:
            whole.agreeing.extend(run.copies)
            for origin in run.copies.origins:
                whole.add(origin.kind.num_bytes, _most_entry_bytes(origin))
        if whole.num_bytes + whole.header <= max_shard_bytes and whole.header <= _MOST_HEADER_BYTES:
            return (_finish(whole),)
    return tuple(map(_finish, _pack(runs, max_shard_bytes)))


@dataclass(slots=True)
class _Copies:
    """Output tensors in order: copies of `origins`, with `numbers` in their names."""

    origins: list[SourceTensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)

    def append(self, origin: SourceTensor, number: int) -> None:
        self.origins.append(origin)
        self.numbers.append(number)

    def extend(self, others: _Copies) -> None:
        self.origins += others.origins
        self.numbers += others.numbers

    def part(self, begin: int, end: int) -> _Copies:
        return _Copies(self.origins[begin:end], self.numbers[begin:end])


def _sequences(
    shard: Shard, stack: LayerStack, layer_map: LayerMap, treatment: Treatment
) -> Iterator[_Copies]:
    """The output tensors from one source shard, in sequences that keep the source's distances."""
    waiting = list(_origins(shard, stack, layer_map, treatment))
    copies = _Copies()
    size = num_placed = 0  # bytes of the sequence; copies of each waiting tensor that are placed
    while waiting:
        later: list[tuple[SourceTensor, tuple[int, ...]]] = []
        num_later_bytes = 0
        for waits in waiting:
            origin, numbers = waits
            num_bytes = origin.kind.stored_bytes
            if num_bytes % BLOCK == 0:
                copies.origins += [origin] * len(numbers)
                copies.numbers += numbers
                size += num_bytes * len(numbers)
            elif numbers:
                copies.append(origin, numbers[num_placed])
                size += num_bytes
                if len(numbers) > num_placed + 1:
                    later.append(waits)
                    num_later_bytes += num_bytes
        waiting, num_placed = later, num_placed + 1
        if num_later_bytes * _FEW > size:
            yield copies
            copies, size = _Copies(), 0
    if copies.origins:
        yield copies


def _origins(
    shard: Shard, stack: LayerStack, layer_map: LayerMap, treatment: Treatment
) -> Iterator[tuple[SourceTensor, tuple[int, ...]]]:
    """The tensors of one source shard, and the layer numbers of their copies; one copy if a name
    has no number.
    """
    kinds: dict[tuple[object, ...], Kind] = {}
    of_layer: tuple[int, int] | None = None
    start = end = 0
    prefix, numbers = "", tuple[int, ...]()
    tensors = shard.header.tensors
    for stored, span in zip(tensors, number_spans(t.name for t in tensors), strict=True):
        tensor = followed(stored, stack, layer_map) if stack.tables else stored
        zeroed, scales = _NOWHERE, UNSCALED
        if span is None:
            start, end, numbers = 0, 0, (0,)
        else:
            name = tensor.name
            if span is not of_layer:
                start, end = span
                prefix = name[: start - 1]
                numbers = stack.output_numbers(prefix, int(name[start:end]), layer_map)
            if treatment.changes_layers:
                suffix = name[end + 1 :]
                zeroed = treatment.zeroed(prefix, suffix)
                scales = treatment.scales(prefix, suffix, tensor)
        of_layer = span
        _, dtype, shape, _, _, strides, blocks = tensor
        key = (dtype, shape, strides is None and blocks is None, zeroed, id(scales))
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
    return Kind(
        shard,
        dtype,
        tensor.shape,
        num_elements=tensor.num_elements,
        num_bytes=tensor.num_elements * DTYPE_BITS[dtype] // 8,
        stored_bytes=tensor.num_bytes,
        entry_bytes=2 * _MOST_DIGITS + 100 + 21 * len(tensor.shape),
        zeroed=zeroed,
        scales=scales,
        can_agree=dtype == tensor.dtype and tensor.lies_in_order,
    )


def _entry(placement: Placement) -> tuple[str, str, tuple[int, ...], int]:
    """A tensor's entry in a header, for `encode_header`."""
    kind = placement.origin.kind
    return placement.name, kind.dtype, kind.shape, kind.num_bytes


def _most_entry_bytes(origin: SourceTensor) -> int:
    """An upper bound of the entry's bytes in the header."""
    return origin.kind.entry_bytes + 2 * len(origin.tensor.name)


@dataclass(slots=True)
class _TensorRun:
    """Output tensors from one source shard that keep the source's distances from each other.

    They agree with the source if the first is placed at `entry` modulo the block. `num_agreeing` is
    the number of their bytes that can agree.
    """

    shard: Shard
    entry: int
    copies: _Copies
    num_bytes: int
    num_agreeing: int


def _runs(shard: Shard, copies: _Copies) -> Iterator[_TensorRun]:
    """Split a sequence at each change of the difference between position in source and sequence."""
    shift = begin = begin_offset = offset = num_agreeing = 0
    for place, (tensor, kind, _, _) in enumerate(copies.origins):
        if kind.can_agree:  # else it stays with the run before it
            own_shift = (tensor.start - offset) % BLOCK
            if own_shift != shift or place == 0:
                if place:
                    entry, run = (shift + begin_offset) % BLOCK, copies.part(begin, place)
                    yield _TensorRun(shard, entry, run, offset - begin_offset, num_agreeing)
                shift, begin, begin_offset, num_agreeing = own_shift, place, offset, 0
            num_agreeing += kind.num_bytes
        offset += kind.num_bytes
    entry, run = (shift + begin_offset) % BLOCK, copies.part(begin, len(copies.origins))
    yield _TensorRun(shard, entry, run, offset - begin_offset, num_agreeing)


@dataclass(slots=True)
class _Group:
    """The tensors of one output shard: those that agree with their sources, then the others.

    `header` is an upper bound of the header's bytes.
    """

    agreeing: _Copies = field(default_factory=_Copies)
    others: _Copies = field(default_factory=_Copies)
    num_bytes: int = 0
    header: int = 0

    def has_room(self, num_bytes: int, entry_bytes: int, max_shard_bytes: int) -> bool:
        """Whether a tensor of `num_bytes`, with `entry_bytes` in the header, fits; an empty shard
        takes any tensor.
        """
        header = self.header + entry_bytes
        fits = (
            header + self.num_bytes + num_bytes <= max_shard_bytes - BLOCK
            and header <= _MOST_HEADER_BYTES
        )
        return fits or not self.header

    def add(self, num_bytes: int, entry_bytes: int) -> None:
        """Count a tensor that is added to one of the lists."""
        self.num_bytes += num_bytes
        self.header += entry_bytes


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
        ending = by_end.setdefault(end, [])
        for origin, number in zip(run.copies.origins, run.copies.numbers, strict=True):
            num_bytes, entry_bytes = origin.kind.num_bytes, _most_entry_bytes(origin)
            found = _with_room(ending, num_bytes, entry_bytes, max_shard_bytes)
            if found is None:
                found = _Group()
                groups.append(found)
                ending.append(found)
            group = found
            group.add(num_bytes, entry_bytes)
            group.agreeing.append(origin, number)
            if num_bytes % BLOCK:
                ending.remove(group)
                end = (end + num_bytes) % BLOCK
                ending = by_end.setdefault(end, [])
                ending.append(group)
        of_shard[run.shard.name] = group
    _pack_others(others, groups, of_shard, max_shard_bytes)
    return groups


def _with_room(
    groups: list[_Group], num_bytes: int, entry_bytes: int, max_shard_bytes: int
) -> _Group | None:
    """The shard that takes a tensor: the first that has room, so that few remain nearly full.

    A tensor that is not whole blocks shifts those after it, so it must go to the last shard.
    """
    if len(groups) > _LOOKED_AT:
        del groups[:-_LOOKED_AT]
    for group in groups if num_bytes % BLOCK == 0 else groups[-1:]:
        if group.has_room(num_bytes, entry_bytes, max_shard_bytes):
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
        for origin, number in zip(run.copies.origins, run.copies.numbers, strict=True):
            num_bytes, entry_bytes = origin.kind.num_bytes, _most_entry_bytes(origin)
            if own is not None and own.has_room(num_bytes, entry_bytes, max_shard_bytes):
                own.others.append(origin, number)
                own.add(num_bytes, entry_bytes)
                continue
            while group is None or not group.has_room(num_bytes, entry_bytes, max_shard_bytes):
                group = next(spare, None)
                if group is None:
                    group = _Group()
                    groups.append(group)
            group.others.append(origin, number)
            group.add(num_bytes, entry_bytes)


def _finish(group: _Group) -> ShardLayout:
    copies, num_agreeing = group.agreeing, len(group.agreeing.origins)
    copies.extend(group.others)
    # Every tensor must start at a multiple of its element size. If one does not, the copied tensors
    # are sorted by falling element size, as the library does, and if need be all of them.
    if any(origin.kind.num_bytes % 8 for origin in copies.origins):
        for place in (num_agreeing, 0):
            if is_aligned((o.kind.dtype, o.kind.num_bytes) for o in copies.origins):
                break
            copies = _by_falling_size(copies, place)
    of_each = [origin.kind for origin in copies.origins]
    counts = Counter(map(id, of_each))
    kinds = dict(zip(map(id, of_each), of_each, strict=True))
    metadata: dict[str, str] = {}
    for shard in {kind.shard.name: kind.shard for kind in kinds.values()}.values():
        metadata = {**shard.header.metadata, **metadata}
    metadata = {"format": "pt", **metadata}
    phase = _best_phase(copies.origins)
    shapes = ((kind.dtype, kind.shape, counts[of_kind]) for of_kind, kind in kinds.items())
    sizes = (kind.num_bytes for kind in of_each)
    data_start = header_size(metadata, _name_bytes(copies), shapes, sizes, block=BLOCK, phase=phase)
    if data_start - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"an output shard would need a header of {data_start} bytes, over the format's limit "
            f"of {MAX_HEADER_BYTES}; use a smaller --max-shard-size"
        )
    num_bytes = sum(kind.num_bytes * counts[of_kind] for of_kind, kind in kinds.items())
    return ShardLayout(
        metadata, copies.origins, copies.numbers, phase, data_start, data_start + num_bytes
    )


def _by_falling_size(copies: _Copies, place: int) -> _Copies:
    """The copies with those from `place` on sorted by falling element size."""
    order = [
        *range(place),
        *sorted(
            range(place, len(copies.origins)),
            key=lambda i: -DTYPE_BITS[copies.origins[i].kind.dtype],
        ),
    ]
    return _Copies([copies.origins[i] for i in order], [copies.numbers[i] for i in order])


def _name_bytes(copies: _Copies) -> int:
    """The bytes of all names in a header, without quotes."""
    total = sum(len(str(number)) * times for number, times in Counter(copies.numbers).items())
    for place in range(0, len(copies.origins), _NAMES_AT_ONCE):
        origins = copies.origins[place : place + _NAMES_AT_ONCE]
        total += encoded_bytes("".join([origin.tensor.name for origin in origins]))
        total -= sum([origin.number_end - origin.number or 1 for origin in origins])
    return total  # one without a number was counted with the digit 0


def _best_phase(origins: Iterable[SourceTensor]) -> int:
    """The data start, modulo the block, at which most bytes agree with their source."""
    votes: Counter[int] = Counter({0: 0})
    offset = 0
    for tensor, kind, _, _ in origins:
        if kind.can_agree:
            votes[(tensor.start - offset) % BLOCK] += kind.num_bytes
        offset += kind.num_bytes
    # the format aligns the start of the data to 8 bytes
    return max(
        (phase for phase in votes if phase % 8 == 0), key=lambda phase: (votes[phase], -phase)
    )
