"""The workers together: torch.distributed on whatever device there is. One worker is a team too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Longer than any step or save, shorter than a night: a lost peer is an error, not a hang.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class Team:
    """A worker's place. `saving` is a group of its own: a checkpoint is saved while training goes on."""

    rank: int
    size: int
    num_local: int
    device: torch.device
    saving: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values summed over the workers, in float64 where the device has it."""
        if self.size == 1:
            return list(values)
        dtype = torch.float32 if self.device.type == "mps" else torch.float64
        total = torch.tensor(values, dtype=dtype, device=self.device)
        dist.all_reduce(total)
        return [float(value) for value in total.tolist()]

    def max(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float32, device=self.device)
        dist.all_reduce(total, op=dist.ReduceOp.MAX)
        return float(total.item())

    def any(self, flag: bool) -> bool:
        """Whether any worker says so; all get the same answer."""
        return self.max(float(flag)) > 0

    def first_says(self, flag: bool) -> bool:
        """What the first worker says."""
        return self.any(flag and self.is_first)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier()

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next is honest."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@contextmanager
def gathered() -> Iterator[Team]:
    """Join the workers that torchrun started (its environment variables), and leave at the end.

    Without them it is a team of one.
    """
    for name, value in (("RANK", "0"), ("WORLD_SIZE", "1"), ("MASTER_ADDR", "127.0.0.1"), ("MASTER_PORT", "0")):
        os.environ.setdefault(name, value)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device = torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    backend = dist.get_default_backend_for_device(device.type)
    # one worker needs no port
    store = dist.HashStore() if size == 1 else None  # type: ignore[attr-defined]
    dist.init_process_group(backend, rank=rank, world_size=size, store=store, timeout=_TIMEOUT)
    try:
        saving = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        yield Team(rank, size, int(os.environ.get("LOCAL_WORLD_SIZE", size)), device, saving)
    finally:
        dist.destroy_process_group()
