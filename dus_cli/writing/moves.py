"""The plan by source shard: which bytes of each go where in the output."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from dus_cli.common.workers import PIECE
from dus_cli.planning.dtypes import Cast
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.scaling import Scale
from dus_cli.planning.treatment import Making
from dus_cli.source.checkpoint import Shard
from dus_cli.source.headers import Blocks, TensorInfo


class Move(NamedTuple):
    """`length` bytes of a source shard that go to one or more places in the output.

    Attributes:
        source_start: position of the first byte in the source shard.
        length: in bytes.
        targets: (name of the output shard, position) of each copy.
        cast: the conversion of their numbers, or None.
        name: the tensor, if the bytes are cast or scaled.
        strided: the tensor, if its bytes are not in row-major order.
        scales: for each target its factor, or None; empty if no target has one.
        blocks: the parts of each row that are copied, if the bytes are whole rows; else None.
    """

    source_start: int
    length: int
    targets: tuple[tuple[str, int], ...]
    cast: Cast | None = None
    name: str = ""
    strided: TensorInfo | None = None
    scales: tuple[Scale | None, ...] = ()
    blocks: Blocks | None = None

    @property
    def is_changed(self) -> bool:
        """Whether some target gets other bytes than the source's."""
        return self.cast is not None or bool(self.scales) or self.blocks is not None

    @property
    def number_size(self) -> int:
        """Bytes of one of the source's numbers or rows, which must not be cut; 1 for a plain
        copy.
        """
        if self.blocks is not None:
            return self.blocks.stored_row
        if self.cast is not None:
            return self.cast.source_size
        return next((scale.size for scale in self.scales if scale is not None), 1)

    def by_scale(self) -> dict[Scale | None, list[tuple[str, int]]]:
        """The targets, grouped by their factor."""
        groups: dict[Scale | None, list[tuple[str, int]]] = {}
        for target, scale in zip(
            self.targets, self.scales or (None,) * len(self.targets), strict=True
        ):
            groups.setdefault(scale, []).append(target)
        return groups

    def to(self, as_they_are: Sequence[tuple[str, int]]) -> Move:
        """The same move, but of the targets without a factor only to those in `as_they_are`."""
        pairs = [
            (target, scale)
            for target, scale in zip(self.targets, self.scales, strict=False)
            if scale is not None
        ]
        targets = (*as_they_are, *(target for target, _ in pairs))
        scales = (*[None] * len(as_they_are), *(scale for _, scale in pairs)) if pairs else ()
        return self._replace(targets=targets, scales=scales)

    def written(self, length: int) -> int:
        """How many bytes of output `length` bytes of the source become."""
        if self.blocks is not None:
            length = length // self.blocks.stored_row * self.blocks.row
        return (
            length if self.cast is None else length // self.cast.source_size * self.cast.target_size
        )

    def part(self, position: int, length: int) -> Move:
        """The move of `length` of its bytes, from `position`."""
        targets = tuple((name, start + self.written(position)) for name, start in self.targets)
        return self._replace(
            source_start=self.source_start + position, length=length, targets=targets
        )

    def to_block(self, position: int) -> int:
        """Bytes from `position` to the next block of the source, from which direct I/O is possible.

        Also 0 if the numbers do not start at multiples of their size: then no block begins with a
        whole number.
        """
        if self.source_start % self.number_size:
            return 0
        return -(self.source_start + position) % BLOCK


def moves(plan: UpscalePlan) -> Iterator[tuple[Shard, list[Move]]]:
    """The moves of each source shard, in the shard's order.

    Tensors that are adjacent in the source and in every target are one move. Zeros need no move:
    the output's files have their full length, and are zeros, from the start.
    """
    tensors: dict[str, TensorInfo] = {}
    targets_of: dict[str, list[tuple[str, int]]] = {}
    scales: dict[str, list[Scale | None]] = {}
    casts: dict[str, Cast] = {}
    for file_name, layout in plan.shards.items():
        for placement, start in layout.positions():
            if placement.making is Making.zeros:
                continue
            if placement.tensor.blocks is not None:
                tensors[placement.tensor.name] = placement.tensor
            targets_of.setdefault(placement.tensor.name, []).append((file_name, start))
            scales.setdefault(placement.tensor.name, []).append(placement.scale)
            if placement.dtype != placement.tensor.dtype:
                casts[placement.tensor.name] = Cast(placement.tensor.dtype, placement.dtype)
    for shard in plan.checkpoint.shards:
        joined: list[Move] = []
        for stored in shard.header.tensors:
            tensor = tensors.get(stored.name, stored)
            targets = tuple(targets_of.get(tensor.name, ()))
            if not targets or not tensor.num_bytes:
                continue
            cast, strided = casts.get(tensor.name), None if tensor.lies_in_order else tensor
            by_target = tuple(scales[tensor.name]) if any(scales[tensor.name]) else ()
            if tensor.blocks is not None:
                whole = Move(tensor.start, stored.num_bytes, targets, cast, tensor.name, tensor)
                joined += _of_blocks(whole, tensor.blocks)
                continue
            if cast is not None or strided is not None or by_target:
                joined.append(
                    Move(
                        tensor.start,
                        tensor.num_bytes,
                        targets,
                        cast=cast,
                        name=tensor.name,
                        strided=strided,
                        scales=by_target,
                    )
                )
                continue
            last = joined[-1] if joined else None
            if (
                last is not None
                and not last.is_changed
                and last.strided is None
                and last.source_start + last.length == tensor.start
                and targets == tuple((name, start + last.length) for name, start in last.targets)
            ):
                joined[-1] = last._replace(length=last.length + tensor.num_bytes)
            else:
                joined.append(Move(tensor.start, tensor.num_bytes, targets))
        yield shard, joined


def _of_blocks(whole: Move, blocks: Blocks) -> Iterator[Move]:
    """The moves that compose a tensor of blocks: one move of whole rows, or, if rows are long, one
    for each block of each row, to every place where the output has that block.
    """
    if blocks.num_rows > 1 and max(blocks.row, blocks.stored_row) <= PIECE:
        yield whole._replace(blocks=blocks)
        return
    places: dict[int, list[int]] = {}
    for place, block in enumerate(blocks.order):
        places.setdefault(block, []).append(place)
    size = whole.written(blocks.num_bytes)
    for row in range(blocks.num_rows):
        for block, block_places in sorted(places.items()):
            targets = tuple(
                (name, start + (row * len(blocks.order) + place) * size)
                for name, start in whole.targets
                for place in block_places
            )
            start = whole.source_start + row * blocks.stored_row + block * blocks.num_bytes
            yield whole._replace(
                source_start=start, length=blocks.num_bytes, targets=targets, strided=None
            )
