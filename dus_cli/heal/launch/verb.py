"""The verb: check, tokenise, write run.json, start torchrun or the only worker, follow it, report.

`torchrun` builds the workers' command line, so that it can also be printed.
"""

from __future__ import annotations

import contextlib
import glob
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from dus_cli.common.libraries import require
from dus_cli.common.reports import public
from dus_cli.common.storage import Storage, known, remove, sync_refusal, try_storage
from dus_cli.common.units import counted, human_time
from dus_cli.errors import DusError, HealError, OutputError, UsageError, shown
from dus_cli.evaluation.options import TaskOptions
from dus_cli.heal import checkpoints_folder as folders
from dus_cli.heal.launch import resolve
from dus_cli.heal.launch.data import prepare_data, room_for, tokens_folder
from dus_cli.heal.launch.plan import num_processes, plan_lines, plan_of
from dus_cli.heal.launch.report import read_report
from dus_cli.heal.launch.resolve import Model, ties_embeddings
from dus_cli.heal.launch.torchrun import check_loopback, run_workers, workers_command
from dus_cli.heal.options import HealOptions
from dus_cli.heal.run import NAME as RUN_NAME
from dus_cli.heal.run import (
    REPORT,
    Run,
    average_folder,
    changed_options,
    check_same,
    is_of_a_run,
    is_partial,
    other_options,
    read_run,
)
from dus_cli.heal.watch.views import NoView, View
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import Shape, shape_of
from dus_cli.progress import NoProgress
from dus_cli.push.target import look
from dus_cli.release import lineage
from dus_cli.writing.staging import Staging, check_apart, why_within

# A folder `tokens` with one of these files was written by dus.
_OF_TOKENS = (".lock", "sources.jsonl", "stdin.jsonl", ".stdin.jsonl.partial")
_OF_STREAMS = "stream-*"


def heal(options: HealOptions, view: View) -> dict[str, Any]:
    """Heal a model, or resume healing it. Returns the report of the finished run.

    Raises:
        DusError: any known failure, also of a worker.
        StoppedError: a signal ended the run; a checkpoint is saved.
    """
    model = check(options)
    finished = _finished(options, model)
    if finished is not None:
        return finished | {"status": "unchanged"}
    run = prepare_run(options, model, view)
    plan = plan_of(run, model_shape(model, run), options.launch)
    view.plan(plan_lines(plan), plan)
    view.begin(run.num_steps, run.tokens_per_step)
    with room_for(run, options.data, tokens_folder(options)):
        return run_workers(run, options.launch, view)


def check(options: HealOptions) -> Model:
    """Check everything that can be checked before data are read; return the opened model.

    Raises:
        DusError: the model, the options or the output cannot be used.
    """
    from dus_cli.heal.tracking import check_tracker

    model = resolve.open_model(options.model)
    resolve.check_options(options, model)
    resolve.rows_per_step(options, model)
    check_tracker(options.saving)
    check_apart(options.output, options.model)
    check_run_folder(options.output)
    if options.saving.export_every is not None or options.saving.push_every is not None:
        _check_exports(options.output.resolve())
    if options.saving.average is not None:
        check_average_folder(options.output, resolve.model_key(model.checkpoint))
    check_renames(options.output, known(options.output.resolve().parent))
    _check_devices(options)
    return model


def check_renames(output: Path, storage: Storage | None) -> None:
    """Check that folders can be renamed beside the output: a checkpoint gets its name when it is
    complete.

    Raises:
        OutputError: they cannot.
    """
    if storage is not None and storage.no_rename is not None:
        raise OutputError(
            f"{shown(output)} cannot be healed into, because {storage.no_rename}: each checkpoint, "
            "and the model at the end, gets its name by a rename; heal on a disk (-o), and copy "
            "the result"
        )


