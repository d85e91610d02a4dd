"""Time, memory and cloned bytes of `dus upscale --start` against plain copies, in pairs in one run.

    python tests/benchmarks/starts.py FOLDER [--layers 8] [--rounds 3]

The base has `--layers` layers of Mistral 7B's shape with random numbers; a quarter of them is
trimmed. Starts take turns in an order that changes with each round, each in a process of its own
followed by a `sync`; ratios are formed within a round. On a file system with reflinks the cloned
share of the output is printed; `--copy` forbids cloning.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import llama_config, llama_tensors, write_checkpoint

STARTS = ("copy", "half", "fade")
HIDDEN, INTERMEDIATE, KV, VOCABULARY = 4096, 14336, 1024, 32000


# A process's peak is at least that of the process it came from, so a small one stands between.
_MEASURE = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    "print(); print(code, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
)


class Measured(NamedTuple):
    seconds: float
    peak_bytes: int
    cloned: float  # share of the output


def write_base(folder: Path, num_layers: int) -> Path:
    """A Mistral with this many layers, with random bf16 numbers of ordinary size."""
    tensors = llama_tensors(num_layers, HIDDEN, INTERMEDIATE, KV, VOCABULARY)
    config = llama_config(num_layers, HIDDEN, INTERMEDIATE, VOCABULARY)
    base = write_checkpoint(folder / "base", tensors, config)
    random = np.random.default_rng(0)
    for shard in base.glob("*.safetensors"):
        with shard.open("r+b") as file:
            start = 8 + int.from_bytes(file.read(8), "little")
            file.seek(start)
            for at in range(start, shard.stat().st_size, 1 << 24):
                count = min(1 << 24, shard.stat().st_size - at) // 2
                numbers = random.standard_normal(count, dtype=np.float32) * 0.02
                file.write((numbers.view(np.uint32) >> 16).astype(np.uint16).tobytes())
    return base


def measure(base: Path, out: Path, start: str, trim: int, more: list[str]) -> Measured:
    command = [sys.executable, "-m", "dus_cli", "upscale", str(base), "--trim", str(trim)]
    command += ["--start", start, "-o", str(out), "--json", *more]
    began = time.monotonic()
    line = [sys.executable, "-c", _MEASURE, *command]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    os.sync()
    seconds = time.monotonic() - began
    *lines, last = done.stdout.strip().splitlines()
    code, kilobytes = last.split()
    assert code == "0", code
    report = json.loads("\n".join(lines))
    shutil.rmtree(out)
    cloned = report["bytes_cloned"] / report["bytes"]
    return Measured(seconds, int(kilobytes) * 1024, cloned)


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--copy", action="store_true", help="without reflinks")
    options = parser.parse_args()
    base = write_base(options.folder, options.layers)
    out, trim = options.folder / "out", options.layers // 4
    more = ["--copy-mode", "copy"] if options.copy else []
    rounds = []
    for number in range(options.rounds):
        order = STARTS[number % len(STARTS) :] + STARTS[: number % len(STARTS)]
        rounds.append({start: measure(base, out, start, trim, more) for start in order})
    print("| start | seconds | against a copy | peak memory | cloned |\n|---|---|---|---|---|")
    for start in STARTS:
        each = [taken[start] for taken in rounds]
        ratio = statistics.median(taken[start].seconds / taken["copy"].seconds for taken in rounds)
        print(
            f"| {start} | {statistics.median(m.seconds for m in each):.1f} | {ratio:.2f} "
            f"| {max(m.peak_bytes for m in each) / 1e6:.0f} MB | {each[0].cloned:.1%} |"
        )


if __name__ == "__main__":
    main()
