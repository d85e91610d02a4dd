"""`dus upscale --stream` from a Hub with a limited bandwidth, against the same by way of the cache.

    python tests/benchmarks/stream.py --work DIR --rate 40MB --layers 4,16

The Hub is the tests' stand-in on loopback; all connections share its bandwidth. `line` is the least
time that the source's bytes take at that rate; for --stream, `time / line` is to be at most 1.15.
Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from checkpoints import write_mistral
from hub_server import StandInHub, StandInRepo, commit_of
from upscale import Run, spawn

from dus_cli.common.units import parse_size


def used(folder: Path) -> int:
    return sum(path.lstat().st_blocks * 512 for path in folder.rglob("*"))


def measure(hub: StandInHub, work: Path, name: str, *options: str) -> tuple[Run, int, int]:
    """A run with an empty cache: its time, and the disk space of output and cache."""
    out, home = work / "out", work / "hf"
    for folder in (out, home):
        shutil.rmtree(folder, ignore_errors=True)
    os.environ |= {
        "HF_HOME": str(home),
        "HF_ENDPOINT": hub.endpoint,
        "HF_HUB_DISABLE_TELEMETRY": "1",
    }
    os.sync()
    command = [
        sys.executable,
        "-m",
        "dus_cli",
        "upscale",
        f"org/{name}",
        "--json",
        *options,
        "-o",
        str(out),
    ]
    run = spawn(command)
    sizes = used(out), used(home)
    for folder in (out, home):
        shutil.rmtree(folder, ignore_errors=True)
    return run, *sizes


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--rate", type=parse_size, default=parse_size("40MB"))
    parser.add_argument("--layers", default="4,16")
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--jobs", default="4")
    options = parser.parse_args()
    print(
        "| | source, GB | line, s | time, s | time / line | CPU s | peak RSS, MB | output, GB | "
        "cache, GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|")
    for num_layers in map(int, options.layers.split(",")):
        name = f"mistral-{num_layers}x{options.hidden}"
        folder = options.work / name
        if not folder.exists():
            write_mistral(folder, num_layers, options.hidden)
        source = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
        repo = StandInRepo({commit_of(name): folder}, {"main": commit_of(name)})
        with StandInHub({f"org/{name}": repo}) as hub:
            measure(hub, options.work, name, "--dry-run")  # the stand-in hashes its files once
            hub.faults.bytes_per_second = options.rate
            line = source / options.rate
            ways = {
                f"--stream --jobs {jobs}": ("--stream", "--jobs", jobs)
                for jobs in options.jobs.split(",")
            }
            for way, how in {**ways, "by way of the cache": ()}.items():
                run, output, cache = measure(hub, options.work, name, *how)
                assert json.loads(run.stdout)["status"] == "written"
                print(
                    f"| {num_layers} layers, {way} | {source / 1e9:.2f} | {line:.1f} | "
                    f"{run.seconds:.1f} | **{run.seconds / line:.2f}** | {run.cpu:.1f} | "
                    f"{run.peak / 1e6:.0f} | {output / 1e9:.2f} | {cache / 1e9:.2f} |",
                    flush=True,
                )


if __name__ == "__main__":
    main()
