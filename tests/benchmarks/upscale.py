r"""Compare `dus upscale` with mergekit's passthrough and with a plain copy loop, in pairs, in one
run.

    python tests/benchmarks/upscale.py --work DIR --mergekit VENV/bin/mergekit-yaml --compare-bytes
    python tests/benchmarks/upscale.py --work DIR --rounds 0 --jobs 1,2,4,8 --sizes --many \
        --dry-run-time

Measures DIR's file system: ext4, or a mounted XFS or btrfs. A disk's speed varies from minute to
minute, so the programs take turns, their order changes with each round, and ratios are formed
within a round. At full size DIR needs 36 GB (58 GB with --compare-bytes) and the machine should be
idle. Run it as root, so that the page cache can be dropped before each measurement. Prints
Markdown.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime as dt
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import NamedTuple

CHORES = Path(__file__).resolve().with_name("chores.py")
# the tests, the repository
PYTHONPATH = os.pathsep.join(str(folder) for folder in CHORES.parents[1:3])


class Run(NamedTuple):
    """A measured child process. `synced` is the time until all that it wrote is on the disk
    (`sync`).
    """

    seconds: float
    synced: float
    cpu: float
    peak: int
    growth: int
    stdout: str


@dataclass(frozen=True)
class Bench:
    """Where, with which peers, and on which model."""

    work: Path
    dus: str
    mergekit: list[str]
    num_layers: int
    hidden: int
    rounds: int

    @property
    def source(self) -> Path:
        return self.work / f"mistral-{self.num_layers}x{self.hidden}"

    def peers(self) -> dict[str, list[str]]:
        """The command line of each peer, without the output at its end."""
        n, m = self.num_layers, self.num_layers // 4
        commands = {"dus": self.upscale(self.source, m)}
        if self.mergekit:
            config = self.work / "mergekit.yml"
            slices = "".join(
                f"- sources:\n  - model: {json.dumps(str(self.source))}\n    layer_range: "
                f"{layers}\n"
                for layers in ([0, n - m], [m, n])
            )
            config.write_text(f"slices:\n{slices}merge_method: passthrough\ndtype: bfloat16\n")
            commands["mergekit"] = [*self.mergekit, "--no-copy-tokenizer", str(config)]
        return commands

    def upscale(self, source: Path, trim: int, *options: str) -> list[str]:
        return [self.dus, "upscale", str(source), "--trim", str(trim), "--json", *options, "-o"]


def chore(name: str, *arguments: object) -> list[str]:
    return [sys.executable, str(CHORES), name, *map(str, arguments)]


def spawn(command: Sequence[str]) -> Run:
    """Run a command to its end; if it fails, print the end of its output and stop."""
    environment = os.environ | ({"PYTHONPATH": PYTHONPATH} if str(CHORES) in command else {})
    with tempfile.TemporaryFile() as output, tempfile.TemporaryFile() as errors:
        started = time.perf_counter()
        process = subprocess.Popen(command, stdout=output, stderr=errors, env=environment)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        output.seek(0)
        errors.seek(0)
        if process.returncode:
            sys.exit(
                f"{shlex.join(command)}: exit "
                f"{process.returncode}\n{errors.read().decode()[-3000:]}"
            )
        cpu = usage.ru_utime + usage.ru_stime
        return Run(seconds, seconds, cpu, usage.ru_maxrss * 1024, 0, output.read().decode())


def measure(command: Sequence[str], work: Path) -> Run:
    """Run a command with a cold page cache on an idle disk, with the output's path appended; remove
    the output afterwards.
    """
    before = settle(work)
    with tempfile.TemporaryDirectory(dir=work) as folder:
        started = time.perf_counter()
        run = spawn([*command, f"{folder}/output"])
        os.sync()
        return run._replace(synced=time.perf_counter() - started, growth=before - free_bytes(work))


def free_bytes(folder: Path) -> int:
    status = os.statvfs(folder)
    return status.f_bfree * status.f_frsize


def settle(folder: Path) -> int:
    """Give every peer the same start; the free bytes, once they rest (btrfs and XFS free what is
    removed later).

    The five seconds matter in virtual machines: memory that the last peer freed is warm until the
    host takes it back, and then costs CPU time to touch. Without the pause, a peer's place in the
    order decides.
    """
    os.sync()
    drop_caches()
    free = -1
    for _ in range(6):
        if free == (free := free_bytes(folder)):
            break
        time.sleep(5)
        os.sync()
    return free


def drop_caches() -> bool:
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3\n")
        return True
    return False


@contextlib.contextmanager
def made(name: str, folder: Path, *arguments: object, keep: bool = False) -> Iterator[Path]:
    """Make a source under another name first, so that an incomplete one is never reused."""
    existed = folder.exists()
    if not existed:
        say(f"making {folder.name}")
        partial = folder.with_name(f".{folder.name}.partial")
        shutil.rmtree(partial, ignore_errors=True)
        spawn(chore(name, partial, *arguments))
        partial.rename(folder)
        os.sync()
    try:
        yield folder
    finally:
        if not (keep or existed):
            shutil.rmtree(folder)


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def table(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    print(f"\n### {title}\n\n| {' | '.join(heads)} |\n|{'---|' * len(heads)}")
    for row in rows:
        print(f"| {' | '.join(row)} |")
    sys.stdout.flush()


def values(numbers: Sequence[float], digits: int) -> str:
    """The median, then every value in the order of rounds."""
    return (
        f"**{median(numbers):.{digits}f}** "
        f"({', '.join(f'{number:.{digits}f}' for number in numbers)})"
    )


def run_table(title: str, runs: Mapping[str, Sequence[Run]]) -> None:
    heads = ["", "s", "s until on disk", "CPU s", "peak RSS, MB", "disk growth, GB"]
    columns = [
        ("seconds", 1, 2),
        ("synced", 1, 2),
        ("cpu", 1, 2),
        ("peak", 1e6, 0),
        ("growth", 1e9, 3),
    ]
    rows = []
    for peer, done in runs.items():
        rows.append(
            [
                peer,
                *(
                    values([getattr(run, a) / unit for run in done], digits)
                    for a, unit, digits in columns
                ),
            ]
        )
    table(title, heads, rows)


def ratio(name: str, above: Sequence[float], below: Sequence[float]) -> None:
    print(f"- {name}: {values([a / b for a, b in zip(above, below, strict=True)], 2)}")


def gigabytes(folder: Path) -> float:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors")) / 1e9


def compare_peers(bench: Bench) -> None:
    """Measure dus, mergekit and the loop in turns."""
    commands = bench.peers() | {"loop": chore("loop", bench.source, bench.num_layers // 4)}
    names, runs = list(commands), {peer: list[Run]() for peer in commands}
    for number in range(bench.rounds):
        for peer in names[number % len(names) :] + names[: number % len(names)]:
            runs[peer].append(measure(commands[peer], bench.work))
            say(f"round {number + 1}, {peer}: {runs[peer][-1].seconds:.1f} s")
    run_table("Up-scaling", runs)
    seconds = {peer: [run.seconds for run in done] for peer, done in runs.items()}
    no_fsync = [run.seconds - json.loads(run.stdout)["fsync_seconds"] for run in runs["loop"]]
    report = json.loads(runs["dus"][0].stdout)
    print(
        f"\n- output: {report['bytes'] / 1e9:.2f} GB; dus cloned "
        f"{report['bytes_cloned'] / 1e9:.2f} GB of it"
    )
    print(f"- loop, s without its fsync: {values(no_fsync, 2)}")
    if "mergekit" in runs:
        ratio("mergekit / dus, time", seconds["mergekit"], seconds["dus"])
        on_disk = [[run.synced for run in runs[peer]] for peer in ("mergekit", "dus")]
        ratio("mergekit / dus, time until on disk (mergekit does not fsync)", *on_disk)
        ratio(
            "dus / mergekit, CPU",
            [run.cpu for run in runs["dus"]],
            [run.cpu for run in runs["mergekit"]],
        )
    ratio("dus / loop, time", seconds["dus"], seconds["loop"])
    ratio("dus / loop without its fsync, time", seconds["dus"], no_fsync)
    print("\nCommands (OUT is the output):\n")
    for command in commands.values():
        print("    " + shlex.join([*command, "OUT"]))


def compare_bytes(bench: Bench) -> None:
    """Keep mergekit's and dus' outputs, and compare them tensor by tensor, byte by byte."""
    peers = bench.peers()
    with tempfile.TemporaryDirectory(dir=bench.work) as folder:
        for peer, command in peers.items():
            say(f"keeping the output of {peer}")
            spawn([*command, f"{folder}/{peer}"])
        run = spawn(chore("compare", *(f"{folder}/{peer}" for peer in peers)))
    print(f"\n### dus' output against mergekit's\n\n{run.stdout.strip()}")


def sweep_jobs(bench: Bench, jobs: Sequence[int]) -> None:
    runs: dict[str, list[Run]] = {f"--jobs {number}": [] for number in jobs}
    for _ in range(max(1, bench.rounds)):
        for name, done in runs.items():
            command = bench.upscale(
                bench.source, bench.num_layers // 4, "--copy-mode", "copy", *name.split()
            )
            done.append(measure(command, bench.work))
            say(f"{name}: {done[-1].seconds:.1f} s")
    run_table("dus --copy-mode copy, by number of jobs", runs)


def sweep_sizes(bench: Bench) -> None:
    """Peak RSS while bytes are really moved, for growing models; it should be constant."""
    rows = []
    for num_layers in (1, 4, 12, 32):
        folder = bench.work / f"mistral-{num_layers}x{bench.hidden}"
        with made("make_mistral", folder, num_layers, bench.hidden) as source:
            run = measure(bench.upscale(source, num_layers // 4, "--copy-mode", "copy"), bench.work)
            written = json.loads(run.stdout)["bytes"] / 1e9
            figures = [
                f"{gigabytes(source):.2f}",
                f"{written:.2f}",
                f"{run.peak / 1e6:.0f}",
                f"{run.seconds:.1f}",
            ]
            rows.append([str(num_layers), *figures])
    heads = ["layers", "source, GB", "output, GB", "peak RSS, MB", "s"]
    table("Memory of dus --copy-mode copy, by size of model", heads, rows)


def time_many(bench: Bench) -> None:
    """Time what grows with the number of shards, tensors and layers instead of bytes."""
    with made("make_many_shards", bench.work / "many-shards") as source:
        command = [*bench.upscale(source, 25, "--dry-run"), str(bench.work / "output")]
        rows = [
            many_row(
                "100,003 tensors in 1,000 shards, --dry-run", [spawn(command) for _ in range(3)]
            )
        ]
    for num_layers in (500, 1000, 2000):
        with made(
            "make_many_layers", bench.work / f"many-layers-{num_layers}", num_layers
        ) as source:
            command = bench.upscale(source, num_layers // 4)
            rows.append(
                many_row(
                    f"{num_layers:,} layers, written",
                    [measure(command, bench.work) for _ in range(3)],
                )
            )
    table(
        "Many tensors",
        ["base", "output tensors", "s", "peak RSS, MB", "µs per output tensor"],
        rows,
    )


def many_row(name: str, runs: Sequence[Run]) -> list[str]:
    num_tensors = json.loads(runs[0].stdout)["tensors"]
    seconds, peaks = [run.seconds for run in runs], [run.peak / 1e6 for run in runs]
    each = f"{median(seconds) / num_tensors * 1e6:.0f}"
    return [name, f"{num_tensors:,}", values(seconds, 2), values(peaks, 0), each]


def time_dry_run(bench: Bench, repeats: int = 9) -> None:
    dry_run = [
        *bench.upscale(bench.source, bench.num_layers // 4, "--dry-run"),
        str(bench.work / "output"),
    ]
    rows = []
    for name, command in {
        "dus upscale --dry-run": dry_run,
        "dus --help": [bench.dus, "--help"],
    }.items():
        spawn(command)  # warms the cache for Python's own files
        seconds = [spawn(command).seconds for _ in range(repeats)]
        rows.append([name, f"{min(seconds):.3f}", f"{median(seconds):.3f}"])
    table(f"Start-up, {repeats} runs each", ["", "min, s", "median, s"], rows)


def describe(bench: Bench) -> None:
    """Print what a reader needs to judge the numbers, or to repeat them."""
    cpus = [
        line
        for line in Path("/proc/cpuinfo").read_text().splitlines()
        if line.startswith("model name")
    ]
    cpu = cpus[0].partition(":")[2].strip() if cpus else platform.machine()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9
    versions = [
        spawn([bench.dus, "--version"]).stdout.strip(),
        f"Python {platform.python_version()}",
    ]
    if bench.mergekit:
        code = (
            "from importlib.metadata import version as v; print('mergekit', v('mergekit'), "
            "'torch', v('torch'))"
        )
        versions.append(
            spawn([str(Path(bench.mergekit[0]).with_name("python")), "-c", code]).stdout.strip()
        )
    cache = "dropped before each run" if drop_caches() else "not dropped (only root can)"
    print(f"## dus upscale, measured on {dt.datetime.now(dt.timezone.utc):%Y-%m-%d}\n")
    print(
        f"- machine: {cpu}, {os.cpu_count()} cores, {memory:.0f} GB of memory, Linux "
        f"{platform.release()}"
    )
    print(
        f"- file system: {file_system(bench.work)}; page cache {cache}; load average "
        f"{os.getloadavg()[0]:.2f}"
    )
    print(f"- versions: {'; '.join(versions)}")
    print("- numbers: **median** (each round); RSS as the kernel counts it, with mapped file pages")
    print(f"- command: `{shlex.join(['python', *sys.argv])}`")


def file_system(folder: Path) -> str:
    mounts = [line.split()[1:3] for line in Path("/proc/self/mounts").read_text().splitlines()]
    holding = [(point, kind) for point, kind in mounts if folder.resolve().is_relative_to(point)]
    return max(reversed(holding), key=lambda mount: len(mount[0]))[1]


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--work", type=Path, required=True, help="directory on the file system to measure"
    )
    parser.add_argument(
        "--dus", default=str(Path(sys.executable).with_name("dus")), help="the dus executable"
    )
    parser.add_argument(
        "--mergekit", type=shlex.split, default=[], help="mergekit-yaml, and options for it"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="rounds of the comparison; 0 leaves it out (3)"
    )
    parser.add_argument("--layers-of-base", type=int, default=32, help="layers of the source (32)")
    parser.add_argument("--hidden", type=int, default=4096, help="hidden size of the source (4096)")
    parser.add_argument(
        "--compare-bytes", action="store_true", help="hold dus' output against mergekit's"
    )
    parser.add_argument(
        "--jobs", type=lambda text: [int(word) for word in text.split(",")], help="sweep: 1,2,4,8"
    )
    parser.add_argument(
        "--sizes", action="store_true", help="memory of dus for 1, 4, 12 and 32 layers"
    )
    parser.add_argument(
        "--many", action="store_true", help="1,000 shards, 100,000 tensors, 2,000 layers"
    )
    parser.add_argument(
        "--dry-run-time", action="store_true", help="seconds of --dry-run and of --help"
    )
    options = parser.parse_args()
    if options.compare_bytes and not options.mergekit:
        parser.error("--compare-bytes needs --mergekit")
    return options


def main() -> None:
    options = parse()
    work: Path = options.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    bench = Bench(
        work, options.dus, options.mergekit, options.layers_of_base, options.hidden, options.rounds
    )
    describe(bench)
    if options.rounds or options.compare_bytes or options.jobs or options.dry_run_time:
        with made(
            "make_mistral", bench.source, bench.num_layers, bench.hidden, keep=True
        ) as source:
            print(
                f"- source: {bench.num_layers} layers, hidden size {bench.hidden}, "
                f"{gigabytes(source):.2f} GB of bf16"
            )
    if options.rounds:
        compare_peers(bench)
    if options.compare_bytes:
        compare_bytes(bench)
    if options.jobs:
        sweep_jobs(bench, options.jobs)
    if options.sizes:
        sweep_sizes(bench)
    if options.many:
        time_many(bench)
    if options.dry_run_time:
        time_dry_run(bench)


if __name__ == "__main__":
    main()
