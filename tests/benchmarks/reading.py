"""`dus verify OUT --base BASE` against a plain reader of both, and `--checksums` against
`sha256sum`, in pairs, in one run.

    python tests/benchmarks/reading.py --work DIR [--rounds 3] [--parts verify,sums,copy]

DIR's file system is the one measured: on XFS and btrfs both share blocks, elsewhere all is read.
`reader` reads the files of BASE and OUT once, past the page cache, in pieces of 4 MiB with as many
threads as `dus verify` has. `sha256sum` is one process a file by `xargs -P CORES`, and
`openssl` the same with `openssl dgst -sha256`. Peers take turns. Before each the page cache is dropped (root),
and `dus verify` run on a tiny model, so that Python's files are no part of the time. Prints Markdown.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import shutil
import sys
from pathlib import Path

from upscale import (
    Bench,
    Run,
    chore,
    describe,
    drop_caches,
    made,
    measure,
    ratio,
    run_table,
    say,
    spawn,
)

_JOBS = 4


def in_turns(bench: Bench, commands: dict[str, list[str]]) -> dict[str, list[Run]]:
    """Every command as often as there are rounds, each from a cold page cache in which Python's own
    files are.
    """
    tiny = bench.work / "tiny"
    names = list(commands)
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for number in range(bench.rounds):
        for name in names[number % len(names) :] + names[: number % len(names)]:
            os.sync()
            drop_caches()
            with made("make_many_layers", tiny, 2, keep=True):
                spawn([bench.dus, "verify", str(tiny)])
            run = spawn(commands[name])
            runs[name].append(run)
            say(f"round {number + 1}, {name}: {run.seconds:.1f} s")
    return runs


def seconds(runs: list[Run]) -> list[float]:
    return [run.seconds for run in runs]


def verifying(bench: Bench, out: Path) -> None:
    verify = [bench.dus, "verify", str(out), "--base", str(bench.source), "--json"]
    reader = chore("read", _JOBS, bench.source, out)
    runs = in_turns(
        bench, {"verify": verify, "verify --read": [*verify, "--read"], "reader": reader}
    )
    run_table("dus verify OUT --base BASE", runs)
    report = json.loads(runs["verify"][0].stdout)
    compared, shared = report["bytes_compared"] / 1e9, report["bytes_shared"] / 1e9
    print(f"\n- compared: {compared:.2f} GB, of which {shared:.2f} GB lie in the same blocks")
    print(f"- read by `reader`: {json.loads(runs['reader'][0].stdout)['bytes'] / 1e9:.2f} GB")
    ratio("verify --read / reader", seconds(runs["verify --read"]), seconds(runs["reader"]))
    ratio("verify / reader", seconds(runs["verify"]), seconds(runs["reader"]))
    ratio("verify --read / verify", seconds(runs["verify --read"]), seconds(runs["verify"]))


def summing(bench: Bench) -> None:
    """The sums of the base's own files, with nothing else to read."""
    files = f"find {shlex.quote(str(bench.source))} -type f ! -name SHA256SUMS -print0"
    each = f"{files} | xargs -0 -P {os.cpu_count()} -n 1"
    sums = bench.source / "SHA256SUMS"
    spawn(["sh", "-c", f"cd {shlex.quote(str(bench.source))} && sha256sum * > {sums.name}"])
    peers = ["sha256sum"] + ["openssl"] * (shutil.which("openssl") is not None)
    commands = {"dus verify": [bench.dus, "verify", str(bench.source), "--json"]}
    commands["sha256sum"] = ["sh", "-c", f"{each} sha256sum"]
    if "openssl" in peers:
        commands["openssl"] = ["sh", "-c", f"{each} openssl dgst -sha256"]
    runs = in_turns(bench, commands)
    sums.unlink()
    run_table("Sums of the base's files, checked", runs)
    for name in peers:
        ratio(f"dus verify / {name}, time", seconds(runs["dus verify"]), seconds(runs[name]))
        cpu = [[run.cpu for run in runs[peer]] for peer in ("dus verify", name)]
        ratio(f"dus verify / {name}, CPU", *cpu)


def summed_while_copied(bench: Bench) -> None:
    """A copy with sums against one without."""
    copy = bench.upscale(bench.source, bench.num_layers // 4, "--copy-mode", "copy")
    ways = {"copied": copy, "copied and summed": [*copy[:-1], "--checksums", "-o"]}
    runs: dict[str, list[Run]] = {name: [] for name in ways}
    for _ in range(bench.rounds):
        for name, command in ways.items():
            runs[name].append(measure(command, bench.work))
            say(f"{name}: {runs[name][-1].seconds:.1f} s")
    run_table("--checksums of an output that is copied", runs)
    ratio("with sums / without, time", *(seconds(runs[name]) for name in reversed(ways)))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--dus", default=str(Path(sys.executable).with_name("dus")))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--layers-of-base", type=int, default=32)
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--parts", default="verify,sums,copy", help="which to measure (all)")
    options = parser.parse_args()
    parts = options.parts.split(",")
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(work, options.dus, [], options.layers_of_base, options.hidden, options.rounds)
    describe(bench)
    out = work / "out"
    shutil.rmtree(out, ignore_errors=True)
    with made("make_mistral", bench.source, bench.num_layers, bench.hidden, keep=True):
        if "verify" in parts:
            spawn([*bench.upscale(bench.source, bench.num_layers // 4), str(out)])
            verifying(bench, out)
            shutil.rmtree(out)
        if "sums" in parts:
            summing(bench)
        if "copy" in parts:
            summed_while_copied(bench)


if __name__ == "__main__":
    main()
