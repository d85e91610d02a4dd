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
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby

from dus_cli.errors import CheckpointError
from dus_cli.maps.layers import LayerMap
from dus_cli.maps.stacks import LayerStack
from dus_cli.planning.treatment import Making, Treatment
from dus_cli.source.checkpoint import Checkpoint, Shard
from dus_cli.source.headers import DTYPE_BITS, MAX_HEADER_BYTES, TensorInfo, encode_header, is_aligned

# Block of every common file system on x86 and Arm. Larger ones copy what does not agree with theirs.
BLOCK = 4096

# What the tensors' lines in a header may come to: the rest is for metadata and for the padding.
_MOST_HEADER_BYTES = MAX_HEADER_BYTES * 3 // 4

# A run shorter than this part of a shard is not worth a shard of its own.
_WORTH_A_SHARD = 16

# Second copies of odd sizes up to this part of a source shard ride at its end.
_FEW = 64


@dataclass(frozen=True, slots=True)
class Placement:
    """An output tensor: its name and dtype, the base tensor that it comes from, the shard that holds that, and how.

    `num_bytes` are those in the output: stored, because a plan of 100,000 layers asks for them millions of times.
    """

    name: str
    tensor: TensorInfo
    shard: Shard
    making: Making
    dtype: str
    num_bytes: int

    @property
    def can_agree(self) -> bool:
        """Whether position in source and output can agree: a cast tensor has another length, a strided one no order."""
        return self.dtype == self.tensor.dtype and self.tensor.strides is None


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
    """An output shard: its encoded header, then the tensors in this order. `num_bytes` is the file's size."""

    header: bytes
    placements: tuple[Placement, ...]
    num_bytes: int

    def positions(self) -> Iterator[tuple[Placement, int]]:
        """Every tensor with its position in the file."""
        start = len(self.header)
        for placement in self.placements:
            yield placement, start
            start += placement.num_bytes

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
    num_bytes = sum(placement.num_bytes for placement in placements)
    if num_bytes + num_header_bytes <= max_shard_bytes and num_header_bytes <= _MOST_HEADER_BYTES:
        return (_finish(placements),)
    return tuple(_finish(group) for group in _pack(sequences, max_shard_bytes))


def _sequences(shard: Shard, stack: LayerStack, layer_map: LayerMap, treatment: Treatment) -> Iterator[list[Placement]]:
    """The output tensors that come from one source shard, in orders that keep the source's distances."""
    waiting = [(tensor, stack.output_names(tensor.name, layer_map)) for tensor in shard.header.tensors]
    sequence: list[Placement] = []
    size = done = 0  # bytes of the sequence; copies of each waiting tensor that are placed
    while waiting:
        later: list[tuple[TensorInfo, tuple[str, ...]]] = []
        for tensor, names in waiting:
            stop = len(names) if tensor.num_bytes % BLOCK == 0 else done + 1
            dtype = treatment.dtype_of(tensor)
            num_bytes = tensor.num_elements * DTYPE_BITS[dtype] // 8
            placed = [
                Placement(name, tensor, shard, treatment.making(name, tensor), dtype, num_bytes)
                for name in names[done:stop]
            ]
            sequence.extend(placed)
            size += tensor.num_bytes * len(placed)
            if len(names) > stop:
                later.append((tensor, names))
        waiting, done = later, done + 1
        if sum(tensor.num_bytes for tensor, _ in later) * _FEW > size:
            yield sequence
            sequence, size = [], 0
    if sequence:
        yield sequence


def _header_cost(placement: Placement) -> int:
    """An upper bound of the bytes that a tensor adds to its shard's header."""
    return 2 * len(placement.name) + 100 + 21 * len(placement.tensor.shape)


def _runs(sequence: Sequence[Placement]) -> Iterator[list[Placement]]:
    """Split a sequence where the distance between position in source and in sequence changes."""
    offset = value = 0

    def shift(placement: Placement) -> int:
        nonlocal offset, value
        if placement.can_agree:  # else it stays with the run before it
            value = (placement.tensor.start - offset) % BLOCK
        offset += placement.num_bytes
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
                sum(placement.num_bytes for placement in run if placement.can_agree) >= worth_a_shard
            )
            shift = (run[0].tensor.start - offset) % BLOCK
            if is_long and group and phase is not None and shift != phase:
                yield group
                group, header, offset, phase = [], 0, 0, None
            for placement in run:
                line = _header_cost(placement)
                size = header + offset + line + placement.num_bytes
                if group and (size > max_shard_bytes - BLOCK or header + line > _MOST_HEADER_BYTES):
                    yield group
                    group, header, offset, phase = [], 0, 0, None
                if is_long and phase is None:
                    phase = (placement.tensor.start - offset) % BLOCK
                group.append(placement)
                header += line
                offset += placement.num_bytes
    if group:
        yield group


def _finish(placements: list[Placement]) -> ShardLayout:
    if not is_aligned((p.dtype, p.num_bytes) for p in placements):
        # As the library orders them: then every tensor starts at a multiple of its element.
        placements = sorted(placements, key=lambda p: -DTYPE_BITS[p.dtype])
    metadata: dict[str, str] = {}
    for shard in {p.shard.name: p.shard for p in placements}.values():
        metadata = {**shard.header.metadata, **metadata}
    header = encode_header(
        {"format": "pt", **metadata},
        ((p.name, p.dtype, p.tensor.shape, p.num_bytes) for p in placements),
        BLOCK,
        _best_phase(placements),
    )
    if len(header) - 8 > MAX_HEADER_BYTES:
        raise CheckpointError(
            f"an output shard would need a header of {len(header)} bytes, over the format's limit of "
            f"{MAX_HEADER_BYTES}; use a smaller --max-shard-size"
        )
    num_bytes = len(header) + sum(placement.num_bytes for placement in placements)
    return ShardLayout(header, tuple(placements), num_bytes)


def _best_phase(placements: Iterable[Placement]) -> int:
    """The data start, modulo the block, at which most bytes agree with their source."""
    votes: Counter[int] = Counter({0: 0})
    offset = 0
    for placement in placements:
        phase = (placement.tensor.start - offset) % BLOCK
        if placement.can_agree and phase % 8 == 0:  # the format's alignment of the data start
            votes[phase] += placement.num_bytes
        offset += placement.num_bytes
    return max(votes, key=lambda phase: (votes[phase], -phase))
