"""Write shards from their first byte to their last: for file systems that allow nothing else, and
to compute their SHA-256 meanwhile.

One thread writes a shard. A tensor that is in the output twice is read twice. `transfer` reads it
once, but writes in the source's order, in which a file's SHA-256 cannot be computed.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from dus_cli.common.files import writing
from dus_cli.common.workers import Workers, workers
from dus_cli.errors import CheckpointError, shown
from dus_cli.planning.layout import Placement, ShardLayout
from dus_cli.planning.plan import UpscalePlan
from dus_cli.planning.treatment import made_pieces
from dus_cli.source.checkpoint import Shard
from dus_cli.source.reading import open_descriptor, unreadable
from dus_cli.writing.ordered import OrderedFile
from dus_cli.writing.outputs import ByteCounts
from dus_cli.writing.transfer import DEFAULT_JOBS, check_unchanged


def transfer_in_order(
    plan: UpscalePlan,
    folder: Path,
    *,
    jobs: int = DEFAULT_JOBS,
    before_shard: Callable[[], object] = lambda: None,
    on_bytes: Callable[[int], object] = lambda _: None,
    sums: dict[str, str] | None = None,
    direct: bool = False,
) -> ByteCounts:
    """Write every shard of the plan into `folder`, `jobs` at a time, each in order.

    Each job takes two pieces of 4 MiB and two buffers of 1 MiB of memory. Errors of close(2) are
    raised, because a store may report a failed write only there.

    Args:
        plan: what to write.
        folder: where to write; the files must not exist.
        jobs: number of files that are written at the same time.
        before_shard: called before each file, from several threads; an exception ends the run.
        on_bytes: called with numbers of bytes of tensor data written, from several threads.
        sums: receives the SHA-256 of each file by its name, hexadecimal; None computes none.
        direct: use direct I/O if the file system allows.

    Raises:
        CheckpointError: a source shard is unreadable, or changed since its header was read; or a
            finite number is out of the range of the dtype that it is cast to.
        MissingExtraError: a cast needs torch, and it is not installed.
        OutputError: writing failed.
    """
    plan.check_libraries()
    with workers(jobs) as team:

        def write(name: str) -> None:
            if not team.stop.is_set():
                before_shard()
                total = _write_shard(
                    folder / name, name, plan.shards[name], team, on_bytes, direct=direct
                )
                if sums is not None:
                    sums[name] = total

        list(team.pool.map(write, plan.shards))
    for shard in plan.checkpoint.shards:
        check_unchanged(shard)
    tally = ByteCounts()
    for placement in plan.placements:
        way = placement.making.value
        setattr(tally, way, getattr(tally, way) + placement.num_bytes)
    return tally


def _write_shard(
    path: Path,
    name: str,
    layout: ShardLayout,
    team: Workers,
    on_bytes: Callable[[int], object],
    *,
    direct: bool,
) -> str:
    """Write one file; return its SHA-256, which is not valid after `team.stop` was set."""
    with writing(name), contextlib.ExitStack() as closing:
        source: Shard | None = None
        file = -1
        with OrderedFile(path, direct=direct) as target:
            target.write(layout.header)
            for placement in layout.placements:
                if placement.shard is not source:
                    closing.close()  # one source at a time: a file may need a thousand
                    source, file = placement.shard, _open(placement.shard, closing)
                for piece in _pieces(placement, file):
                    if team.stop.is_set():
                        return ""
                    target.write(piece)
                    on_bytes(len(piece))
            return target.finish()
    raise AssertionError  # not reached: `writing` suppresses no error


def _open(shard: Shard, closing: contextlib.ExitStack) -> int:
    try:
        file = open_descriptor(shard.path, os.O_RDONLY)
    except OSError as error:
        raise unreadable(shard.name, error) from error
    closing.callback(os.close, file)
    return file


def _pieces(placement: Placement, file: int) -> Iterator[bytes | memoryview]:
    """The bytes of an output tensor, complete."""
    num_bytes = 0
    try:
        making = placement.making
        for piece in made_pieces(file, placement.tensor, making, placement.dtype, placement.scale):
            num_bytes += len(piece)
            yield piece
    except OSError as error:
        raise unreadable(placement.shard.name, error) from error
    if num_bytes != placement.num_bytes:
        raise CheckpointError(
            f"{shown(placement.shard.name)} became shorter while it was read; copy or download it "
            "again"
        )
