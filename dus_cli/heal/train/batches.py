"""Split a step's rows over the workers; the result does not depend on the split."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dus_cli.data.growing import AnyRows
from dus_cli.data.streams import IGNORED, Row, Rows
from dus_cli.models.stopping import Brake
from dus_cli.models.team import Team

# Seconds between two looks for rows that are not tokenised yet.
_POLL = 0.1


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model at once: int64 (rows, length); a label of -100 is ignored."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORED).sum())


def wait_for(rows: AnyRows, indices: range, team: Team, brake: Brake) -> float:
    """Wait until the run's rows with these indices can be read on every worker; return the seconds
    waited. Every worker calls this.

    Raises:
        StopRequested: by a signal.
    """
    if isinstance(rows, Rows):
        return 0.0
    started, missing = time.perf_counter(), list(indices)
    while True:
        missing = [index for index in missing if not rows.has(index)]
        if not team.any(bool(missing)):
            return time.perf_counter() - started
        brake.check()
        time.sleep(_POLL)


def rows_of_a_worker(rows_per_step: int, num_workers: int) -> int:
    """The rows that each of so many workers has in a step, at most."""
    return -(-rows_per_step // num_workers)


def micro_batches(
    rows: AnyRows, step: int, rows_per_step: int, at_once: int, team: Team
) -> list[MicroBatch]:
    """The worker's micro-batches of a step, counting from 0. Every worker has the same number of
    them.

    Row i of the step goes to worker i mod size; a worker that has fewer repeats a row without
    labels.
    """
    first = step * rows_per_step
    most = rows_of_a_worker(rows_per_step, team.size)
    mine = [rows.row(first + i) for i in range(team.rank, rows_per_step, team.size)]
    return list(_stacked(mine, most, at_once, rows, first, team))


def _stacked(
    mine: list[Row], most: int, at_once: int, rows: AnyRows, first: int, team: Team
) -> Iterator[MicroBatch]:
    spare = rows.row(first) if len(mine) < most else None
    padded = [*mine, *([spare] * (most - len(mine)))]
    for start in range(0, most, at_once):
        group = [row for row in padded[start : start + at_once] if row is not None]
        yield stacked(group, max(0, len(mine) - start), team.device)


def stacked(rows: Sequence[Row], num_labelled: int, device: torch.device) -> MicroBatch:
    """Stack rows to a micro-batch on a device; the labels of all rows after the first
    `num_labelled` are ignored.
    """
    labels = np.stack([row.labels for row in rows])
    labels[num_labelled:] = IGNORED
    return MicroBatch(
        torch.from_numpy(np.stack([row.input_ids for row in rows])).to(device),
        torch.from_numpy(labels).to(device),
        torch.from_numpy(np.stack([row.position_ids for row in rows])).to(device),
    )
