"""The training of a run on one worker, from the first measurement to the healed model: the loop to
read first.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from dus_cli.data.growing import AnyRows, GrowingRows
from dus_cli.data.streams import RowsInOrder
from dus_cli.errors import HealError
from dus_cli.heal.metrics import MetricsFile
from dus_cli.heal.proof.publish import Publication
from dus_cli.heal.run import REPORT, Run
from dus_cli.heal.tracking import Tracker
from dus_cli.heal.train import schedule
from dus_cli.heal.train.batches import micro_batches, wait_for
from dus_cli.heal.train.benchmarks import Benchmarks
from dus_cli.heal.train.checkpoints import Checkpoints
from dus_cli.heal.train.evaluate import MeanLoss, mean_losses
from dus_cli.heal.train.fitting import Peak
from dus_cli.heal.train.lesson import Lesson
from dus_cli.heal.train.loading import load
from dus_cli.heal.train.optimizer import Optimizer
from dus_cli.heal.train.pushing import Pusher
from dus_cli.heal.train.state import TrainState
from dus_cli.models.decoder import Decoder
from dus_cli.models.devices import peak_memory_bytes
from dus_cli.models.stopping import Signals
from dus_cli.models.team import Team
from dus_cli.release.within import BasePlan

# Seconds between two looks at a push, once there is nothing else to do.
_PUSH_POLL = 0.2

# A pilot's steps at least: the first is left out, because it is slower.
_FEWEST_STEPS = 3


@dataclass(frozen=True)
class RunLog:
    """Where the first worker writes the figures of a run."""

    metrics: MetricsFile
    tracker: Tracker

    def write(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)
        self.tracker.log(row)

    def close(self) -> None:
        self.metrics.close()
        self.tracker.close()


@dataclass(kw_only=True)
class Training:
    """A run on one worker; `set_up` makes it ready. Every method is called by every worker.

    Attributes:
        rows: those to train on.
        heldout: the rows of each held-out set, by its name.
        progress: how far the run is.
        log: None on all workers but the first.
        benchmarks: the tasks to run; None if there are none.
        pusher: pushes exports; None if there is nothing to push, and on all workers but the first.
        rows_at_once: rows of a micro-batch.
        peak: of one device.
    """

    run: Run
    team: Team
    signals: Signals
    lesson: Lesson
    rows: AnyRows
    heldout: Mapping[str, RowsInOrder]
    checkpoints: Checkpoints
    optimizer: Optimizer
    progress: TrainState
    publication: Publication
    log: RunLog | None
    benchmarks: Benchmarks | None
    pusher: Pusher | None
    rows_at_once: int
    peak: Peak
    _saved_at: float = field(init=False, default_factory=time.monotonic)

    # --- the loop ---------------------------------------------------------------------------------

    def go(self) -> None:
        """Train until the budget or the goal ends it.

        Raises:
            OutputError: there is no room for a checkpoint and the healed model.
            StopRequested: a signal did; `keep` saves what there is.
        """
        progress = self.progress
        if not self._is_over():
            self.checkpoints.check_room(self.optimizer.tensors(), self.publication.num_bytes)
        self.lesson.brake_at_layers(self.rows_at_once * self.run.seq_length)
        self.signals.cooperate()
        if progress.step == 0 and progress.scaled_loss is None:
            self._measure_start()
        self._export_when_due(again=False)
        while progress.unmeasured is not None or not self._is_over():
            if progress.unmeasured is None:  # else a signal came in the middle of its measurement
                started = time.perf_counter()
                row = self._step()
                progress.step, progress.unmeasured = progress.step + 1, row
                progress.seconds += time.perf_counter() - started
            row = progress.unmeasured
            if self._evaluates():
                started = time.perf_counter()
                row |= self._evaluate()
                progress.seconds += time.perf_counter() - started
            progress.unmeasured = None
            row |= self._pushed()
            row["seconds"] = self.lesson.clock.lap()
            self._write_row(row)
            self._check_streak(row)
            self._save_when_due()
            self._export_when_due(again=True)
        self._save()
        with self.signals.grace_extended():
            self.checkpoints.finish()
        while self.team.first_decides(self.pusher is not None and self.pusher.is_busy):
            self.lesson.brake.check()
            time.sleep(_PUSH_POLL)
            self._pushed()

    def pilot(self, seconds: float) -> None:
        """Make the run's first steps for so long, and write how fast they were and the memory that
        they took as the report. Nothing is measured on held-out text and nothing is saved.

        Raises:
            HealError: the steps fail, as the run's own would.
            StopRequested: a signal came.
        """
        self.lesson.brake_at_layers(self.rows_at_once * self.run.seq_length)
        self.signals.cooperate()
        took: list[float] = []
        while len(took) < self.run.num_steps and (
            len(took) < _FEWEST_STEPS or self.team.first_decides(sum(took) < seconds)
        ):
            started = time.perf_counter()
            row = self._step()
            self.progress.step += 1
            took.append(time.perf_counter() - started)
            self._write_row(row | {"seconds": self.lesson.clock.lap()})
            self._check_streak(row)
        steady = took[1:] or took
        peak = self.team.max(float(peak_memory_bytes(self.team.device)))
        found = {
            "steps": len(took),
            "seconds": sum(took),
            "tokens_per_second": len(steady) * self.run.tokens_per_step / sum(steady),
            "peak_memory_bytes": int(peak),
        }
        if self.log is not None:
            self.log.close()
            (self.run.folder / REPORT).write_text(json.dumps(found), encoding="utf-8")

    def keep(self) -> None:
        """Save the last finished step, after `StopRequested`; before the start is measured there is
        nothing to save.
        """
        if self.pusher is not None:
            self.pusher.stop()
        if self.progress.scaled_loss is None:
            return
        with self.signals.grace_extended():
            self._save()
            self.checkpoints.finish()

    def _is_over(self) -> bool:
        reached = self.run.until == "base" and self.progress.evals_at_base >= 2
        return reached or self.progress.step >= self.run.num_steps

    def _step(self) -> dict[str, Any]:
        """Make one step: gradients over all micro-batches, then the update, unless it would do
        harm.
        """
        run, team, step = self.run, self.team, self.progress.step
        self.lesson.student.model.train()
        started = time.perf_counter()
        with self.lesson.clock("data"):
            self.lesson.brake.check()
            first = step * run.rows_per_step
            indices = range(first, first + run.rows_per_step)
            waited = wait_for(self.rows, indices, team, self.lesson.brake)
            batches = micro_batches(self.rows, step, run.rows_per_step, self.rows_at_once, team)
            counted = team.sum([sum(batch.num_labels for batch in batches)])[0]
        kl_weight = schedule.distill_weight(run.recipe, step)
        sums = [0.0, 0.0]
        for batch in batches:
            cross_entropy, divergence = self.lesson.backward(batch, counted, kl_weight)
            sums = [sums[0] + cross_entropy, sums[1] + divergence]
        self.lesson.brake.check()
        with self.lesson.clock("optimizer"), self.signals.grace_extended():
            loss, divergence = (total / counted for total in team.sum(sums))
            norm = self.optimizer.gradient_norm()
            share = schedule.rate_share(run.recipe, step, run.num_steps)
            skipped = self.progress.is_spike(loss) or not math.isfinite(norm)
            if skipped:
                self.optimizer.clear()
            else:
                self.optimizer.step(share, norm, step)
                self.progress.saw(loss)
        self.progress.skipped += skipped
        self.progress.skipped_in_a_row = self.progress.skipped_in_a_row + 1 if skipped else 0
        per_second = run.tokens_per_step / (time.perf_counter() - started)
        row: dict[str, Any] = {"step": step + 1, "tokens": (step + 1) * run.tokens_per_step}
        row |= {
            "loss": loss,
            "lr": share * run.recipe.lr,
            "grad_norm": norm,
            "tokens_per_second": round(per_second, 1),
        }
        if kl_weight:
            row["kl"] = divergence
        if isinstance(self.rows, GrowingRows):
            row["waited"] = round(waited, 4)
        return row | {
            "mfu": self._mfu(per_second),
            "peak_memory_bytes": peak_memory_bytes(self.team.device),
            "skipped": skipped,
        }

    def _mfu(self, tokens_per_second: float) -> float | None:
        """The share of all devices' peak FLOP/s; None if above 1, because then the peak was
        measured beside other work.
        """
        peak = self.peak.flops * self.team.size
        share = round(tokens_per_second * self.publication.flops_per_token / peak, 4)
        return share if share <= 1 else None

    # --- around the loop --------------------------------------------------------------------------

    def _measure_start(self) -> None:
        """Measure the base's loss and the scaled model's, and write the row of step 0."""
        with self.lesson.clock("eval"):
            progress = self.progress
            if self.run.base is not None:
                progress.measured_base(self._base_losses(self.run.base))
            losses = self._mean_losses(self.lesson.student)
            progress.measured(losses)
            scores = self._task_scores()
            progress.scaled_loss = progress.take("scaled", losses)
        row: dict[str, Any] = {"step": 0, "tokens": 0, **self._measured(), **scores}
        if progress.base_loss is not None:
            row["base_loss"] = progress.base_loss
            row |= {"base_losses": named} if (named := progress.losses("base")) else {}
        self._write_row(row | {"seconds": self.lesson.clock.lap()})

    def _measured(self) -> dict[str, Any]:
        """The fields of a measurement in a row of metrics.jsonl."""
        progress = self.progress
        row: dict[str, Any] = {"eval_loss": progress.eval_loss}
        if progress.intervals:
            row["difference_interval"] = next(iter(progress.intervals.values()))
        if named := progress.losses("now"):
            row["eval_losses"] = named
            row |= {"difference_intervals": progress.intervals} if progress.intervals else {}
        return row

    def _base_losses(self, base: BasePlan) -> dict[str, MeanLoss]:
        """Measure the base's layers inside the model; if a start scaled them, the base itself."""
        if base.folder is None:
            with self.lesson.student.only(base.layers):
                return self._mean_losses(self.lesson.student)
        return self._mean_losses(self.lesson.teacher or load(self.run, self.team, is_base=True))

    def _evaluates(self) -> bool:
        return (
            self.progress.step % self.run.keeping.eval_every == 0
            or self.progress.step == self.run.num_steps
        )

    def _evaluate(self) -> dict[str, Any]:
        with self.lesson.clock("eval"):
            losses = self._mean_losses(self.lesson.student)
            scores = self._task_scores()
        self.progress.measured(losses)
        return self._measured() | scores

    def _task_scores(self) -> dict[str, Any]:
        """Run the tasks, if they are due with this measurement; the field of metrics.jsonl."""
        step, num_steps = self.progress.step, self.run.num_steps
        number = -(-step // self.run.keeping.eval_every)
        tasks = self.run.keeping.tasks
        if tasks is None or self.benchmarks is None or (number % tasks.every and step < num_steps):
            return {}
        scores = self.benchmarks.scores(self.lesson.student, self.rows_at_once)
        self.progress.scored(scores)
        return {"tasks": {score["label"]: score["value"] for score in scores}}

    def _mean_losses(self, decoder: Decoder) -> dict[str, MeanLoss]:
        return mean_losses(decoder, self.heldout, self.team, self.rows_at_once, self.lesson.brake)

    def _write_row(self, row: dict[str, Any]) -> None:
        if self.log is not None:
            self.log.write(row)

    def _check_streak(self, row: dict[str, Any]) -> None:
        if self.progress.skipped_in_a_row < self.run.recipe.max_skipped:
            return
        last = row["step"] * self.run.rows_per_step
        source, place = self.rows.place(last - self.run.rows_per_step)
        raise HealError(
            f"{self.progress.skipped_in_a_row} steps in a row had a loss or gradient out of "
            f"bounds, the last of them step {row['step']} (rows {last - self.run.rows_per_step} to "
            f"{last - 1}, the first at token {place:,} of source {source + 1}; loss "
            f"{row['loss']:.4g}, gradient norm {row['grad_norm']:.4g}); the last good checkpoint "
            "is kept: look at that data, or lower --lr"
        )

    def _save_when_due(self) -> None:
        with self.signals.grace_extended():
            self.checkpoints.poll()
        if self.progress.skipped_in_a_row:
            return  # a checkpoint must be a state worth going back to
        keeping = self.run.keeping
        if keeping.save_every_steps is not None:
            is_due = self.progress.step % keeping.save_every_steps == 0
        else:
            assert keeping.save_every_seconds is not None
            is_due = self.team.first_decides(
                time.monotonic() - self._saved_at >= keeping.save_every_seconds
            )
        if is_due:
            self._save()

    def _export_when_due(self, *, again: bool) -> None:
        """Write the model as it is beside the run, if that is due. When a run starts (not `again`),
        only if a kill prevented it.
        """
        keeping, step = self.run.keeping, self.progress.step
        if not step or not keeping.is_exported(step) or self._is_over():
            return
        folder = self.run.export_folder(step)
        if again or self.team.first_decides(not folder.exists()):
            self._publish(folder)
        if self.pusher is not None and keeping.push_every and step % keeping.push_every == 0:
            self.pusher.push(step, folder)

    def _pushed(self) -> dict[str, Any]:
        """The field of metrics.jsonl about a push that ended, if one did."""
        outcome = None if self.pusher is None else self.pusher.outcome()
        if outcome is None:
            return {}
        self.progress.pushes.append(outcome)
        return {"push": outcome}

    def _save(self) -> None:
        self.progress.adam_steps = self.optimizer.steps()
        with self.signals.grace_extended():
            self.checkpoints.save(
                self.progress.step, self.optimizer.tensors(), asdict(self.progress)
            )
        self._saved_at = time.monotonic()

    def publish(self) -> None:
        """Write the healed model with its proof, and give it the run's place."""
        models = 1 if self.run.keeping.average is None else 2
        self.checkpoints.check_room({}, models * self.publication.num_bytes)
        if self.log is not None:
            self.log.close()
        averaged: list[int] = []
        if self.run.keeping.average is not None:
            averaged = self.checkpoints.averaged()
            means = self.checkpoints.means(averaged, self.optimizer.tensors())
            self.publication.publish_mean(means, averaged, self.lesson.brake)
        self._publish(None, averaged)

    def _publish(self, exported: Path | None, averaged: Sequence[int] = ()) -> None:
        self.publication.publish(
            self.optimizer,
            self.progress,
            peak=self.peak,
            brake=self.lesson.brake,
            exported=exported,
            averaged=averaged,
        )
