"""Runs of `dus heal` seen from outside: their processes and their steps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

# Longer than any start on a busy machine.
PATIENCE = 240.0


def processes(out: Path) -> dict[str, list[int]]:
    """Whoever has this output in its command line: the launcher, torchrun, the process that
    tokenises, the workers.
    """
    found: dict[str, list[int]] = {"launcher": [], "torchrun": [], "tokenising": [], "worker": []}
    for folder in Path("/proc").iterdir():
        try:
            words = (
                os.fsdecode((folder / "cmdline").read_bytes()).split("\0")
                if folder.name.isdigit()
                else []
            )
        except OSError:
            continue
        if not any(word in (str(out), str(out / "run.json")) for word in words):
            continue
        modules = {
            "torch.distributed.run": "torchrun",
            "dus_cli.heal.launch.tokenising": "tokenising",
        }
        kind = next((modules[word] for word in words if word in modules), "worker")
        found["launcher" if "heal" in words else kind].append(int(folder.name))
    return found


def are_gone(out: Path, pids: Iterable[int] = ()) -> bool:
    """Whether nobody works on this output any more, nor any of these processes, or soon: a
    checkpoint may be on its way to a busy disk.
    """
    seen = set(pids)

    def is_so() -> bool:
        now = [pid for found in processes(out).values() for pid in found]
        seen.update(now)
        return not now and all(map(_has_ended, seen))

    return until(is_so, 60)


def _has_ended(pid: int) -> bool:
    """Whether the kernel has closed a process's files. Its command line is gone before, and then it
    may still hold a lock.
    """
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return True
    return state in "ZX"


def until(is_so: Callable[[], object], seconds: float = PATIENCE) -> bool:
    """Wait for something."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def last_step(out: Path) -> int:
    """The last step in metrics.jsonl, complete lines only."""
    path = out / "metrics.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return int(json.loads(lines[-1])["step"]) if lines else -1
