"""In which shard, and in which order, the output's tensors lie, so that most bytes can be cloned.

A file system clones (reflinks) whole blocks only: a tensor can be cloned where its position in the
output agrees with its position in the source modulo the block. safetensors allows no holes between
tensors but does allow spaces after the header, so each output shard has one free choice: the *phase*,
its data start modulo the block. The order does the rest:

- tensors keep the source's order, which keeps their distances; a second copy whose size is a multiple
  of the block goes right behind the first and shifts nothing;
- second copies of other sizes (norms, biases) go to the end of the shard, or to a shard of their own
  where they are most of the bytes (a hidden size that is no multiple of anything);
- a new shard is begun where the phase changes between long runs, which happens where the data of
  another source shard begins.

The layout depends on the checkpoint, the map and the shard size alone, so every machine and every
file system gets the same bytes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

from dus_cli.errors import CheckpointError
from dus_cli.maps.layers import LayerMap, number_span
from dus_cli.maps.stacks import LayerStack
from dus_cli.planning.treatment import Making, Treatment, making_of
from dus_cli.source.checkpoint import Checkpoint, Shard
from dus_cli.source.headers import DTYPE_BITS, MAX_HEADER_BYTES, TensorInfo, encode_header, header_size, is_aligned

# Block of every common file system on x86 and Arm. Larger ones copy what does not agree with theirs.
BLOCK = 4096

# What the tensors' lines in a header may come to: the rest is for metadata and for the padding.
_MOST_HEADER_BYTES = MAX_HEADER_BYTES * 3 // 4

# A run shorter than this part of a shard is not worth a shard of its own.
_WORTH_A_SHARD = 16

# Second copies of odd sizes up to this part of a source shard ride at its end.
_FEW = 64


class Origin(NamedTuple):
    """A base tensor, the shard that holds it, and what all its copies in the output share.

    `dtype` and `num_bytes` are a copy's. `number` to `number_end` are the characters of the name that are its number,
    where copies have another (else both are 0), and `zeroed` the numbers under which it is zeros.
    """

    tensor: TensorInfo
    shard: Shard
    dtype: str
    num_bytes: int
    number: int = 0
    number_end: int = 0
    zeroed: frozenset[int] = frozenset()

    @property
    def can_agree(self) -> bool:
        """Whether position in source and output can agree: a cast tensor has another length, a strided one no order."""
        return self.dtype == self.tensor.dtype and self.tensor.strides is None


class Placement(NamedTuple):
    """An output tensor: a copy of its origin, with `number` for the one in its name if that has one.

    A plan may hold a million of them: what can be worked out is not stored, not even the name.
    """

    origin: Origin
    number: int = 0

    @property
    def name(self) -> str:
        origin = self.origin
        name = origin.tensor.name
        return f"{name[: origin.number]}{self.number}{name[origin.number_end :]}" if origin.number else name

    @property
    def tensor(self) -> TensorInfo:
        """The base's."""
        return self.origin.tensor

    @property
    def shard(self) -> Shard:
        """The base's."""
        return self.origin.shard

    @property
    def dtype(self) -> str:
        return self.origin.dtype

    @property
    def num_bytes(self) -> int:
        """Bytes in the output."""
        return self.origin.num_bytes

    @property
    def making(self) -> Making:
        origin = self.origin
        return Making.zeros if self.number in origin.zeroed else making_of(origin.tensor, origin.dtype)


