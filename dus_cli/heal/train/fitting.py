"""How many rows fit a device at once, and the peak FLOP/s that it reaches."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch.nn import functional

from dus_cli.heal.estimate import PEAK_FLOPS
from dus_cli.heal.run import Run
from dus_cli.heal.train.batches import rows_of_a_worker
from dus_cli.models.team import Team

# Tokens at once without an accelerator: enough for efficient matrix products, in little memory.
# Compiled layers keep half as much for the backward pass, and what a pass costs whatever its size
# (each operator's call, each gradient's addition to its sum) is more of their time. In fp32 it is
# less of it, beside the products, and a token keeps twice as much.
_CPU_MICRO_BATCH_TOKENS = 512
_CPU_COMPILED_TOKENS = {"bf16": 2048, "fp32": 1024}

# Seconds: a product that takes longer is large enough to measure with.
_LONG_PRODUCT = 0.05

# The share of a device's memory to use; fragments and the libraries take the rest.
_USABLE = 0.85


class Peak(NamedTuple):
    """FLOP/s of one device at its best, and where the number comes from: a data sheet, or a
    measurement here.
    """

    flops: float
    source: str


def peak_flops(device: torch.device, dtype: torch.dtype) -> Peak:
    """What a device reaches in products of this dtype."""
    if device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        for part, flops in PEAK_FLOPS.items():
            if part in name:
                return Peak(flops, f"data sheet of {part}")
    what = f"matrix product in {str(dtype).removeprefix('torch.')}, measured"
    return Peak(_measured(device, dtype), what)


def _measured(device: torch.device, dtype: torch.dtype) -> float:
    """The best FLOP/s of a few matrix products of growing size.

    The size stops growing once a product takes long: a CPU without instructions for bf16 is a
    hundred times slower in it.
    """
    best = 0.0
    for size in (256, 512, 1024, 2048) if device.type == "cpu" else (8192,):
        hidden, weight = (torch.ones(size, size, device=device, dtype=dtype) for _ in range(2))
        for _ in range(5):
            started = time.perf_counter()
            product = functional.linear(hidden, weight)
            if device.type != "cpu":
                product.sum().item()
            seconds = time.perf_counter() - started
            best = max(best, 2 * size**3 / seconds)
            if seconds > _LONG_PRODUCT:
                return best
    return best


def rows_on_a_cpu(run: Run, num_workers: int, *, is_compiled: bool) -> int:
    """Rows of a micro-batch without an accelerator: as the run says, or as many as are fast in
    little memory.
    """
    if run.fit.micro_batch_rows is not None:
        return run.fit.micro_batch_rows
    tokens = _CPU_COMPILED_TOKENS[run.fit.precision] if is_compiled else _CPU_MICRO_BATCH_TOKENS
    most = rows_of_a_worker(run.rows_per_step, num_workers)
    return max(1, min(most, tokens // run.seq_length))


def rows_at_once(team: Team, most: int, trial: Callable[[int], None]) -> int:
    """Rows of a micro-batch on a GPU, by a trial: memory at one row and at two gives what a row
    costs.

    Args:
        team: the workers; all take the smallest answer.
        most: rows that a worker has in a step.
        trial: runs forward and backward on that many rows.
    """
    peaks = []
    for rows in (1, 2):
        trial(rows)  # the first run of a shape allocates workspaces that stay
        torch.accelerator.reset_peak_memory_stats()
        trial(rows)
        peaks.append(torch.accelerator.max_memory_allocated())
    total = torch.cuda.get_device_properties(team.device).total_memory
    each = max(1, peaks[1] - peaks[0])
    fits = 1 + int(max(0.0, _USABLE * total - peaks[0]) // each)
    return max(1, int(-team.max(-float(min(most, fits)))))
