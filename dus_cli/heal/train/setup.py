"""Make a worker's training ready: load and check the models, open the data, read the newest
checkpoint.
"""

from __future__ import annotations

import sys

import torch

from dus_cli.data.growing import AnyRows, open_rows
from dus_cli.data.streams import Prepared, heldout_sets
from dus_cli.errors import HealError, reason_of
from dus_cli.heal.estimate import num_shards
from dus_cli.heal.metrics import MetricsFile, read_metrics
from dus_cli.heal.proof.publish import prepare_publication
from dus_cli.heal.run import Run, SavingPlan
from dus_cli.heal.tracking import open_tracker
from dus_cli.heal.train.batches import micro_batches, rows_of_a_worker, wait_for
from dus_cli.heal.train.benchmarks import open_benchmarks
from dus_cli.heal.train.checkpoints import Checkpoints, MeanOf, open_checkpoints
from dus_cli.heal.train.fitting import peak_flops, rows_at_once, rows_on_a_cpu
from dus_cli.heal.train.lesson import Clock, Lesson
from dus_cli.heal.train.loading import load
from dus_cli.heal.train.loop import RunLog, Training
from dus_cli.heal.train.optimizer import Optimizer, local
from dus_cli.heal.train.pushing import Pusher
from dus_cli.heal.train.rates import rate_scales
from dus_cli.heal.train.state import TrainState
from dus_cli.models.compiled import CompiledLayers
from dus_cli.models.stopping import Brake, Signals
from dus_cli.models.team import Team

# How far the loss and the gradient's norm of compiled layers may be from those of plain ones.
_ROUNDING = 0.03


def set_up(run: Run, team: Team, signals: Signals) -> Training:
    """Make a run's training ready on this worker, from the newest checkpoint on. Every worker calls
    this.

    Raises:
        LoadError: transformers cannot load the model or its base.
        HealError: the model could not be trained or written back as it is, or the checkpoint
            cannot be read.
    """
    torch.manual_seed(run.recipe.seed)
    checkpoints = open_checkpoints(
        run.checkpoints_folder, team, run.keeping.keep, _mean_of(run.keeping)
    )
    student = load(run, team)
    publication = prepare_publication(run, student, team)
    data = Prepared.from_json(run.data)
    rows = open_rows(
        data, run.tokens_folder, run.seq_length, run.recipe.seed, document_mask=run.document_mask
    )
    heldout = heldout_sets(
        data,
        run.tokens_folder,
        run.seq_length,
        document_mask=run.document_mask,
        max_tokens=run.keeping.eval_tokens,
    )
    row = next(iter(heldout.values()))[0]
    ids = torch.from_numpy(row.input_ids)[None, :64].to(team.device)
    positions = torch.arange(ids.shape[1], device=team.device)[None]
    student.check_loss(ids, positions)
    if run.document_mask:
        student.check_documents(ids)
    teacher = load(run, team, is_base=True) if run.recipe.distill_weight > 0 else None
    if teacher is not None:
        teacher.check_loss(ids, positions)
    lesson = Lesson(student, teacher, team, Clock(team), Brake(team, lambda: signals.is_received))
    scales = rate_scales(student, run.recipe.rates)
    student.train_only(
        run.recipe.train_layers, {name for name, scale in scales.items() if not scale}
    )
    # before the optimizer's memory is taken, because it runs the plain layers, too
    is_compiled = _compile(run, rows, lesson)
    optimizer = Optimizer(
        student.parameters,
        run.recipe,
        team,
        masters=run.fit.master_weights == "fp32",
        num_replicas=team.size // num_shards(run.fit.sharding, team.size, team.num_local),
        stored=publication.stored,
        scales=scales,
    )
    progress = _resumed(checkpoints, optimizer)
    optimizer.prepare(name for name, p in student.parameters.items() if p.requires_grad)
    log = _open_log(run, progress) if team.is_first else None
    return Training(
        run=run,
        team=team,
        signals=signals,
        lesson=lesson,
        rows=rows,
        heldout=heldout,
        checkpoints=checkpoints,
        optimizer=optimizer,
        progress=progress,
        publication=publication,
        log=log,
        benchmarks=open_benchmarks(run),
        pusher=_pusher(run) if team.is_first else None,
        rows_at_once=_rows_at_once(run, rows, lesson, optimizer, is_compiled=is_compiled),
        peak=peak_flops(team.device, next(iter(student.parameters.values())).dtype),
    )


