"""Time and memory of planning very large models, and of writing one whose data are holes.

    python tests/benchmarks/planning.py FOLDER [--write]

Each row is `dus upscale --dry-run` in a process of its own: CPU seconds, which depend least on
other work on the machine, wall seconds, and peak memory. `bytes` is the memory for each tensor of
the output, after subtracting that for a tiny model. --write also writes the trillion-parameter
model: FOLDER must be on a file system with reflinks and sparse files (XFS, btrfs), because its data
are a terabyte of holes.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import llama_config, llama_tensors, moe_config, moe_tensors, write_checkpoint

_MEASURE = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
    "print(); print(code, used.ru_utime + used.ru_stime, used.ru_maxrss)"
)

# Layers, experts, hidden and expert sizes, vocabulary: those of Kimi K2, and with more experts.
TRILLION = (61, 384, 7168, 2048, 163_840)
MORE = (61, 496, 7168, 2048, 163_840)


def measured(*command: str | Path) -> tuple[float, float, float, int]:
    """CPU seconds, wall seconds, peak memory in bytes, and the number of tensors in the report."""
    started = time.monotonic()
    line = [
        sys.executable,
        "-c",
        _MEASURE,
        Path(sys.executable).with_name("dus"),
        *command,
        "--json",
    ]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    *report, used = done.stdout.strip().splitlines()
    code, seconds, kilobytes = used.split()
    assert code == "0", code
    count = json.loads("\n".join(report))["tensors"]
    return float(seconds), time.monotonic() - started, int(kilobytes) * 1024, count


def main() -> None:
    folder = Path(sys.argv[1])
    tiny = write_checkpoint(
        folder / "tiny", llama_tensors(4, 16, 32, 16, 64), llama_config(4, 16, 32, 64)
    )
    deep = llama_tensors(11_111, 16, 32, 16, 64), llama_config(11_111, 16, 32, 64)
    thousand = write_checkpoint(folder / "thousand", *deep, num_shards=1000, fill=None)
    bases = [
        ("4 layers", tiny, ()),
        ("12,004 layers of 4", tiny, ("--trim", "0", "--copies", "3001")),
        ("100,000 layers of 4", tiny, ("--trim", "0", "--copies", "25000")),
        ("100,002 tensors in 1,000 shards", thousand, ()),
    ]
    for name, shape in (
        ("384 experts in FP8, 163 shards", TRILLION),
        ("496 experts in FP8, 163 shards", MORE),
    ):
        tensors, config = moe_tensors(*shape, is_fp8=True), moe_config(*shape, is_fp8=True)
        base = write_checkpoint(
            folder / f"moe-{shape[1]}", tensors, config, num_shards=163, fill=None
        )
        bases.append((f"{len(tensors):,} tensors: {name}", base, ()))
    print("| base | output tensors | CPU s | s | peak RSS, MB | bytes |\n|---|---|---|---|---|---|")
    least = None
    for name, base, options in bases:
        cpu, seconds, memory, count = measured(
            "upscale", base, *options, "-o", folder / "out", "--dry-run"
        )
        least = memory if least is None else least
        row = f"| {name} | {count:,} | {cpu:.1f} | {seconds:.1f} | {memory / 1e6:.0f} |"
        print(f"{row} {(memory - least) / count:.0f} |", flush=True)
    if "--write" in sys.argv:
        cpu, seconds, memory, count = measured(
            "upscale", bases[4][1], "-o", folder / "out", "--copy-mode", "clone"
        )
        print(
            f"| {bases[4][0]}, written | {count:,} | {cpu:.1f} | {seconds:.1f} | "
            f"{memory / 1e6:.0f} | |"
        )
        shutil.rmtree(folder / "out")


if __name__ == "__main__":
    main()
