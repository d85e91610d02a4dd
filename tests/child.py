"""What a process that tiny.py forks runs. Each of them imports this module anew, so it imports
nothing that the server has not imported: pytest alone would take as long as a short command.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
from pathlib import Path


def run(
    log: str, environment: dict[str, str], target: str, arguments: list[str], first: str
) -> None:
    """Redirect output to `log` and `log`.err, then run `first`, which is Python code, and the
    program.
    """
    gc.freeze()  # else the first collection copies the memory of all imported modules
    for stream, path in ((sys.stdout, log), (sys.stderr, f"{log}.err")):
        stream.flush()
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), stream.fileno())
    os.environ.update(environment)
    sys.path[:0] = environment.get("PYTHONPATH", "").split(os.pathsep)
    import torch

    torch.set_num_threads(int(environment.get("OMP_NUM_THREADS", "1")))
    # a shell's background jobs ignore SIGINT
    signal.signal(signal.SIGINT, signal.default_int_handler)
    exec(first, {})  # noqa: S102  (a test's own)
    if target == "dus":
        from dus_cli.cli import main

        sys.argv = ["dus", *arguments]
        main()
    elif target == "logits":
        _save_logits(*map(Path, arguments))
    else:
        from dus_cli.heal import worker

        sys.exit(worker.main(arguments))


def _save_logits(run_path: Path, folder: Path) -> None:
    """A worker that loads its part of a run's model and writes the whole model's logits for some
    bytes.
    """
    import torch

    from dus_cli.heal.run import read_run
    from dus_cli.heal.train.loading import load
    from dus_cli.models.team import joined_team

    with joined_team() as team, torch.no_grad():
        decoder = load(read_run(run_path), team)
        ids = torch.arange(48).reshape(2, 24)
        logits = decoder.model(input_ids=ids, use_cache=False).logits
        torch.save(logits, folder / f"logits-{team.size}-{team.rank}.pt")
