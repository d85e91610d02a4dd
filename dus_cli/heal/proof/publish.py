"""The end of a run: write the healed model, with its proof, in the place of the run's folder.

The output has the source's shards, order and dtypes. Tensors are gathered from the workers one at a
time, so memory does not grow with the model. Tensors that were not trained are copied byte for
byte.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

from dus_cli import __version__
from dus_cli.common.files import sync_file, writing
from dus_cli.common.reports import public
from dus_cli.common.workers import PIECE
from dus_cli.data.growing import GrowingRows, measured, skipped_since
from dus_cli.data.streams import Prepared
from dus_cli.errors import VerificationError
from dus_cli.heal import run as run_file
from dus_cli.heal.launch.plan import data_record
from dus_cli.heal.metrics import read_metrics
from dus_cli.heal.proof.card import averaged_card, healed_card
from dus_cli.heal.train.optimizer import Optimizer, local
from dus_cli.heal.train.origin import not_written_back, parameter_names, read_elements
from dus_cli.maps.shape import Shape, flops_per_token, pretraining_flops, shape_of
from dus_cli.models.loading import STORED_DTYPES
from dus_cli.pictures.curves import loss_curve
from dus_cli.pictures.layer_map import PICTURES
from dus_cli.planning.plan import dump_json
from dus_cli.release import lineage
from dus_cli.source.belonging import carried_files
from dus_cli.source.checkpoint import Checkpoint, Shard, open_checkpoint
from dus_cli.source.headers import TensorInfo
from dus_cli.source.reading import open_regular, reading
from dus_cli.verification.verb import verify
from dus_cli.writing.staging import Staging, staged_files

if TYPE_CHECKING:
    from dus_cli.heal.run import Run
    from dus_cli.heal.train.checkpoints import Means
    from dus_cli.heal.train.fitting import Peak
    from dus_cli.heal.train.state import TrainState
    from dus_cli.models.decoder import Decoder
    from dus_cli.models.stopping import Brake
    from dus_cli.models.team import Team

# The pictures that the card shows, for a light and a dark page.
CURVES = {"healing-light.svg": False, "healing-dark.svg": True}


def prepare_publication(run: Run, student: Decoder, team: Team) -> Publication:
    """Check that the healed model can be written back, before training starts.

    Raises:
        HealError: the source has no tensor for a parameter, or a tensor was converted when it was
            loaded.
    """
    source = open_checkpoint(Path(run.model))
    names = parameter_names(source, student)
    _check_values(source, names, student, team)
    config = dict(student.inner.config.to_dict())
    return Publication(
        run=run,
        student=student,
        team=team,
        source=source,
        names=names,
        shape=shape_of(config, source.num_parameters, run.num_layers),
    )


def _check_values(
    source: Checkpoint, names: Mapping[str, str], student: Decoder, team: Team
) -> None:
    """Check that what transformers loaded is what the file holds."""
    for shard, tensor in source.tensors():
        name = names.get(tensor.name)
        if name is None:
            continue
        parameter = student.parameters[name]
        if tuple(parameter.shape) != tensor.shape:
            raise not_written_back(student, tensor.name)
        part = local(parameter.detach())
        # the first worker's part is the beginning of the tensor
        if team.is_first and part.numel():
            count = min(part.numel(), 256)
            stored = read_elements(shard, tensor, count).to(part.dtype)
            if not torch.equal(stored, part.flatten()[:count].cpu()):
                raise not_written_back(student, tensor.name)


class Publication:
    """Writes the healed model in the run's place.

    Args:
        run: the run.
        student: the model under training.
        team: the workers.
        source: the checkpoint that the run started from.
        names: the name of the parameter for each of the source's tensors that is one.
        shape: the model's.
    """

    def __init__(
        self,
        *,
        run: Run,
        student: Decoder,
        team: Team,
        source: Checkpoint,
        names: Mapping[str, str],
        shape: Shape,
    ) -> None:
        self._run, self._team, self._student = run, team, student
        self._source, self._names, self.shape = source, names, shape
        self._places = {
            names[tensor.name]: (shard, tensor)
            for shard, tensor in source.tensors()
            if tensor.name in names
        }
        self.flops_per_token = flops_per_token(shape, run.seq_length)

    @property
    def num_bytes(self) -> int:
        """The bytes of the healed model's tensors on the disk."""
        return sum(tensor.num_bytes for _, tensor in self._source.tensors())

    def stored(self, name: str) -> Tensor | None:
        """The worker's part of a parameter, in fp32 from the file; None if it is stored in bf16,
        because bf16 weights then lose nothing.

        FSDP splits parameters by rows, so a part is contiguous in the file.
        """
        shard, tensor = self._places[name]
        parameter = self._student.parameters[name]
        if STORED_DTYPES[tensor.dtype] == torch.bfloat16:
            return None
        shape, offset = tuple(parameter.shape), 0
        if isinstance(parameter, DTensor):
            shape, offsets = compute_local_shape_and_global_offset(
                parameter.shape, parameter.device_mesh, parameter.placements
            )
            offset = offsets[0] if offsets else 0
        row = tensor.num_elements // max(1, tensor.shape[0]) if tensor.shape else 1
        count = torch.Size(shape).numel()
        return read_elements(shard, tensor, count, offset * row).float().reshape(shape)

    def publish(
        self,
        optimizer: Optimizer,
        progress: TrainState,
        *,
        peak: Peak,
        brake: Brake,
        exported: Path | None = None,
        averaged: Sequence[int] = (),
    ) -> None:
        """Write the model beside the run's folder, verify it, and put it in the folder's place; or
        write it to `exported`, and leave the run as it is.

        `averaged` are the steps whose mean was written before.

        Raises:
            StopRequested: a signal came before the model is in place.
            OutputError: writing failed, or `exported` holds something that dus did not write.
        """
        run = self._run
        if not self._team.is_first:
            for _, tensor in self._source.tensors():
                brake.check()
                self._gather(tensor, optimizer)
            self._team.wait()
            return
        claim = run_file.is_of_a_run if exported is None else None
        with Staging(exported or run.folder, overwrite=True, claim=claim) as staging:
            self._write_model(staging, lambda tensor: self._gather(tensor, optimizer), brake)
            rows = read_metrics(run.metrics_path)
            report = self._report(progress, rows, peak)
            report |= {"output": str(staging.output)}
            if averaged:
                folder = run.average_folder.name
                report["average"] = {"folder": folder, "steps": list(averaged)}
            self._write_proof(staging, report, rows)
            _verify(staging, "the healed model")
            staging.publish()
        self._team.wait()

    def publish_mean(self, means: Means, steps: Sequence[int], brake: Brake) -> None:
        """Write the mean of these steps' checkpoints as a model beside the run's folder. It
        replaces one that this run wrote before it was stopped.

        Raises:
            StopRequested: a signal came before the model is in place.
            HealError: a checkpoint cannot be read.
        """
        if not self._team.is_first:
            for _ in self._source.tensors():
                brake.check()
            self._team.wait()
            return

        def mean(tensor: TensorInfo) -> Tensor | None:
            name = self._names.get(tensor.name)
            value = None if name is None else means.of(name)
            return None if value is None else value.to(STORED_DTYPES[tensor.dtype])

        with Staging(self._run.average_folder, overwrite=True) as staging:
            self._write_model(staging, mean, brake)
            card = self._source.folder / "README.md"
            with reading(card.name):
                text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
            staging.write_text(
                "README.md", averaged_card(text, steps, self._run.average_folder.name)
            )
            record = self._lineage_of_mean(steps) | {"files": list(staged_files(staging.folder))}
            staging.write_text(lineage.NAME, dump_json(record))
            _verify(staging, "the mean of the checkpoints")
            staging.publish()
        self._team.wait()

    def _write_model(
        self, staging: Staging, value_of: Callable[[TensorInfo], Tensor | None], brake: Brake
    ) -> None:
        """Write the weights, and the source's other files."""
        for name, path in carried_files(self._source.folder).files:
            staging.copy_file(name, path)
        for name in _unchanged(self._source):
            staging.copy_file(name, self._source.folder / name)
        if self._source.warnings and self._source.index_name is not None:
            staging.write_text(self._source.index_name, _index(self._source))
        for shard in self._source.shards:
            self._write_shard(staging.folder / shard.name, shard, value_of, brake)

    def _write_shard(
        self,
        path: Path,
        shard: Shard,
        value_of: Callable[[TensorInfo], Tensor | None],
        brake: Brake,
    ) -> None:
        advice = "the checkpoints are kept, and the same command writes it again"
        with writing(shard.name, advice), ExitStack() as closing:
            with reading(shard.name):
                source = closing.enter_context(open_regular(shard.path))
            path.parent.mkdir(parents=True, exist_ok=True)
            with path.open("wb") as target:
                _copy(source, target, 0, shard.header.data_start)
                for tensor in shard.header.tensors:
                    brake.check()
                    value = value_of(tensor)
                    if value is None:
                        _copy(source, target, tensor.start, tensor.num_bytes)
                    else:
                        target.write(value.contiguous().flatten().view(torch.uint8).numpy().data)
        sync_file(path)

    def _gather(self, tensor: TensorInfo, optimizer: Optimizer) -> Tensor | None:
        """The trained tensor in the source's dtype, on the CPU of the first worker; None on other
        workers, and if it was not trained.
        """
        name = self._names.get(tensor.name)
        value = optimizer.trained(name) if name is not None else None
        if value is None:
            return None
        whole = value.full_tensor() if isinstance(value, DTensor) else value
        return whole.to(STORED_DTYPES[tensor.dtype]).cpu() if self._team.is_first else None

    # --- the proof --------------------------------------------------------------------------------

    def _report(
        self, progress: TrainState, rows: list[dict[str, Any]], peak: Peak
    ) -> dict[str, Any]:
        """The content of report.json; docs/layout.md describes each field."""
        run = self._run
        rows = [row for row in rows if row["step"]]
        tokens = progress.step * run.tokens_per_step
        reached = None if progress.reached_at is None else progress.reached_at * run.tokens_per_step
        flops = tokens * self.flops_per_token
        pretraining = pretraining_flops(self.shape, run.seq_length)
        flops_to_base = None if reached is None else reached * self.flops_per_token
        data = measured(Prepared.from_json(run.data), run.tokens_folder)
        speeds = sorted(row["tokens_per_second"] for row in rows)
        return {
            "schema": run_file.SCHEMA,
            "version": __version__,
            "status": "healed" if reached is not None else "trained",
            "model": run.model,
            "output": run.output,
            "base_loss": progress.base_loss,
            "scaled_loss": progress.scaled_loss,
            "loss": progress.eval_loss,
            **self._interval(progress),
            "reached_base": None if progress.base_loss is None else reached is not None,
            "tokens_to_base": reached,
            "tokens": tokens,
            "steps": progress.step,
            "skipped_steps": progress.skipped,
            **({"tasks": progress.task_scores} if progress.task_scores else {}),
            **({"pushes": progress.pushes} if progress.pushes else {}),
            "num_parameters": self._source.num_parameters,
            "num_workers": self._team.size,
            "flops": flops,
            "flops_to_base": flops_to_base,
            "fraction_of_pretraining": None
            if flops_to_base is None
            else flops_to_base / pretraining,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": speeds[len(speeds) // 2] if speeds else None,
            "peak_memory_bytes": max((row["peak_memory_bytes"] for row in rows), default=None),
            "peak_flops": peak.flops,
            "peak_flops_source": peak.source,
            **data_record(run, data, self._epochs(data) * progress.step / run.num_steps),
            **self._by_set(progress),
            "skipped_lines": self._skipped(data),
            "unread_files": data.unread,
        }

    def _epochs(self, data: Prepared) -> float:
        """How often the whole run reads the training data."""
        run = self._run
        if data.growing is None:
            return run.epochs
        rows = GrowingRows(data, run.tokens_folder, run.seq_length, run.recipe.seed)
        return run.num_steps * run.rows_per_step / rows.rows_per_epoch

    def _interval(self, progress: TrainState) -> dict[str, Any]:
        """The interval of the first held-out set's difference to the base; nothing without a base,
        or if an older dus measured it.
        """
        if not progress.intervals:
            return {}
        return {"difference_interval": next(iter(progress.intervals.values()))}

    def _skipped(self, data: Prepared) -> dict[str, int]:
        """How many lines and documents were left out, by reason."""
        if data.growing is None:
            return data.skipped
        later = skipped_since(self._run.tokens_folder, data.growing.keys)
        return dict(sorted((Counter(data.skipped) + later).items()))

    def _by_set(self, progress: TrainState) -> dict[str, Any]:
        """The losses and the size of each held-out set that has a name."""
        if not self._run.heldout_sets:
            return {}
        fields = {"base": "base_loss", "scaled": "scaled_loss", "now": "loss"}
        return {
            "heldout_sets": [
                {"name": name, **counts}
                | {field: progress.losses_by_set[name].get(what) for what, field in fields.items()}
                | ({"difference_interval": progress.intervals[name]} if progress.intervals else {})
                for name, counts in self._run.heldout_sets.items()
            ]
        }

    def _write_proof(
        self, staging: Staging, report: dict[str, Any], rows: list[dict[str, Any]]
    ) -> None:
        run = self._run
        staging.copy_file(run.metrics_path.name, run.metrics_path)
        staging.write_text(run_file.NAME, dump_json(public(asdict(run))))
        if (run.folder / "tensorboard").is_dir():
            shutil.copytree(run.folder / "tensorboard", staging.folder / "tensorboard")
        title = f"Healing {staging.output.name}"
        for name, dark in CURVES.items():
            staging.write_text(
                name, loss_curve(rows, base_loss=report["base_loss"], title=title, dark=dark)
            )
        staging.write_text(run_file.REPORT, dump_json(public(report)))
        card = self._source.folder / "README.md"
        with reading(card.name):
            text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
        staging.write_text("README.md", healed_card(text, report, staging.output.name))
        record = self._lineage(report) | {"files": list(staged_files(staging.folder))}
        staging.write_text(lineage.NAME, dump_json(record))

    def _lineage(self, report: dict[str, Any]) -> dict[str, Any]:
        """The source's dus.json with this healing appended, without times and output path."""
        run = self._run
        record = lineage.read_lineage(self._source.folder) or {
            "schema": lineage.SCHEMA,
            "dus_version": __version__,
        }
        healing = {
            "dus_version": __version__,
            "model_key": run.model_key,
            "data": run.data["content_key"],
            "seq_length": run.seq_length,
            "tokens_per_step": run.tokens_per_step,
            "steps": report["steps"],
            "tokens": report["tokens"],
            "recipe": asdict(run.recipe),
            **{key: report[key] for key in ("base_loss", "scaled_loss", "loss", "tokens_to_base")},
        }
        return record | {"healing": [*record.get("healing", []), healing]}

    def _lineage_of_mean(self, steps: Sequence[int]) -> dict[str, Any]:
        """The source's dus.json with this healing appended for the mean, without losses."""
        unmeasured = dict.fromkeys(("base_loss", "scaled_loss", "loss", "tokens_to_base"))
        report = {"steps": steps[-1], "tokens": steps[-1] * self._run.tokens_per_step}
        record = self._lineage(report | unmeasured)
        record["healing"][-1]["averaged_steps"] = list(steps)
        return record


def _verify(staging: Staging, what: str) -> None:
    report = verify(staging.folder)
    if not report.is_sound:
        raise VerificationError(
            f"{what} does not verify: {report.problems[0]}; nothing was published"
        )


def _index(source: Checkpoint) -> str:
    """The index of what the shards hold, which replaces a wrong one."""
    weight_map = {tensor.name: shard.name for shard, tensor in source.tensors()}
    metadata = {"total_size": source.num_bytes, "total_parameters": source.num_parameters}
    return dump_json({"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))})


def _unchanged(source: Checkpoint) -> Iterator[str]:
    """Files of the source that a healing copies, although dus upscale would write them anew."""
    index = [] if source.index_name is None or source.warnings else [source.index_name]
    for name in ("config.json", *index, *PICTURES):
        if (source.folder / name).is_file():
            yield name


def _copy(source: BinaryIO, target: BinaryIO, start: int, size: int) -> None:
    source.seek(start)
    while size:
        with reading(Path(source.name).name):
            piece = source.read(min(size, PIECE))
        target.write(piece)
        size -= len(piece)
