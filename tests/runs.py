"""Runs of `dus heal` seen from outside: their processes and their steps."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
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


def are_gone(out: Path) -> bool:
    """Whether nobody works on this output any more, or soon: a checkpoint may be on its way to a
    busy disk.
    """
    return until(lambda: not any(processes(out).values()), 60)


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
