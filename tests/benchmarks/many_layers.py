"""CPU time and memory of planning, writing and verifying, against the depth of the output; linear
growth is 1, 2, 4, 8.

    python tests/benchmarks/many_layers.py FOLDER [COPIES ...]

Stacks copies of a tiny base of four layers. CPU time is measured, because it does not depend on
other work on the machine.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

from checkpoints import llama_config, llama_tensors, write_checkpoint

_MEASURE = (
    "import resource, subprocess, sys; code = subprocess.run(sys.argv[1:]).returncode; "
    "used = resource.getrusage(resource.RUSAGE_CHILDREN); "
    "print(code, used.ru_utime + used.ru_stime, used.ru_maxrss)"
)


def measured(*command: str | Path) -> str:
    """The CPU and wall seconds and the peak memory of a command, in a process of its own."""
    started = time.monotonic()
    line = [sys.executable, "-c", _MEASURE, Path(sys.executable).with_name("dus"), *command]
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True)
    code, seconds, kilobytes = done.stdout.split()
    assert code == "0", code
    return (
        f"{float(seconds):6.1f} s CPU, {time.monotonic() - started:6.1f} s, "
        f"{int(kilobytes) / 1000:6.0f} MB"
    )


def main() -> None:
    folder, counts = (
        Path(sys.argv[1]),
        [int(text) for text in sys.argv[2:]] or [1500, 3000, 6000, 12_000, 24_000],
    )
    base = write_checkpoint(
        folder / "base", llama_tensors(4, 16, 32, 16, 64), llama_config(4, 16, 32, 64)
    )
    for copies in counts:
        out = folder / f"out-{copies}"
        arguments = ("upscale", base, "--trim", "0", "--copies", str(copies), "-o", out, "-q")
        print(f"{4 * copies:6} layers  dry run  {measured(*arguments, '--dry-run')}", flush=True)
        print(f"{4 * copies:6} layers  write    {measured(*arguments)}", flush=True)
        print(f"{4 * copies:6} layers  verify   {measured('verify', out, '-q')}", flush=True)
        shutil.rmtree(out)


if __name__ == "__main__":
    main()