def _check_devices(options: HealOptions) -> None:
    import torch

    workers = num_processes(options.launch) * options.launch.nnodes
    if workers > 1:  # transformers uses it to load each worker's part
        require("dus heal on several workers", "accelerate")
    if options.fit.offload and not (torch.accelerator.is_available() and workers > 1):
        raise HealError(
            "--offload moves weights that FSDP splits over GPUs to memory, and needs two or more "
            "workers on GPUs; leave it out"
        )
    if options.launch.nnodes > 1 and options.launch.rdzv_endpoint is None:
        raise HealError("--nnodes above 1 needs --rdzv-endpoint HOST:PORT, the same on every node")
    if options.launch.nnodes == 1 and workers > 1:
        check_loopback()
    if options.launch.node_rank >= options.launch.nnodes:
        raise HealError(
            f"--node-rank {options.launch.node_rank} of {counted(options.launch.nnodes, 'node')}: "
            "ranks count from 0; give a lower rank, or a higher --nnodes"
        )


def check_run_folder(output: Path) -> None:
    """Check that OUT is free or holds a run of dus heal.

    Raises:
        OutputError: it holds something else, or the healed model could not be renamed to it.
    """
    if not output.resolve().parent.is_dir():
        raise OutputError(f"{shown(output.resolve().parent)} is not a directory; create it first")
    if not output.exists():
        return
    if not output.is_dir():
        raise OutputError(
            f"{shown(output)} exists and is not a directory; choose another name for -o"
        )
    if (why := why_within(output.resolve())) is not None:
        raise OutputError(
            f"{shown(output)} cannot be healed into, because {why}: at the end the healed model "
            f"replaces the run's folder; name a folder in it, such as -o {shown(output / 'healed')}"
        )
    is_run = (output / RUN_NAME).is_file()
    foreign = sorted(
        path.name for path in output.iterdir() if not _is_tokens(path) and not is_partial(path.name)
    )
    if foreign and not is_run:
        raise OutputError(
            f"{shown(output)} holds {shown(foreign[0])} and no run of dus heal; choose another -o"
        )


def _check_exports(output: Path) -> None:
    """Check that exports would replace nothing but what dus wrote."""
    for path in output.parent.glob(f"{glob.escape(output.name)}-step-*"):
        if not (path / lineage.NAME).is_file():
            raise OutputError(
                f"{shown(path)} exists and dus did not write it, and an export may use its "
                "name; move it, or choose another -o"
            )


def check_average_folder(output: Path, model_key: str) -> None:
    """Check that the folder for the checkpoints' mean is free, or holds the mean of such a run.

    Raises:
        OutputError: it holds something else.
        HealError: the run was finished without --average.
    """
    folder = average_folder(output.resolve())
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if (output / REPORT).is_file():
            raise HealError(
                f"{shown(output)} is finished and its checkpoints are deleted, so there is nothing "
                "to average; leave out --average, or heal again to another -o"
            )
        return
    record = (lineage.read_lineage(folder) if folder.is_dir() else None) or {}
    last = [{}, *record.get("healing", [])][-1]
    if last.get("model_key") != model_key or "averaged_steps" not in last:
        raise OutputError(
            f"{shown(folder)}, the folder for the mean of the checkpoints, holds something else; "
            "choose another -o"
        )


def _is_tokens(path: Path) -> bool:
    """Whether a path in OUT is the folder of token files, the only thing that a run leaves if it
    ends before run.json is written.
    """
    return (
        path.name == "tokens"
        and path.is_dir()
        and (
            not any(path.iterdir())
            or any((path / name).exists() for name in _OF_TOKENS)
            or any(path.glob(_OF_STREAMS))
        )
    )


