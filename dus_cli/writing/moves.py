"""What each source shard has to give, and where in the output it is wanted."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from dus_cli.planning.dtypes import Cast
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.treatment import Making
from dus_cli.source.checkpoint import Shard
from dus_cli.source.headers import TensorInfo


class Move(NamedTuple):
    """`length` bytes at `source_start`, wanted at each of `targets`: (output file's name, position).

    They are copied as they are, or with `cast` as other numbers; then they are those of the tensor `name`.
    `strided` is the tensor whose bytes they are where these do not lie in order.
    """

    source_start: int
    length: int
    targets: tuple[tuple[str, int], ...]
    cast: Cast | None = None
    name: str = ""
    strided: TensorInfo | None = None

    def written(self, length: int) -> int:
        """How many bytes the first `length` ones are in the output."""
        return length if self.cast is None else length // self.cast.source_size * self.cast.target_size

    def part(self, position: int, length: int) -> Move:
        """The move of `length` of its bytes from `position` on."""
        targets = tuple((name, start + self.written(position)) for name, start in self.targets)
        return self._replace(source_start=self.source_start + position, length=length, targets=targets)

    def to_block(self, position: int) -> int:
        """Bytes from `position` on up to the next whole block of the source, where direct I/O is possible.

        0 also where numbers do not start at multiples of their size: no block begins with a whole one then.
        """
        if self.cast is not None and self.source_start % self.cast.source_size:
            return 0
        return -(self.source_start + position) % BLOCK


def moves(plan: UpscalePlan) -> Iterator[tuple[Shard, list[Move]]]:
    """What each source shard has to give, in its own order; neighbours that stay neighbours are one move.

    Zeros need no move: a file is as long as planned, and zeros, before anything is moved into it.
    """
    wanted: dict[str, list[tuple[str, int]]] = {}
    casts: dict[str, Cast] = {}
    for file_name, layout in plan.shards.items():
        for placement, start in layout.positions():
            if placement.making is Making.zeros:
                continue
            wanted.setdefault(placement.tensor.name, []).append((file_name, start))
            if placement.making is Making.cast:
                casts[placement.tensor.name] = Cast(placement.tensor.dtype, placement.dtype)
    for shard in plan.checkpoint.shards:
        joined: list[Move] = []
        for tensor in shard.header.tensors:
            targets = tuple(wanted.get(tensor.name, ()))
            if not targets or not tensor.num_bytes:
                continue
            cast, strided = casts.get(tensor.name), tensor if tensor.strides is not None else None
            if cast is not None or strided is not None:
                joined.append(Move(tensor.start, tensor.num_bytes, targets, cast, tensor.name, strided))
                continue
            last = joined[-1] if joined else None
            if (
                last is not None
                and last.cast is None
                and last.strided is None
                and last.source_start + last.length == tensor.start
                and targets == tuple((name, start + last.length) for name, start in last.targets)
            ):
                joined[-1] = last._replace(length=last.length + tensor.num_bytes)
            else:
                joined.append(Move(tensor.start, tensor.num_bytes, targets))
        yield shard, joined
