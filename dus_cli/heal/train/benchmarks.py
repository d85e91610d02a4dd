"""Tasks of lm-evaluation-harness, run on the model under training."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dus_cli.evaluation.tasks import Harness, open_harness
from dus_cli.heal.run import Run
from dus_cli.models.decoder import Decoder
from dus_cli.progress import NoProgress


def open_benchmarks(run: Run) -> Benchmarks | None:
    """The tasks of a run with their data; None if it has none. Every worker opens them.

    Raises:
        DusError: the harness is not installed, or lacks a task or its data.
    """
    tasks = run.keeping.tasks
    if tasks is None:
        return None
    return Benchmarks(open_harness(tasks.options, NoProgress()), run)


@dataclass(frozen=True)
class Benchmarks:
    """Every worker runs all requests, because FSDP needs the same forward passes of each."""

    harness: Harness
    run: Run

    def scores(self, student: Decoder, rows_at_once: int) -> list[dict[str, Any]]:
        """The scores of every task, as `evaluation.tasks.TaskScore` in JSON.

        Raises:
            StopRequested: a signal came.
            EvaluationError: the harness fails.
        """
        student.model.eval()
        # the harness seeds torch, and ties weights that FSDP has split
        student.model.tie_weights = lambda *_, **__: None
        try:
            with torch.random.fork_rng(), torch.no_grad():
                scores = self.harness.scores(
                    student.model,
                    Path(self.run.model),
                    "the model",
                    rows_at_once=rows_at_once,
                    special_tokens=bool(self.run.options["data.special_tokens"]),
                )
        finally:
            del student.model.tie_weights
            student.reshard()
        return [score.to_json() for score in scores]
