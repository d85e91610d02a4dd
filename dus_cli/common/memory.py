"""How much memory this machine has available, and when Python looks for garbage."""

from __future__ import annotations

import contextlib
import gc
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

# The share of free memory that is used: the rest is for buffers that no estimate includes, and for
# other programs.
_USABLE = 0.85

# Seconds to wait for nvidia-smi.
_TIMEOUT = 20


def available_bytes() -> int:
    """Bytes that a new process can use: 85% of the kernel's MemAvailable, within the container's
    limit.
    """
    free = 1 << 62
    with contextlib.suppress(OSError, ValueError, StopIteration):
        lines = Path("/proc/meminfo").read_text(encoding="ascii").splitlines()
        free = (
            int(next(line for line in lines if line.startswith("MemAvailable")).split()[1]) * 1024
        )
    with contextlib.suppress(OSError, ValueError):
        # "max", for no limit, raises ValueError
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text(encoding="ascii"))
        used = int(Path("/sys/fs/cgroup/memory.current").read_text(encoding="ascii"))
        free = min(free, max(0, limit - used))
    return int(free * _USABLE)


def smallest_gpu() -> tuple[str, int] | None:
    """Name and usable bytes of this machine's NVIDIA GPU with the least memory; None without one.

    nvidia-smi gives them: torch would keep a context on the GPU in a process that only plans.
    """
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return None
    command = [tool, "--query-gpu=name,memory.total", "--format=csv,noheader,nounits"]
    with contextlib.suppress(OSError, ValueError, subprocess.SubprocessError):
        answer = subprocess.run(
            command, capture_output=True, text=True, timeout=_TIMEOUT, check=True
        ).stdout
        rows = [line.rpartition(",") for line in answer.splitlines() if line.strip()]
        sizes = [(int(size), name.strip()) for name, _, size in rows]
        if sizes:
            size, name = min(sizes)
            return name, int(size * 1024 * 1024 * _USABLE)
    return None


@contextlib.contextmanager
def collector_paused() -> Iterator[None]:
    """Pause Python's garbage collector, for code that makes very many objects and no cycles: it
    would go through all of them again and again.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