def _pusher(run: Run) -> Pusher | None:
    return None if run.keeping.push_to is None else Pusher(run.keeping, run.folder / "logs")


def _mean_of(keeping: SavingPlan) -> MeanOf | None:
    if keeping.average is None or keeping.save_every_steps is None:
        return None
    return MeanOf(keeping.average, keeping.save_every_steps)


def _resumed(checkpoints: Checkpoints, optimizer: Optimizer) -> TrainState:
    """Read the newest checkpoint; its state, or that of a run's start if there is none."""
    step = checkpoints.newest()
    if step is None:
        return TrainState()
    progress = TrainState(**checkpoints.state(step))
    optimizer.resume(progress.adam_steps)
    checkpoints.load(step, optimizer.tensors())
    return progress


def _open_log(run: Run, progress: TrainState) -> RunLog:
    # step 0 has a row too
    last = -1 if progress.scaled_loss is None else progress.step
    written = read_metrics(run.metrics_path)  # those of steps that run again are removed next
    metrics = MetricsFile(run.metrics_path, last)
    return RunLog(metrics, open_tracker(run, written, last))


def _compile(run: Run, rows: AnyRows, lesson: Lesson) -> bool:
    """Compile the layers; on a CPU, if they then learn the same from the first rows. Return whether
    they are compiled.

    Raises:
        HealError: --compile was given, and they cannot be compiled or learn something else.
    """
    if run.fit.compile is False:
        return False
    student = lesson.student
    if lesson.team.device.type != "cpu":
        for layer in student.layers:
            layer.forward = torch.compile(layer.forward)
        return True
    layers = CompiledLayers(student.layers)
    student.model.train()  # the code compiled for evaluation would be another
    try:
        plain = _learned(run, rows, lesson, is_compiled=layers.switch(False))
        compiled = _learned(run, rows, lesson, is_compiled=layers.switch(True))
        is_same = all(
            abs(a - b) <= _ROUNDING * max(1.0, abs(a)) for a, b in zip(plain, compiled, strict=True)
        )
        problem = "" if is_same else "the compiled layers learn something else"
    except Exception as error:  # noqa: BLE001  (a compiler fails in many ways)
        problem = f"torch.compile failed: {reason_of(error)}"
    finally:
        student.model.zero_grad()
        student.model.eval()
    if problem and run.fit.compile:
        raise HealError(f"{problem}; leave --compile out")
    if problem:
        sys.stderr.write(f"not compiled: {problem}\n")
    return layers.switch(not problem)


def _learned(run: Run, rows: AnyRows, lesson: Lesson, *, is_compiled: bool) -> tuple[float, float]:
    """The mean loss and the gradient's norm of the rows that compiled layers take at once."""
    team = lesson.team
    together, at_once = (
        rows_on_a_cpu(run, team.size, is_compiled=each) for each in (True, is_compiled)
    )
    wait_for(rows, range(together * team.size), team, lesson.brake)
    batches = micro_batches(rows, 0, together * team.size, at_once, team)
    counted = max(1.0, team.sum([sum(batch.num_labels for batch in batches)])[0])
    with torch.random.fork_rng(devices=[]):
        total = sum(lesson.backward(batch, counted, 0.0)[0] for batch in batches)
    gradients = [p.grad for p in lesson.student.parameters.values() if p.grad is not None]
    squares = sum(float(local(gradient).float().square().sum()) for gradient in gradients)
    lesson.student.model.zero_grad()
    total, squares = team.sum([total, squares])
    return total / counted, squares**0.5


def _rows_at_once(
    run: Run, rows: AnyRows, lesson: Lesson, optimizer: Optimizer, *, is_compiled: bool
) -> int:
    """The rows of a micro-batch: as the run says, or as many as fit."""
    team = lesson.team
    if team.device.type != "cuda":
        return rows_on_a_cpu(run, team.size, is_compiled=is_compiled)
    if run.fit.micro_batch_rows is not None:
        return run.fit.micro_batch_rows

    def trial(count: int) -> None:
        wait_for(rows, range(count * team.size), team, lesson.brake)
        batch = micro_batches(rows, 0, count * team.size, count, team)[0]
        lesson.backward(batch, 1.0, run.recipe.distill_weight)
        optimizer.clear()

    return rows_at_once(team, rows_of_a_worker(run.rows_per_step, team.size), trial)
