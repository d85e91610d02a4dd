"""Ways to copy bytes if the file system cannot clone, to choose one for `dus_cli.writing.transfer`.

    PYTHONPATH=. python tests/benchmarks/strategies.py MODEL --work DIR

Each way writes the shards of `dus upscale MODEL` into DIR, from a cold page cache, with an fsync of
each file at the end, and removes them. Only whole blocks that are aligned in source and target are
moved (nearly all of an ordinary model), so that all ways do the same work.
"""

from __future__ import annotations

import argparse
import contextlib
import mmap
import os
import shutil
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dus_cli.common.reference import ModelRef
from dus_cli.planning.plan import Base, MapRequest, UpscalePlan, make_plan
from dus_cli.source.checkpoint import open_checkpoint

# source, target, source position, position, length
Copy = Callable[[int, int, int, int, int], None]
MOVE = 64 << 20


def buffered(piece: int) -> Copy:
    """Copy by pread and pwrite through a buffer of `piece` bytes; with O_DIRECT files this is
    direct I/O.
    """

    def copy(source: int, target: int, source_start: int, start: int, length: int) -> None:
        buffer = memoryview(mmap.mmap(-1, piece))
        done = 0
        while done < length:
            count = os.preadv(source, [buffer[: min(piece, length - done)]], source_start + done)
            os.pwrite(target, buffer[:count], start + done)
            done += count

    return copy


def in_kernel(source: int, target: int, source_start: int, start: int, length: int) -> None:
    """copy_file_range: the kernel moves the bytes between page caches."""
    done = 0
    while done < length:
        done += os.copy_file_range(source, target, length - done, source_start + done, start + done)


STRATEGIES: dict[str, tuple[Copy, int, int]] = {  # flags of source, of target
    "read/write, 8 MiB": (buffered(8 << 20), 0, 0),
    "read/write, 1 MiB": (buffered(1 << 20), 0, 0),
    "copy_file_range": (in_kernel, 0, 0),
    "buffered read, direct write": (buffered(4 << 20), 0, os.O_DIRECT),
    "direct read and write": (buffered(4 << 20), os.O_DIRECT, os.O_DIRECT),
}


def run(
    plan: UpscalePlan, work: Path, copy: Copy, flags: tuple[int, int], jobs: int
) -> tuple[float, float]:
    """The wall and CPU seconds of a strategy."""
    os.sync()
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
    time.sleep(5)
    folder = work / "strategy"
    folder.mkdir()
    started, cpu = time.perf_counter(), time.process_time()
    with contextlib.ExitStack() as closing, ThreadPoolExecutor(jobs) as pool:
        moves, targets = [], []
        for name, layout in plan.shards.items():
            target = os.open(folder / name, os.O_RDWR | os.O_CREAT | flags[1], 0o666)
            closing.callback(os.close, target)
            os.ftruncate(target, layout.num_bytes)
            targets.append(target)
            for segment in layout.segments():
                source = os.open(segment.shard.path, os.O_RDONLY | flags[0])
                closing.callback(os.close, source)
                shift, blocks = segment.source_start - segment.start, segment.clonable
                starts = range(blocks.start, blocks.stop, MOVE)
                moves += [
                    (source, target, at + shift, at, min(MOVE, blocks.stop - at)) for at in starts
                ]
        list(pool.map(lambda move: copy(*move), moves))
        list(pool.map(os.fsync, targets))
    result = time.perf_counter() - started, time.process_time() - cpu
    shutil.rmtree(folder)
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model")
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--jobs", default="1,4")
    options = parser.parse_args()
    folder = Path(options.model)
    plan = make_plan(
        Base(ModelRef(options.model, path=folder)), open_checkpoint(folder), MapRequest()
    )
    print("| strategy | threads | s | CPU s |\n|---|---|---|---|", flush=True)
    for name, (copy, *flags) in STRATEGIES.items():
        for jobs in map(int, options.jobs.split(",")):
            seconds, cpu = run(plan, options.work, copy, (flags[0], flags[1]), jobs)
            print(f"| {name} | {jobs} | {seconds:.1f} | {cpu:.1f} |", flush=True)


if __name__ == "__main__":
    main()
