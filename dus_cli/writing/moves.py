"""What each source shard has to give, and where in the output it is wanted."""

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
    """`length` bytes at `source_start`, wanted at each of `targets`: (output file's name,
    position).

    They are copied as they are, or with `cast` as other numbers, and for each target times what
    `scales` has at its place, if anything; then they are those of the tensor `name`. `strided` is
    the tensor whose bytes they are where these do not lie in order. With `blocks` they are whole
    rows, of which the blocks are wanted.
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
        """Whether some target gets other bytes than the source has."""
        return self.cast is not None or bool(self.scales) or self.blocks is not None

    @property
    def number_size(self) -> int:
        """Bytes of the source's numbers, or rows, which stay whole; 1 where bytes are moved as they
        are.
        """
        if self.blocks is not None:
            return self.blocks.stored_row
        if self.cast is not None:
            return self.cast.source_size
        return next((scale.size for scale in self.scales if scale is not None), 1)

    def by_scale(self) -> dict[Scale | None, list[tuple[str, int]]]:
        """The targets that get the same numbers."""
        found: dict[Scale | None, list[tuple[str, int]]] = {}
        for target, scale in zip(
            self.targets, self.scales or (None,) * len(self.targets), strict=True
        ):
            found.setdefault(scale, []).append(target)
        return found

    def to(self, as_they_are: Sequence[tuple[str, int]]) -> Move:
        """The move to these of the targets that get the bytes as they are, and to all that get
        them scaled.
        """
        pairs = [
            (target, scale)
            for target, scale in zip(self.targets, self.scales, strict=False)
            if scale is not None
        ]
        targets = (*as_they_are, *(target for target, _ in pairs))
        scales = (*[None] * len(as_they_are), *(scale for _, scale in pairs)) if pairs else ()
        return self._replace(targets=targets, scales=scales)

    def written(self, length: int) -> int:
        """How many bytes the first `length` ones are in the output."""
        if self.blocks is not None:
            length = length // self.blocks.stored_row * self.blocks.row
        return (
            length if self.cast is None else length // self.cast.source_size * self.cast.target_size
        )

    def part(self, position: int, length: int) -> Move:
        """The move of `length` of its bytes from `position` on."""
        targets = tuple((name, start + self.written(position)) for name, start in self.targets)
        return self._replace(
            source_start=self.source_start + position, length=length, targets=targets
        )

    def to_block(self, position: int) -> int:
        """Bytes from `position` on up to the next whole block of the source, where direct I/O is
        possible.

        0 also where numbers do not start at multiples of their size: no block begins with a whole
        one then.
        """
        if self.source_start % self.number_size:
            return 0
        return -(self.source_start + position) % BLOCK


def moves(plan: UpscalePlan) -> Iterator[tuple[Shard, list[Move]]]:
    """What each source shard has to give, in its own order; neighbours that stay neighbours are one
    move.

    Zeros need no move: a file is as long as planned, and zeros, before anything is moved into it.
    """
    tensors: dict[str, TensorInfo] = {}
    wanted: dict[str, list[tuple[str, int]]] = {}
    scales: dict[str, list[Scale | None]] = {}
    casts: dict[str, Cast] = {}
    for file_name, layout in plan.shards.items():
        for placement, start in layout.positions():
            if placement.making is Making.zeros:
                continue
            tensors[placement.tensor.name] = placement.tensor
            wanted.setdefault(placement.tensor.name, []).append((file_name, start))
            scales.setdefault(placement.tensor.name, []).append(placement.scale)
            if placement.dtype != placement.tensor.dtype:
                casts[placement.tensor.name] = Cast(placement.tensor.dtype, placement.dtype)
    for shard in plan.checkpoint.shards:
        joined: list[Move] = []
        for stored in shard.header.tensors:
            tensor = tensors.get(stored.name, stored)
            targets = tuple(wanted.get(tensor.name, ()))
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
    """The moves by which a tensor is made of blocks: one of rows, or where these are long one for
    each block of each, to every place where it is wanted.
    """
    if blocks.num_rows > 1 and max(blocks.row, blocks.stored_row) <= PIECE:
        yield whole._replace(blocks=blocks)
        return
    places: dict[int, list[int]] = {}
    for place, block in enumerate(blocks.order):
        places.setdefault(block, []).append(place)
    size = whole.written(blocks.num_bytes)
    for row in range(blocks.num_rows):
        for block, wanted in sorted(places.items()):
            targets = tuple(
                (name, start + (row * len(blocks.order) + place) * size)
                for name, start in whole.targets
                for place in wanted
            )
            start = whole.source_start + row * blocks.stored_row + block * blocks.num_bytes
            yield whole._replace(
                source_start=start, length=blocks.num_bytes, targets=targets, strided=None
            )
