"""Held-out loss: of the model, and at step 0 of the base inside it, from the same weights."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from dus_cli.heal.model import Decoder
from dus_cli.heal.objective import IGNORED, loss_sums
from dus_cli.heal.team import Team
from dus_cli.heal.tokens import Row


def mean_loss(decoder: Decoder, rows: Sequence[Row], team: Team, rows_at_once: int) -> float:
    """Mean cross-entropy in nats over the labelled tokens of the rows, which the workers share out."""
    decoder.model.eval()
    total, count = 0.0, 0.0
    # Every worker makes the same number of forwards, as FSDP needs: spare ones count nothing.
    for start in range(0, len(rows), rows_at_once * team.size):
        mine = rows[start + team.rank * rows_at_once :][:rows_at_once]
        if start + team.rank * rows_at_once >= len(rows):
            mine = rows[:1]
        ids, labels, positions = (
            torch.stack([torch.from_numpy(getattr(row, field)) for row in mine]).to(team.device)
            for field in ("input_ids", "labels", "position_ids")
        )
        if start + team.rank * rows_at_once >= len(rows):
            labels = torch.full_like(labels, IGNORED)
        with torch.no_grad():
            hidden = decoder.hidden(ids, positions)
            _, loss, _ = loss_sums(hidden, decoder.output, labels, decoder.head)
        total += float(loss)
        count += float((labels != IGNORED).sum())
    total, count = team.sum([total, count])
    return total / count


def base_loss(decoder: Decoder, layers: Sequence[int], rows: Sequence[Row], team: Team, rows_at_once: int) -> float:
    """The base's held-out loss, from the layers of an untrained up-scaled model that are the base."""
    with decoder.only(layers):
        return mean_loss(decoder, rows, team, rows_at_once)
