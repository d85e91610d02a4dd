"""The workers of a run, by torch.distributed on any device. A single worker is a team, too."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist

# Longer than any step or save, shorter than a night, so that a lost worker becomes an error.
_TIMEOUT = timedelta(minutes=60)


@dataclass(frozen=True)
class Team:
    """A worker's rank and device, and the team's process groups.

    Attributes:
        rank: of this worker.
        size: the number of workers.
        num_local: the number of workers on this node.
        device: of this worker.
        saving: the group for checkpoints, which are saved while training goes on.
        control: the group for small values. It is gloo's on every device: it needs no GPU, and a
            lost worker is an error at once. Both groups are None if the worker is alone.
    """

    rank: int
    size: int
    num_local: int
    device: torch.device
    saving: dist.ProcessGroup | None
    control: dist.ProcessGroup | None

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def sum(self, values: Sequence[float]) -> list[float]:
        """The sums of the values over the workers, in float64."""
        if self.size == 1:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(total, group=self.control)
        return [float(value) for value in total.tolist()]

    def max(self, value: float) -> float:
        if self.size == 1:
            return value
        total = torch.tensor([value], dtype=torch.float32)
        dist.all_reduce(total, op=dist.ReduceOp.MAX, group=self.control)
        return float(total.item())

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any worker; the same on all workers."""
        return self.max(float(flag)) > 0

    def first_decides(self, flag: bool) -> bool:
        """The flag of the first worker, on all workers."""
        return self.any(flag and self.is_first)

    def wait(self) -> None:
        if self.size > 1:
            dist.barrier(group=self.control)

    def synchronize(self) -> None:
        """Wait until the device has finished its queue, before a clock is read."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize()


@contextmanager
def joined_team() -> Iterator[Team]:
    """Join the team by torchrun's environment variables, and leave it at the end. Without these
    variables the worker is alone.
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
        yield Team(rank, size, num_local, device, saving=None, control=None)
        return
    backend = dist.get_default_backend_for_device(device.type)
    dist.init_process_group(backend, rank=rank, world_size=size, timeout=_TIMEOUT)
    try:
        saving, control = (dist.new_group(backend="gloo", timeout=_TIMEOUT) for _ in range(2))
        yield Team(rank, size, num_local, device, saving, control)
    finally:
        dist.destroy_process_group()
