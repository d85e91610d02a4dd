"""Run micro-batches forward and backward through the model that learns, and forward through its
teacher.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from dus_cli.heal.train.batches import MicroBatch
from dus_cli.models.decoder import Decoder
from dus_cli.models.losses import Teaching, loss_sums
from dus_cli.models.stopping import Brake
from dus_cli.models.team import Team


class Clock:
    """Seconds by kind of work, measured once the device is done with it."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self.seconds = dict.fromkeys(("data", "forward", "backward", "optimizer", "eval"), 0.0)

    @contextmanager
    def __call__(self, kind: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self._team.synchronize()
        self.seconds[kind] += time.perf_counter() - started

    def lap(self) -> dict[str, float]:
        """The seconds since the last lap."""
        seconds = {kind: round(value, 4) for kind, value in self.seconds.items()}
        self.seconds = dict.fromkeys(self.seconds, 0.0)
        return seconds


@dataclass(frozen=True)
class Lesson:
    """The model that learns, and its teacher: the base, if a KL term is asked for."""

    student: Decoder
    teacher: Decoder | None
    team: Team
    clock: Clock
    brake: Brake

    def backward(self, batch: MicroBatch, counted: float, kl_weight: float) -> tuple[float, float]:
        """Add a micro-batch's gradients.

        Args:
            batch: the rows.
            counted: labelled tokens of the whole step, over all workers; the loss is their mean.
            kl_weight: the weight of the KL term.

        Returns:
            The micro-batch's sums of cross-entropy and of KL, in nats.
        """
        teaching = None
        with self.clock("forward"):
            if kl_weight and self.teacher is not None:
                with torch.no_grad():
                    theirs = self.teacher.hidden(batch.input_ids, batch.position_ids).flatten(0, 1)
                teaching = Teaching(theirs, self.teacher.output, self.teacher.head, kl_weight)
            hidden = self.student.hidden(batch.input_ids, batch.position_ids)
            # FSDP averages over the team what is a sum over its tokens.
            scale = self.team.size / counted
            loss, cross_entropy, divergence = loss_sums(
                hidden,
                self.student.output,
                batch.labels,
                head=self.student.head,
                teaching=teaching,
                scale=scale,
                between=self.brake.check_if_alone,
            )
        with self.clock("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(cross_entropy), float(divergence)

    def brake_at_layers(self, num_tokens: int) -> None:
        """From here on the workers stop together, at the next layer where a pass takes long.

        Args:
            num_tokens: of a micro-batch, at most.
        """
        self.student.brake_at_layers(self.brake, num_tokens)
        if self.teacher is not None:
            self.teacher.brake_at_layers(self.brake, num_tokens)
