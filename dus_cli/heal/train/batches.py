"""Split a step's rows over the workers; the result does not depend on the split."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from dus_cli.data.streams import IGNORED, Row, Rows
from dus_cli.models.team import Team


@dataclass(frozen=True)
class MicroBatch:
    """Rows that go through the model at once: int64 (rows, length); a label of -100 is ignored."""

    input_ids: Tensor
    labels: Tensor
    position_ids: Tensor

    @property
    def num_labels(self) -> int:
        return int((self.labels != IGNORED).sum())


def micro_batches(
    rows: Rows, step: int, rows_per_step: int, at_once: int, team: Team
) -> list[MicroBatch]:
    """The worker's micro-batches of a step, counting from 0. Every worker has the same number of
    them.

    Row i of the step goes to worker i mod size; a worker that has fewer repeats a row without
    labels.
    """
    first = step * rows_per_step
    most = -(-rows_per_step // team.size)
    mine = [rows.row(first + i) for i in range(team.rank, rows_per_step, team.size)]
    return list(_stacked(mine, most, at_once, rows, first, team))


def _stacked(
    mine: list[Row], most: int, at_once: int, rows: Rows, first: int, team: Team
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
