"""Tokens a second and peak memory of `dus heal` against transformers' Trainer, on the same work, in
one run.

    python tests/benchmarks/heal_speed.py MODEL --data train.jsonl [--steps 3] [--rounds 2] \
        [--no-compile] [--precision fp32] [--micro-batch 2]

Both run steps of 8 × 512 tokens, in pairs, each in a process of its own. The first step is a
warm-up: for dus the median of the steps is taken, for the Trainer the sum, as its users see it. The
layers of dus are compiled, as those of a long run are by default.
"""

from __future__ import annotations

import argparse
import json
import shlex
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent


def run_json(model: str, data: str, folder: Path, *extra: str) -> Path:
    """Prepare a run without starting it; returns the path of its run.json."""
    command = [
        sys.executable,
        "-m",
        "dus_cli",
        "heal",
        model,
        "--data",
        data,
        "-o",
        str(folder / "run"),
        "-q",
    ]
    done = subprocess.run(
        [*command, "--print-command", *extra], check=True, capture_output=True, text=True
    )
    return Path(shlex.split(done.stdout)[-1])


def ours(
    model: str, data: str, folder: Path, steps: int, *extra: str, workers: int = 1
) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "dus_cli",
        "heal",
        model,
        "--data",
        data,
        "-o",
        str(folder / "healed"),
    ]
    command += ["--seq-length", "512", "--batch-tokens", "4096", "--steps", str(steps)]
    command += [
        "--eval-tokens",
        "512",
        "--eval-every",
        str(10**6),
        "--nproc-per-node",
        str(workers),
        "--json",
        *extra,
    ]
    report: dict[str, Any] = json.loads(
        subprocess.run(command, check=True, capture_output=True).stdout
    )
    rows = [
        json.loads(line) for line in (folder / "healed" / "metrics.jsonl").read_text().splitlines()
    ]
    seconds = [row["seconds"] for row in rows if row["step"] > 1]
    report["shares"] = {
        kind: sum(s[kind] for s in seconds) / sum(sum(s.values()) for s in seconds)
        for kind in seconds[0]
    }
    report["mfu"] = statistics.median(row["mfu"] for row in rows if row["step"] > 1)
    return report


def theirs(run: Path, steps: int) -> dict[str, Any]:
    command = [sys.executable, str(HERE / "trainer.py"), str(run), "--steps", str(steps)]
    lines = subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()
    found: dict[str, Any] = json.loads(lines[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--workers", default="1,2")
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--precision", default="bf16")
    parser.add_argument("--micro-batch", default="auto")
    options = parser.parse_args()
    extra = ["--no-compile" if options.no_compile else "--compile"]
    extra += ["--precision", options.precision, "--micro-batch", options.micro_batch]
    print("| round | tokens/s: dus | Trainer | ratio | peak memory: dus | Trainer | ratio |")
    print("|---|---|---|---|---|---|---|")
    ratios = []
    for number in range(options.rounds):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            shape = ("--seq-length", "512", "--precision", options.precision)
            peer = theirs(run_json(options.model, options.data, folder, *shape), options.steps)
            mine = ours(options.model, options.data, folder, options.steps, *extra)
        speed = mine["tokens_per_second"] / peer["tokens_per_second"]
        memory = mine["peak_memory_bytes"] / peer["peak_memory_bytes"]
        ratios.append((speed, memory))
        print(
            f"| {number + 1} | {mine['tokens_per_second']:.0f} | {peer['tokens_per_second']:.0f} | "
            f"{speed:.2f} | {mine['peak_memory_bytes'] / 1e9:.2f} GB | "
            f"{peer['peak_memory_bytes'] / 1e9:.2f} GB | {memory:.2f} |",
            flush=True,
        )
    speeds, memories = zip(*ratios, strict=True)
    print(
        f"\nmedian: {statistics.median(speeds):.2f} × the speed, "
        f"{statistics.median(memories):.2f} × the memory"
    )
    shares = ", ".join(f"{kind} {share:.1%}" for kind, share in mine["shares"].items())
    print(f"a step of ours: {shares}; {mine['mfu']:.0%} of {mine['peak_flops'] / 1e9:.0f} GFLOP/s")
    print(f"({mine['peak_flops_source']})\n\n| workers | tokens/s |\n|---|---|")
    for workers in map(int, options.workers.split(",")):
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            found = ours(
                *(options.model, options.data, folder, options.steps), *extra, workers=workers
            )
        print(f"| {workers} | {found['tokens_per_second']:.0f} |", flush=True)


if __name__ == "__main__":
    main()
