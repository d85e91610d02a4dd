"""Held-out loss of a decoder, in total and by document; at step 0 also of the base inside it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import numpy as np
import torch

from dus_cli.data.streams import IGNORED, RowsInOrder
from dus_cli.heal.train.batches import stacked
from dus_cli.models.decoder import Decoder
from dus_cli.models.losses import loss_sums
from dus_cli.models.stopping import Brake
from dus_cli.models.team import Team

# The most sums by document. With more documents neighbours share one, because every checkpoint
# holds the base's.
_MAX_UNITS = 1024


class MeanLoss(NamedTuple):
    """Mean cross-entropy in nats over the labelled tokens, and its two sums by unit: nats and
    tokens of a document, or of as many neighbouring ones as there must be for few units.
    """

    mean: float
    nats: tuple[float, ...]
    tokens: tuple[float, ...]


def mean_loss(
    decoder: Decoder, rows: RowsInOrder, team: Team, rows_at_once: int, brake: Brake
) -> MeanLoss:
    """The loss over the rows, which the workers share out.

    Raises:
        StopRequested: by a signal.
    """
    decoder.model.eval()
    total, count = 0.0, 0.0
    per_unit = -(-max(1, rows.num_documents) // _MAX_UNITS)
    by_unit = np.zeros((2, -(-max(1, rows.num_documents) // per_unit)))
    # Every worker makes the same number of forward passes, as FSDP needs; spare ones are not
    # counted.
    for start in range(0, len(rows), rows_at_once * team.size):
        first = start + team.rank * rows_at_once
        mine = rows[first : first + rows_at_once]  # a slice reads its rows
        batch = stacked(mine or rows[:1], len(mine), team.device)
        each = torch.zeros(batch.labels.numel(), dtype=torch.float32, device=team.device)
        with torch.no_grad():
            hidden = decoder.hidden(batch.input_ids, batch.position_ids)
            _, loss, _ = loss_sums(
                hidden,
                decoder.output,
                batch.labels,
                head=decoder.head,
                between=brake.check_if_alone,
                each=each,
            )
        total += float(loss)
        count += batch.num_labels
        losses = each.view_as(batch.labels).cpu().double().numpy()
        counted = (batch.labels != IGNORED).cpu().numpy()
        for k in range(len(mine)):
            units = rows.label_documents(first + k) // per_unit
            for row, amounts in enumerate((losses[k], counted[k])):
                by_unit[row] += np.bincount(units, amounts, by_unit.shape[1])
    brake.check()
    total, count = team.sum([total, count])
    nats, tokens = (tuple(team.sum(sums.tolist())) for sums in by_unit)
    return MeanLoss(total / count, nats, tokens)


def mean_losses(
    decoder: Decoder,
    sets: Mapping[str, RowsInOrder],
    team: Team,
    rows_at_once: int,
    brake: Brake,
) -> dict[str, MeanLoss]:
    """The mean loss of each held-out set, by its name.

    Raises:
        StopRequested: by a signal.
    """
    return {
        name: mean_loss(decoder, rows, team, rows_at_once, brake) for name, rows in sets.items()
    }