@dataclass(frozen=True, slots=True)
class Segment:
    """Bytes to move: `length` bytes from `source_start` in a source shard to `start` in an output shard."""

    shard: Shard
    source_start: int
    start: int
    length: int

    @property
    def clonable(self) -> range:
        """The whole blocks inside, as positions in the output; empty where source and output disagree."""
        if (self.source_start - self.start) % BLOCK:
            return range(0)
        first = -(-self.start // BLOCK) * BLOCK
        last = (self.start + self.length) // BLOCK * BLOCK
        return range(first, max(first, last))


@dataclass(frozen=True)
class ShardLayout:
    """An output shard: a header, then the tensors in this order. `num_bytes` is the file's size.

    `phase` is where the data starts, modulo the block. The header is encoded anew whenever it is asked for: those of a
    deep model are hundreds of megabytes.
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
            start += placement.origin.num_bytes

    def segments(self) -> Iterator[Segment]:
        """The bytes to move as they are, neighbours in both files joined: one segment may span many layers."""
        pending: Segment | None = None
        for placement, start in self.positions():
            tensor = placement.tensor
            if placement.making is not Making.copied or tensor.strides is not None or not tensor.num_bytes:
                continue
            if (
                pending is not None
                and pending.shard is placement.shard
                and pending.source_start + pending.length == tensor.start
                and pending.start + pending.length == start
            ):
                pending = Segment(pending.shard, pending.source_start, pending.start, tensor.end - pending.source_start)
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

    A tensor larger than `max_shard_bytes` gets a shard to itself, as in transformers. Without a treatment all
    are copied as they are; zeros stand where the copies would.

    Raises:
        CheckpointError: the map leaves nothing, or a header would pass the format's limit.
    """
    treatment = treatment or Treatment()
    sequences = [s for shard in checkpoint.shards for s in _sequences(shard, stack, layer_map, treatment)]
    placements = [placement for sequence in sequences for placement in sequence]
    num_header_bytes = sum(map(_header_cost, placements))
    num_bytes = sum(origin.num_bytes for origin, _ in placements)
    if num_bytes + num_header_bytes <= max_shard_bytes and num_header_bytes <= _MOST_HEADER_BYTES:
        return (_finish(placements),)
    return tuple(_finish(group) for group in _pack(sequences, max_shard_bytes))


def _sequences(shard: Shard, stack: LayerStack, layer_map: LayerMap, treatment: Treatment) -> Iterator[list[Placement]]:
    """The output tensors that come from one source shard, in orders that keep the source's distances."""
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
    """The tensors of one source shard, and the numbers that their copies have; one copy where there is no number."""
    for tensor in shard.header.tensors:
        dtype = treatment.dtype_of(tensor)
        num_bytes = tensor.num_bytes if dtype == tensor.dtype else tensor.num_elements * DTYPE_BITS[dtype] // 8
        name = tensor.name
        span = number_span(name)
        if span is None:
            yield Origin(tensor, shard, dtype, num_bytes), (0,)
            continue
        start, end = span
        prefix = name[: start - 1]
        zeroed = treatment.zeroed(prefix, name[end + 1 :])
        numbers = stack.output_numbers(prefix, int(name[start:end]), layer_map)
        yield Origin(tensor, shard, dtype, num_bytes, start, end, zeroed), numbers


def _line(placement: Placement) -> tuple[str, str, tuple[int, ...], int]:
    """What a header says of a tensor."""
    origin = placement.origin
    return placement.name, origin.dtype, origin.tensor.shape, origin.num_bytes


def _header_cost(placement: Placement) -> int:
    """An upper bound of the bytes that a tensor adds to its shard's header."""
    origin, number = placement
    length = len(origin.tensor.name)
    if origin.number:
        length += len(str(number)) - (origin.number_end - origin.number)
    return 2 * length + 100 + 21 * len(origin.tensor.shape)


def _runs(sequence: Sequence[Placement]) -> Iterator[list[Placement]]:
    """Split a sequence where the distance between position in source and in sequence changes."""
    offset = value = 0

    def shift(placement: Placement) -> int:
        nonlocal offset, value
        origin = placement.origin
        if origin.can_agree:  # else it stays with the run before it
            value = (origin.tensor.start - offset) % BLOCK
        offset += origin.num_bytes
        return value

    for _, run in groupby(sequence, key=shift):
        yield list(run)


def _pack(sequences: Iterable[Sequence[Placement]], max_shard_bytes: int) -> Iterator[list[Placement]]:
    """Fill shards up to the limit; begin a new one also where the phase changes between long runs."""
    worth_a_shard = max_shard_bytes // _WORTH_A_SHARD
    group: list[Placement] = []
    header = offset = 0  # upper bound of the header's bytes, and where the next tensor's data would start
    phase: int | None = None  # of the long run that this shard was begun for
    for sequence in sequences:
        for run in _runs(sequence):
            # A pickled checkpoint has other data between any two tensors: its phase changes with each.
            is_long = not run[0].shard.is_pickled and (
                sum(origin.num_bytes for origin, _ in run if origin.can_agree) >= worth_a_shard
            )
            shift = (run[0].tensor.start - offset) % BLOCK
            if is_long and group and phase is not None and shift != phase:
                yield group
                group, header, offset, phase = [], 0, 0, None
            for placement in run:
                line, num_bytes = _header_cost(placement), placement.origin.num_bytes
                size = header + offset + line + num_bytes
                if group and (size > max_shard_bytes - BLOCK or header + line > _MOST_HEADER_BYTES):
                    yield group
                    group, header, offset, phase = [], 0, 0, None
                if is_long and phase is None:
                    phase = (placement.tensor.start - offset) % BLOCK
                group.append(placement)
                header += line
                offset += num_bytes
    if group:
        yield group


def _finish(placements: list[Placement]) -> ShardLayout:
    if not is_aligned((origin.dtype, origin.num_bytes) for origin, _ in placements):
        # As the library orders them: then every tensor starts at a multiple of its element.
        placements = sorted(placements, key=lambda p: -DTYPE_BITS[p.dtype])
    metadata: dict[str, str] = {}
    for shard in {origin.shard.name: origin.shard for origin, _ in placements}.values():
        metadata = {**shard.header.metadata, **metadata}
    metadata = {"format": "pt", **metadata}
    phase = _best_phase(placements)
    data_start = header_size(metadata, map(_line, placements), BLOCK, phase)
    if data_start - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"an output shard would need a header of {data_start} bytes, over the format's limit of "
            f"{MAX_HEADER_BYTES}; use a smaller --max-shard-size"
        )
    num_bytes = data_start + sum(origin.num_bytes for origin, _ in placements)
    return ShardLayout(metadata, tuple(placements), phase, data_start, num_bytes)


def _best_phase(placements: Iterable[Placement]) -> int:
    """The data start, modulo the block, at which most bytes agree with their source."""
    votes: Counter[int] = Counter({0: 0})
    offset = 0
    for origin, _ in placements:
        phase = (origin.tensor.start - offset) % BLOCK
        if phase % 8 == 0 and origin.can_agree:  # the format's alignment of the data start
            votes[phase] += origin.num_bytes
        offset += origin.num_bytes
    return max(votes, key=lambda phase: (votes[phase], -phase))
