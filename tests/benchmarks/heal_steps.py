r"""CPU time of steps of `dus heal` in a process of its own, for a machine that is shared.

    python tests/benchmarks/heal_steps.py RUN_JSON --steps 2 [--profile]

RUN_JSON is written by `dus heal --print-command`. Prints tokens per second of CPU time and of wall
time, and the peak memory, as trainer.py does; the first step is a warm-up. --profile prints
torch.profiler's table of a step. Set the launcher's environment yourself: OMP_NUM_THREADS,
MALLOC_MMAP_THRESHOLD_, MALLOC_TRIM_THRESHOLD_.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from dus_cli.heal.run import read_run
from dus_cli.heal.train.setup import set_up
from dus_cli.models.devices import peak_memory_bytes
from dus_cli.models.stopping import Signals
from dus_cli.models.team import joined_team


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--profile", action="store_true")
    options = parser.parse_args()
    run = read_run(options.run)
    with joined_team() as team:
        training = set_up(run, team, Signals())
        training._step()
        if options.profile:
            with profile(activities=[ProfilerActivity.CPU]) as found:
                training._step()
            print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=20))
            return
        started, cpu = time.perf_counter(), time.process_time()
        for _ in range(options.steps):
            training._step()
        seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
        tokens = options.steps * run.tokens_per_step
        speeds = {
            "tokens_per_second": round(tokens / seconds, 1),
            "tokens_per_cpu_second": round(tokens / cpu, 1),
        }
        print(json.dumps(speeds | {"peak_memory_bytes": peak_memory_bytes(team.device)}))


if __name__ == "__main__":
    main()
