"""The parts of the benchmark that run in child processes: make sources, copy with a plain loop,
compare two outputs.

Run by upscale.py as `python chores.py NAME ARGUMENTS…` with the repository and its tests on
PYTHONPATH. A child's peak RSS starts at its parent's, so everything that needs memory is done here,
and the parent stays small.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import checkpoints

from dus_cli.common.reference import ModelRef
from dus_cli.planning.plan import Base, MapRequest, make_plan
from dus_cli.source.checkpoint import open_checkpoint
from dus_cli.source.headers import TensorInfo, read_header

_PIECE = 8 << 20
_READ = 4 << 20


def make_mistral(folder: str, num_layers: str, hidden: str) -> None:
    checkpoints.write_mistral(Path(folder), int(num_layers), int(hidden))


def make_many_shards(folder: str) -> None:
    """100,003 tensors of 128 bytes in 1,000 shards: 100 layers of 333 experts, as large mixtures
    have them.
    """
    tensors: list[checkpoints.Tensor] = [("model.embed_tokens.weight", "BF16", (8, 8))]
    for layer in range(100):
        prefix = f"model.layers.{layer}"
        tensors.append((f"{prefix}.input_layernorm.weight", "BF16", (64,)))
        tensors += [
            (f"{prefix}.mlp.experts.{expert}.{name}.weight", "BF16", (8, 8))
            for expert in range(333)
            for name in ("down_proj", "gate_proj", "up_proj")
        ]
    tensors += [("model.norm.weight", "BF16", (64,)), ("lm_head.weight", "BF16", (8, 8))]
    config = checkpoints.llama_config(100, 8, 8, 8)
    checkpoints.write_checkpoint(
        Path(folder), tensors, config, num_shards=1000, fill=checkpoints.fill_randomly
    )


def make_many_layers(folder: str, num_layers: str) -> None:
    """A model with nine tiny tensors in each layer."""
    tensors = checkpoints.llama_tensors(int(num_layers), 16, 32, 8, 32)
    config = checkpoints.llama_config(int(num_layers), 16, 32, 32)
    checkpoints.write_checkpoint(Path(folder), tensors, config, fill=checkpoints.fill_randomly)


def loop(source: str, trim: str, output: str) -> None:
    """Write the shards that dus writes with one thread, in pieces of 8 MiB through the page cache,
    and fsync each.
    """
    ref = ModelRef.parse(source)
    plan = make_plan(Base(ref), open_checkpoint(Path(source)), MapRequest(trim=int(trim)))
    Path(output).mkdir()
    buffer = memoryview(bytearray(_PIECE))
    readers = {shard.name: os.open(shard.path, os.O_RDONLY) for shard in plan.checkpoint.shards}
    writers = []
    for name, layout in plan.shards.items():
        writer = os.open(Path(output, name), os.O_WRONLY | os.O_CREAT | os.O_EXCL)
        writers.append(writer)
        os.pwrite(writer, layout.header, 0)
        for segment in layout.segments():
            position = 0
            while position < segment.length:
                piece = buffer[: segment.length - position]
                count = os.preadv(
                    readers[segment.shard.name], [piece], segment.source_start + position
                )
                assert count
                position += os.pwrite(writer, piece[:count], segment.start + position)
    started = time.monotonic()
    for writer in writers:
        os.fsync(writer)
    print(json.dumps({"fsync_seconds": time.monotonic() - started}))


def read(jobs: str, *folders: str) -> None:
    """Read the weights of folders once, past the page cache, in pieces of 4 MiB, and do nothing
    else.
    """
    pieces = [
        (path, start)
        for folder in folders
        for path in sorted(Path(folder).glob("*.safetensors"))
        for start in range(0, path.stat().st_size, _READ)
    ]
    rooms = threading.local()

    def one(piece: tuple[Path, int]) -> int:
        if not hasattr(rooms, "room"):
            rooms.room, rooms.files = memoryview(mmap.mmap(-1, _READ)), {}
        path, start = piece
        if path not in rooms.files:
            rooms.files[path] = os.open(path, os.O_RDONLY | os.O_DIRECT)
        return os.preadv(rooms.files[path], [rooms.room], start)

    with ThreadPoolExecutor(int(jobs)) as pool:
        print(json.dumps({"bytes": sum(pool.map(one, pieces))}))


class _Place(NamedTuple):
    path: Path
    tensor: TensorInfo


def _places(folder: Path) -> dict[str, _Place]:
    paths = sorted(folder.glob("*.safetensors"))
    return {
        tensor.name: _Place(path, tensor) for path in paths for tensor in read_header(path).tensors
    }


def _equal(left: _Place, right: _Place) -> bool:
    a, b = left.tensor, right.tensor
    if (a.dtype, a.shape, a.num_bytes) != (b.dtype, b.shape, b.num_bytes):
        return False
    with left.path.open("rb", buffering=0) as one, right.path.open("rb", buffering=0) as other:
        for position in range(0, a.num_bytes, _PIECE):
            size = min(_PIECE, a.num_bytes - position)
            if os.pread(one.fileno(), size, a.start + position) != os.pread(
                other.fileno(), size, b.start + position
            ):
                return False
    return True


def compare(left: str, right: str) -> None:
    """Compare two outputs tensor by tensor, byte by byte, in any order and shards; exit 1 on any
    difference.
    """
    a, b = _places(Path(left)), _places(Path(right))
    different = sorted(a.keys() ^ b.keys()) + [
        name for name in sorted(a.keys() & b.keys()) if not _equal(a[name], b[name])
    ]
    num_bytes = sum(place.tensor.num_bytes for place in a.values())
    if different or not a:
        sys.exit(
            f"{len(different)} tensors differ or stand on one side only: {', '.join(different[:5])}"
        )
    print(f"{len(a)} of {len(a)} tensors equal, byte by byte ({num_bytes:,} bytes)")


if __name__ == "__main__":
    {
        function.__name__: function
        for function in (make_mistral, make_many_shards, make_many_layers, loop, read, compare)
    }[sys.argv[1]](*sys.argv[2:])