def _finished(options: HealOptions, model: Model) -> dict[str, Any] | None:
    """The report if OUT holds a finished run with these options; None if it holds none.

    Raises:
        HealError: the finished run has other options.
    """
    path = options.output / REPORT
    if not path.is_file():
        return None
    run = read_run(options.output / RUN_NAME)
    changed = changed_options(run, options.to_json())
    if run.model_key != resolve.model_key(model.checkpoint):
        changed.append("the model")
    for name in ("data.files", "data.eval_files"):  # the tokens are deleted, so names are compared
        if public(run.options[name]) != public(options.to_json()[name]):
            changed.append("the data")
    if changed:
        raise other_options(run, changed)
    with Staging(options.output.resolve(), overwrite=True, claim=is_of_a_run):
        pass  # removes the run's old folder, if a kill came between the rename and its removal
    return read_report(options.output.resolve(), options.model.resolve())


def prepare_run(options: HealOptions, model: Model, view: View) -> Run:
    """Tokenise the data and write run.json; if OUT holds a run, check that it is the same one.

    Raises:
        DusError: the data cannot be used, or OUT holds another run.
    """
    output = options.output.resolve()
    probe = Path(tempfile.mkdtemp(prefix=f".{output.name}.probe-", dir=output.parent))
    try:
        check_renames(options.output, try_storage(probe))
        if (refusal := sync_refusal(probe)) is not None:  # torch syncs its checkpoints
            raise OutputError(
                f"{shown(options.output)} cannot be healed into, because files cannot be synced "
                f"there ({refusal}), and checkpoints must be; heal on a disk (-o), and copy the "
                "result"
            )
    finally:
        remove(probe)
    is_ours = options.launch.nnodes == 1 and not output.exists()
    output.mkdir(exist_ok=True)
    if options.launch.node_rank == 0:
        folders.check_unlocked(output / "checkpoints")
    try:
        run = _planned(options, model, tokens_folder(options), view)
    except DusError:
        if is_ours:  # data that are refused at once leave nothing behind
            for folder in (output / "tokens", output):
                with contextlib.suppress(OSError):  # it is not empty, or not there
                    folder.rmdir()
        raise
    if (output / RUN_NAME).exists():
        begun = read_run(output / RUN_NAME)
        check_same(begun, run)
        # --precision auto must not change, even if the run goes on on another device, and without
        # --compile the answer may not either
        compiles = begun.fit.compile if options.fit.compile is None else options.fit.compile
        fit = replace(run.fit, precision=begun.fit.precision, compile=compiles)
        run = replace(run, fit=fit)
        # --eval-tokens must not change, even if --eval-every does
        saving = replace(run.keeping, eval_tokens=begun.keeping.eval_tokens)
        run = _measured(replace(run, keeping=saving), tokens_folder(options))
    if options.launch.node_rank == 0 or not (output / RUN_NAME).exists():
        run.write(options.launch.node_rank)
    return run


def _planned(options: HealOptions, model: Model, folder: Path, view: View) -> Run:
    """The run for these options, after tokenising its data into `folder`."""
    target = resolve.push_target(options.saving)
    is_new = target is not None and not look(target).exists  # before anything takes long
    num_task_tokens = _num_task_tokens(options, view)
    data = prepare_data(options, model, folder, view)
    run = resolve.make_run(options, model, data.record, data.rows_per_epoch)
    keeping = replace(run.keeping, push_private=is_new)
    if keeping.tasks is not None:
        keeping = replace(keeping, tasks=replace(keeping.tasks, num_tokens=num_task_tokens))
    return _measured(replace(run, keeping=keeping), folder)


def _num_task_tokens(options: HealOptions, view: View) -> int:
    """The tokens of --eval-tasks, whose data are downloaded if they are not on this machine.

    Raises:
        DusError: there is no such task, or no data.
    """
    saving = options.saving
    if not saving.eval_tasks:
        return 0
    from dus_cli.evaluation.tasks import open_harness

    view.status("loading the tasks")
    tasks = TaskOptions(
        tasks=saving.eval_tasks, include_path=saving.include_path, limit=saving.eval_tasks_limit
    )
    harness = open_harness(tasks, NoProgress(), option="--eval-tasks")
    return harness.num_tokens(options.model)


