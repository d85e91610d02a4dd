"""The training of a run on one worker, from the model's loading to the healed model: the loop to
read first.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from dus_cli.data.streams import Prepared, Rows, heldout_sets
from dus_cli.errors import HealError
from dus_cli.heal.estimate import num_shards
from dus_cli.heal.metrics import MetricsFile
from dus_cli.heal.proof.publish import Publication
from dus_cli.heal.run import KeepingPlan, Run
from dus_cli.heal.tracking import open_tracker
from dus_cli.heal.train import schedule
from dus_cli.heal.train.batches import MicroBatch, micro_batches
from dus_cli.heal.train.checkpoints import Checkpoints, MeanOf
from dus_cli.heal.train.evaluate import mean_losses
from dus_cli.heal.train.fitting import peak_flops, rows_at_once
from dus_cli.heal.train.loading import load
from dus_cli.heal.train.optimizer import Optimizer
from dus_cli.heal.train.rates import rate_scales
from dus_cli.heal.train.state import TrainState
from dus_cli.models.decoder import Decoder
from dus_cli.models.devices import peak_memory_bytes
from dus_cli.models.losses import Teaching, loss_sums
from dus_cli.models.stopping import Brake, Signals
from dus_cli.models.team import Team
from dus_cli.release.within import BasePlan


class _Clock:
    """Seconds by kind of work, the device waited for."""

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


def _mean_of(keeping: KeepingPlan) -> MeanOf | None:
    if keeping.average is None or keeping.save_every_steps is None:
        return None
    return MeanOf(keeping.average, keeping.save_every_steps)


class Training:
    """A run on one worker: what it holds, and the steps. Every method is called by every worker."""

    def __init__(self, run: Run, team: Team, signals: Signals) -> None:
        torch.manual_seed(run.recipe.seed)
        self.run, self.team, self._signals = run, team, signals
        self.brake = Brake(team, lambda: signals.is_asked)
        self.clock = _Clock(team)
        self.checkpoints = Checkpoints(
            run.checkpoints_folder, team, run.keeping.keep, _mean_of(run.keeping)
        )
        self.student = load(run, team)
        self.publication = Publication(run, self.student, team)
        data = Prepared.from_json(run.data)
        self.rows = Rows(
            data,
            run.tokens_folder,
            run.seq_length,
            seed=run.recipe.seed,
            document_mask=run.document_mask,
        )
        self.heldout = heldout_sets(
            data,
            run.tokens_folder,
            run.seq_length,
            document_mask=run.document_mask,
            max_tokens=run.keeping.eval_tokens,
        )
        row = next(iter(self.heldout.values()))[0]
        ids = torch.from_numpy(row.input_ids)[None, :64].to(team.device)
        self.student.check_loss(ids, torch.arange(ids.shape[1], device=team.device)[None])
        if run.document_mask:
            self.student.check_documents(ids)
        self.teacher = load(run, team, is_base=True) if run.recipe.distill_weight > 0 else None
        if self.teacher is not None:
            self.teacher.check_loss(ids, torch.arange(ids.shape[1], device=team.device)[None])
        scales = rate_scales(self.student, run.recipe.rates)
        shards = num_shards(run.fit.sharding, team.size, team.num_local)
        self.optimizer = Optimizer(
            self.student.parameters,
            run.recipe,
            team,
            masters=run.fit.master_weights == "fp32",
            num_replicas=team.size // shards,
            stored=self.publication.stored,
            scales=scales,
        )
        self.progress = self._resume()
        frozen = {name for name, scale in scales.items() if not scale}
        self.student.train_only(run.recipe.train_layers, frozen)
        self.optimizer.prepare(
            name for name, p in self.student.parameters.items() if p.requires_grad
        )
        # step 0 has a row too
        last = -1 if self.progress.scaled_loss is None else self.progress.step
        self.metrics = MetricsFile(run.metrics_path, last) if team.is_first else None
        self.tracker = open_tracker(
            run.keeping.track if team.is_first else "none", run.folder, asdict(run)
        )
        self.at_once = self._rows_at_once()
        self._saved_at = time.monotonic()
        self._peak = self._peak_flops()

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
        self._set_brakes()
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
            row["seconds"] = self.clock.lap()
            self._log(row)
            self._check_streak(row)
            self._save_when_due()
            self._export_when_due(again=True)
        self._save()
        with self._signals.held():
            self.checkpoints.finish()

    def _set_brakes(self) -> None:
        """From here on the workers stop together, at the next layer where a pass takes long."""
        tokens = self.at_once * self.run.seq_length
        self.student.brake_at_layers(self.brake, tokens)
        if self.teacher is not None:
            self.teacher.brake_at_layers(self.brake, tokens)
        self._signals.cooperate()

    def keep(self) -> None:
        """Save the last finished step, after `StopRequested`. Of step 0 there is only what was
        measured.
        """
        if self.progress.scaled_loss is None:
            return
        with self._signals.held():
            self._save()
            self.checkpoints.finish()

    def _is_over(self) -> bool:
        reached = self.run.until == "base" and self.progress.evals_at_base >= 2
        return reached or self.progress.step >= self.run.num_steps

    def _step(self) -> dict[str, Any]:
        """One step: gradients over all micro-batches, then the update, unless it would do harm."""
        run, team, step = self.run, self.team, self.progress.step
        self.student.model.train()
        started = time.perf_counter()
        with self.clock("data"):
            self.brake.check()
            batches = micro_batches(self.rows, step, run.rows_per_step, self.at_once, team)
            counted = team.sum([sum(batch.num_labels for batch in batches)])[0]
        kl_weight = schedule.distill_weight(run.recipe, step)
        sums = [0.0, 0.0]
        for batch in batches:
            cross_entropy, divergence = self._backward(batch, counted, kl_weight)
            sums = [sums[0] + cross_entropy, sums[1] + divergence]
        self.brake.check()
        with self.clock("optimizer"), self._signals.held():
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
        return row | {
            "mfu": self._mfu(per_second),
            "peak_memory_bytes": peak_memory_bytes(self.team.device),
            "skipped": skipped,
        }

    def _mfu(self, tokens_per_second: float) -> float | None:
        """Share of the peak of all devices; None over 1, which says that the peak was measured
        beside other work.
        """
        share = round(tokens_per_second * self.publication.flops_per_token / self._peak, 4)
        return share if share <= 1 else None

    def _backward(self, batch: MicroBatch, counted: float, kl_weight: float) -> tuple[float, float]:
        """Forward and backward of a micro-batch; its sums of cross-entropy and of KL."""
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
                between=self.brake.alone,
            )
        with self.clock("backward"):
            loss.backward()  # type: ignore[no-untyped-call]
        return float(cross_entropy), float(divergence)

    # --- around the loop --------------------------------------------------------------------------

    def _resume(self) -> TrainState:
        step = self.checkpoints.newest()
        if step is None:
            return TrainState()
        progress = TrainState(**self.checkpoints.state(step))
        self.optimizer.resume(progress.adam_steps)
        self.checkpoints.load(step, self.optimizer.tensors())
        return progress

    def _rows_at_once(self) -> int:
        run = self.run
        if run.fit.micro_batch_rows is not None:
            return run.fit.micro_batch_rows

        def trial(rows: int) -> None:
            batch = micro_batches(self.rows, 0, rows * self.team.size, rows, self.team)[0]
            self._backward(batch, 1.0, run.recipe.distill_weight)
            self.optimizer.clear()

        return rows_at_once(
            self.team, run.seq_length, -(-run.rows_per_step // self.team.size), trial
        )

    def _measure_start(self) -> None:
        """The base's loss and the scaled model's: rows of step 0."""
        with self.clock("eval"):
            progress = self.progress
            if self.run.base is not None:
                progress.base_loss = progress.take("base", self._base_losses(self.run.base))
            losses = self._mean_losses(self.student)
            progress.measured(losses)
            progress.scaled_loss = progress.take("scaled", losses)
        row: dict[str, Any] = {"step": 0, "tokens": 0, **self._measured()}
        if progress.base_loss is not None:
            row["base_loss"] = progress.base_loss
            row |= {"base_losses": named} if (named := progress.losses("base")) else {}
        self._log(row | {"seconds": self.clock.lap()})

    def _measured(self) -> dict[str, Any]:
        """What a row of metrics.jsonl says of a measurement."""
        row: dict[str, Any] = {"eval_loss": self.progress.eval_loss}
        return row | ({"eval_losses": named} if (named := self.progress.losses("now")) else {})

    def _base_losses(self, base: BasePlan) -> dict[str, float]:
        """From the base's layers inside the model; where a start scaled them, from the base
        itself.
        """
        if base.folder is None:
            with self.student.only(base.layers):
                return self._mean_losses(self.student)
        return self._mean_losses(self.teacher or load(self.run, self.team, is_base=True))

    def _evaluates(self) -> bool:
        return (
            self.progress.step % self.run.keeping.eval_every == 0
            or self.progress.step == self.run.num_steps
        )

    def _evaluate(self) -> dict[str, Any]:
        with self.clock("eval"):
            losses = self._mean_losses(self.student)
        self.progress.measured(losses)
        return self._measured()

    def _mean_losses(self, decoder: Decoder) -> dict[str, float]:
        return mean_losses(decoder, self.heldout, self.team, self.at_once, self.brake)

    def _log(self, row: dict[str, Any]) -> None:
        if self.metrics is not None:
            self.metrics.write(row)
            self.tracker.log(row)

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
        with self._signals.held():
            self.checkpoints.poll()
        if self.progress.skipped_in_a_row:
            return  # a checkpoint is a state worth going back to
        keeping = self.run.keeping
        if keeping.save_every_steps is not None:
            is_due = self.progress.step % keeping.save_every_steps == 0
        else:
            assert keeping.save_every_seconds is not None
            is_due = self.team.first_says(
                time.monotonic() - self._saved_at >= keeping.save_every_seconds
            )
        if is_due:
            self._save()

    def _export_when_due(self, *, again: bool) -> None:
        """Write the model as it is beside the run; not `again` only where a kill came before."""
        every, step = self.run.keeping.export_every, self.progress.step
        if every is None or not step or step % every or self._is_over():
            return
        folder = self.run.export_folder(step)
        if again or self.team.first_says(not folder.exists()):
            self._publish(folder)

    def _save(self) -> None:
        self.progress.adam_steps = self.optimizer.steps()
        with self._signals.held():
            self.checkpoints.save(
                self.progress.step, self.optimizer.tensors(), asdict(self.progress)
            )
        self._saved_at = time.monotonic()

    def _peak_flops(self) -> float:
        dtype = next(iter(self.student.parameters.values())).dtype
        self.peak, self.peak_source = peak_flops(self.team.device, dtype)
        return self.peak * self.team.size

    def publish(self) -> None:
        """Write the healed model with its proof, and give it the run's place."""
        models = 1 if self.run.keeping.average is None else 2
        self.checkpoints.check_room({}, models * self.publication.num_bytes)
        if self.metrics is not None:
            self.metrics.close()
            self.tracker.close()
        averaged: list[int] = []
        if self.run.keeping.average is not None:
            averaged = self.checkpoints.averaged()
            means = self.checkpoints.means(averaged, self.optimizer.tensors())
            self.publication.publish_mean(means, averaged, self.brake)
        self._publish(None, averaged)

    def _publish(self, exported: Path | None, averaged: Sequence[int] = ()) -> None:
        self.publication.publish(
            self.optimizer,
            self.progress,
            self.peak,
            peak_source=self.peak_source,
            brake=self.brake,
            exported=exported,
            averaged=averaged,
        )
