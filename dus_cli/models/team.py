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
    """A worker's place. One worker has no groups, and needs no port.

    `saving` is a group of its own: a checkpoint is saved while training goes on. So is `talking`,
    which is gloo's on every device: what the workers tell each other needs no GPU, and a lost one
    is an error there at once.
    """

    rank: int
    size: int
    num_local: int
    device: torch.device
    saving: dist.ProcessGroup | None
    talking: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The values summed over the workers, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.talking)
        return [float(value) for value in total.tolist()]

    def max(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float32)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.talking)
        return float(total.item())

    def any(self, flag: bool) -> bool:
        """Whether any worker says so; all get the same answer."""
        return self.max(float(flag)) > 0

    def first_says(self, flag: bool) -> bool:
        """What the first worker says."""
        return self.any(flag and self.is_first)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.talking)

    def synchronize(self) -> None:
        """Wait for the device, so that a clock read next is honest."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@contextmanager
def gathered() -> Iterator[Team]:
    """Join the workers that torchrun started (its environment variables), and leave at the end.

    Without them it is a team of one.
    """
    for name, value in (
        ("RANK", "0"),
        ("WORLD_SIZE", "1"),
        ("MASTER_ADDR", "127.0.0.1"),
        ("MASTER_PORT", "0"),
    ):
        os.environ.setdefault(name, value)
    rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    accelerator = (
        torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    )
    device = torch.device("cpu")
    if accelerator is not None:
        device = torch.device(accelerator.type, int(os.environ.get("LOCAL_RANK", "0")))
        torch.accelerator.set_device_index(device.index)
    num_local = int(os.environ.get("LOCAL_WORLD_SIZE", size))
    if size == 1:
        yield Team(rank, size, num_local, device, saving=None, talking=None)
        return
    backend = dist.get_default_backend_for_device(device.type)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        saving, talking = (dist.new_group(backend="gloo", timeout=_TIMEOUT) for _ in range(2))
        yield Team(rank, size, num_local, device, saving, talking)
    finally:
        dist.destroy_process_group()