def _measured(run: Run, folder: Path) -> Run:
    """The run with the size of its held-out measurements filled in."""
    from dus_cli.data.streams import Prepared, heldout_sets

    data = Prepared.from_json(run.data)
    most = run.keeping.eval_tokens
    rows = heldout_sets(
        data, folder, run.seq_length, document_mask=run.document_mask, max_tokens=most
    )
    counts = {
        name: {"documents": each.num_documents, "tokens": each.num_labels}
        for name, each in rows.items()
    }
    return replace(
        run,
        heldout_documents=sum(count["documents"] for count in counts.values()),
        heldout_tokens=sum(count["tokens"] for count in counts.values()),
        heldout_sets={name: count for name, count in counts.items() if name},
    )


def prepared_command(options: HealOptions, view: View) -> list[str]:
    """The workers' command line for `--print-command`, after tokenising and writing run.json.

    Raises:
        DusError: as in `heal`; or with --stream, because workers alone would not tokenise.
    """
    if options.data.stream:
        raise HealError(
            "--print-command prints how the workers are started, and with --stream dus heal also "
            "tokenises while they train; run dus heal itself on each node, or leave out --stream"
        )
    prepare_run(options, check(options), view)
    return workers_command(options.launch, options.output.resolve() / RUN_NAME)


# --- the dry run ----------------------------------------------------------------------------------


def preview(
    options: HealOptions, view: View, pilot_seconds: float | None = None
) -> tuple[Run, Shape, dict[str, Any] | None]:
    """The run that these options give, the model's shape, and what a pilot of so many seconds
    measured. Token files that OUT lacks are written to a temporary folder, as is all that a pilot
    writes.

    Raises:
        DusError: as in `heal`; or the pilot failed, as the run would.
        StoppedError: a signal ended the pilot.
    """
    if pilot_seconds is not None and options.launch.nnodes > 1:
        raise UsageError("--pilot starts the workers of this node only; leave out --nnodes")
    model = check(options)
    with tempfile.TemporaryDirectory(prefix="dus-") as name:
        temporary, known = Path(name), tokens_folder(options)
        folder = temporary / "tokens"
        # a pilot's own process would tokenise on where a stream ends
        if known.is_dir() and (pilot_seconds is None or not options.data.stream):
            folder.mkdir()
            for part in known.iterdir():  # linked one by one, so that no other part is added there
                if part.is_dir() and not part.name.startswith("."):
                    (folder / part.name).symlink_to(part)
        run = _planned(options, model, folder, view)
        found = None
        if pilot_seconds is not None:
            view.status(f"a pilot of {human_time(pilot_seconds)}")
            found = _pilot(replace(run, output=name, pilot_seconds=pilot_seconds), options)
    return run, model_shape(model, run), found


def _pilot(run: Run, options: HealOptions) -> dict[str, Any]:
    """The speed and memory of the first steps of a run, whose folder is a temporary one.

    Raises:
        HealError, DataError: they failed.
        StoppedError: a signal ended them.
    """
    # nothing leaves the folder: no tracker, no exports, no pushes
    keeping = replace(
        run.keeping, track="none", export_every=None, push_every=None, push_to=None, tasks=None
    )
    run = replace(run, keeping=keeping)
    run.write()
    with room_for(run, options.data, run.tokens_folder):
        report = run_workers(run, replace(options.launch, max_restarts=0), NoView())
    measured = ("steps", "seconds", "tokens_per_second", "peak_memory_bytes")
    return {name: report[name] for name in measured}


def model_shape(model: Model, run: Run) -> Shape:
    """The shape by which the model's FLOPs and memory are estimated."""
    fields = decoder_config(model.checkpoint.config).fields
    tied = {"tie_word_embeddings": ties_embeddings(model.checkpoint)}
    return shape_of(fields | tied, run.num_parameters, run.num_layers)
