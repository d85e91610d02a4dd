"""Held-out loss of a decoder; at step 0 also of the base inside it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from dus_cli.data.streams import Row
from dus_cli.heal.train.batches import stacked
from dus_cli.models.decoder import Decoder
from dus_cli.models.losses import loss_sums
from dus_cli.models.stopping import Brake
from dus_cli.models.team import Team


def mean_loss(
    decoder: Decoder, rows: Sequence[Row], team: Team, rows_at_once: int, brake: Brake
) -> float:
    """Mean cross-entropy in nats over the labelled tokens of the rows, which the workers share out.

    Raises:
        StopRequested: by a signal.
    """
    decoder.model.eval()
    total, count = 0.0, 0.0
    # Every worker makes the same number of forward passes, as FSDP needs; spare ones are not
    # counted.
    for start in range(0, len(rows), rows_at_once * team.size):
        first = start + team.rank * rows_at_once
        mine = rows[first : first + rows_at_once]  # a slice reads its rows
        batch = stacked(mine or rows[:1], len(mine), team.device)
        with torch.no_grad():
            hidden = decoder.hidden(batch.input_ids, batch.position_ids)
            _, loss, _ = loss_sums(
                hidden, decoder.output, batch.labels, decoder.head, between=brake.check_if_alone
            )
        total += float(loss)
        count += batch.num_labels
    brake.check()
    total, count = team.sum([total, count])
    return total / count


def mean_losses(
    decoder: Decoder,
    sets: Mapping[str, Sequence[Row]],
    team: Team,
    rows_at_once: int,
    brake: Brake,
) -> dict[str, float]:
    """The mean loss of each held-out set, by its name.

    Raises:
        StopRequested: by a signal.
    """
    return {
        name: mean_loss(decoder, rows, team, rows_at_once, brake) for name, rows in sets.items()
    }
