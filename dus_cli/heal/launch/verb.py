"""The verb: check, tokenise, write run.json, start torchrun or the one worker, follow it, report.

The command line is built apart from running it, so that it can be printed and tested.
"""

from __future__ import annotations

import contextlib
import glob
import tempfile
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from dus_cli.common.libraries import require
from dus_cli.common.reports import public
from dus_cli.common.storage import Storage, known, remove, sync_refusal, try_storage
from dus_cli.data.sources import Source, parse_heldout, parse_sources
from dus_cli.errors import HealError, OutputError, shown
from dus_cli.heal import checkpoints_folder as folders
from dus_cli.heal.launch import resolve
from dus_cli.heal.launch.plan import num_processes, plan_lines, plan_of
from dus_cli.heal.launch.report import read_report
from dus_cli.heal.launch.resolve import Model, ties_embeddings
from dus_cli.heal.launch.torchrun import check_loopback, outcome_of, run_torchrun, workers_command
from dus_cli.heal.options import HealOptions
from dus_cli.heal.run import NAME as RUN_NAME
from dus_cli.heal.run import (
    REPORT,
    Run,
    average_folder,
    changed_options,
    check_same,
    is_of_a_run,
    other_options,
    read_run,
)
from dus_cli.heal.watch.views import View
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import Shape, shape_of
from dus_cli.release import lineage
from dus_cli.writing.staging import Staging, check_apart, why_within

# By one of these files a folder `tokens` is known as a run's.
_OF_TOKENS = (".lock", "sources.jsonl", "stdin.jsonl", ".stdin.jsonl.partial")


@dataclass
class _Prepared:
    """Data as the workers will see it, and its rows in an epoch."""

    record: dict[str, Any]
    rows_per_epoch: int


def heal(wishes: HealOptions, view: View) -> dict[str, Any]:
    """Heal a model, or go on healing it; the report when it is finished. The output is the model's
    place.

    Raises:
        DusError: any known failure, of a worker too.
        StoppedError: a signal ended it; a checkpoint is saved.
    """
    model = check(wishes)
    finished = _finished(wishes, model)
    if finished is not None:
        return finished | {"status": "unchanged"}
    run = prepare_run(wishes, model, view)
    plan = plan_of(run, model_shape(model, run), wishes.launch)
    view.plan(plan_lines(plan), plan)
    view.begin(run.num_steps, run.tokens_per_step)
    code, signum = run_torchrun(run, wishes.launch, view)
    return outcome_of(run, code, signum)


def check(wishes: HealOptions) -> Model:
    """Everything that can be refused before data are read; the opened model.

    Raises:
        DusError: the model, the options or the output are not in order.
    """
    from dus_cli.heal.tracking import check_tracker

    model = resolve.open_model(wishes.model)
    resolve.check_wishes(wishes, model)
    resolve.rows_per_step(wishes, model)
    check_tracker(wishes.keeping.track.value)
    check_apart(wishes.output, wishes.model)
    check_run_folder(wishes.output)
    if wishes.keeping.export_every is not None:
        _check_exports(wishes.output.resolve())
    if wishes.keeping.average is not None:
        check_average_folder(wishes.output, resolve.model_key(model.checkpoint))
    check_renames(wishes.output, known(wishes.output.resolve().parent))
    _check_devices(wishes)
    return model


def check_renames(output: Path, found: Storage | None) -> None:
    """Check that folders can be renamed where the output will be: a checkpoint is complete by its
    name.

    Raises:
        OutputError: they cannot.
    """
    if found is not None and found.no_rename is not None:
        raise OutputError(
            f"{shown(output)} cannot be healed into, because {found.no_rename}: each checkpoint, "
            "and the model at the "
            "end, gets its name by one rename; heal on a disk (-o), and copy the result"
        )


def _check_devices(wishes: HealOptions) -> None:
    import torch

    workers = num_processes(wishes.launch) * wishes.launch.nnodes
    if workers > 1:  # transformers places each worker's shards by it
        require("dus heal on several workers", "accelerate")
    if wishes.fit.offload and not (torch.accelerator.is_available() and workers > 1):
        raise HealError(
            "--offload moves what FSDP splits from GPUs to memory, and needs two workers on GPUs; "
            "leave it out"
        )
    if wishes.launch.nnodes > 1 and wishes.launch.rdzv_endpoint is None:
        raise HealError("--nnodes above 1 needs --rdzv-endpoint HOST:PORT, the same on every node")
    if wishes.launch.nnodes == 1 and workers > 1:
        check_loopback()
    if wishes.launch.node_rank >= wishes.launch.nnodes:
        raise HealError(
            f"--node-rank {wishes.launch.node_rank} of {wishes.launch.nnodes} nodes: they count "
            "from 0"
        )


def check_run_folder(output: Path) -> None:
    """Check that OUT is free, or holds a run of dus heal.

    Raises:
        OutputError: it holds something else, or its name could not be given to the healed model.
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
            f"{shown(output)} cannot be healed into, because {why}: the healed model takes the "
            "place of the run's "
            f"folder at the end; name a folder in it, such as -o {shown(output / 'healed')}"
        )
    is_run = (output / RUN_NAME).is_file()
    strangers = sorted(path.name for path in output.iterdir() if not _is_ours(path))
    if strangers and not is_run:
        raise OutputError(
            f"{shown(output)} holds {shown(strangers[0])} and no run of dus heal; choose another -o"
        )


def _check_exports(output: Path) -> None:
    """Check that what stands where exports may go is what dus wrote, which they replace."""
    for path in output.parent.glob(f"{glob.escape(output.name)}-step-*"):
        if not (path / lineage.NAME).is_file():
            raise OutputError(
                f"{shown(path)} exists and is no model that dus wrote, and --export-every gives "
                "such names; move it, or choose another -o"
            )


def check_average_folder(output: Path, model_key: str) -> None:
    """Check that the place of the checkpoints' mean is free, or holds what such a run wrote there.

    Raises:
        OutputError: it holds something else.
        HealError: the run is finished, and the mean was not asked for.
    """
    folder = average_folder(output.resolve())
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        if (output / REPORT).is_file():
            raise HealError(
                f"{shown(output)} is finished and its checkpoints are gone, so that there is "
                "nothing to average; leave out --average, or heal again to another -o"
            )
        return
    record = (lineage.read_lineage(folder) if folder.is_dir() else None) or {}
    last = [{}, *record.get("healing", [])][-1]
    if last.get("model_key") != model_key or "averaged_steps" not in last:
        raise OutputError(
            f"{shown(folder)}, where the mean of the checkpoints would stand, holds something "
            "else; choose another -o"
        )


def _is_ours(path: Path) -> bool:
    """Whether a folder in OUT is what a run leaves that ended before it wrote run.json: tokens
    alone.
    """
    return (
        path.name == "tokens"
        and path.is_dir()
        and (not any(path.iterdir()) or any((path / name).exists() for name in _OF_TOKENS))
    )


def _finished(wishes: HealOptions, model: Model) -> dict[str, Any] | None:
    """The report of a run that is finished already with these options; None where there is none."""
    path = wishes.output / REPORT
    if not path.is_file():
        return None
    run = read_run(wishes.output / RUN_NAME)
    changed = changed_options(run, wishes.to_json())
    if run.model_key != resolve.model_key(model.checkpoint):
        changed.append("the model")
    for name in ("data.files", "data.eval_files"):  # the tokens are gone, so the names must do
        if public(run.options[name]) != public(wishes.to_json()[name]):
            changed.append("the data")
    if changed:
        raise other_options(run, changed)
    with Staging(wishes.output.resolve(), overwrite=True, claim=is_of_a_run):
        pass  # clears the run's folder, where a kill came between the rename and its removal
    return read_report(wishes.output.resolve(), wishes.model.resolve())


def prepare_run(wishes: HealOptions, model: Model, view: View) -> Run:
    """Tokenise and write run.json; of a run that goes on, hold that it is the same.

    Raises:
        DusError: the data cannot be used, or the run is another one.
    """
    output = wishes.output.resolve()
    probe = Path(tempfile.mkdtemp(prefix=f".{output.name}.probe-", dir=output.parent))
    try:
        check_renames(wishes.output, try_storage(probe))
        if (refusal := sync_refusal(probe)) is not None:  # torch's checkpoints insist on it
            raise OutputError(
                f"{shown(wishes.output)} cannot be healed into, because files cannot be synced "
                f"there ({refusal}), and "
                "a checkpoint must be; heal on a disk (-o), and copy the result"
            )
    finally:
        remove(probe)
    output.mkdir(exist_ok=True)
    if wishes.launch.node_rank == 0:
        folders.check_unlocked(output / "checkpoints")
    run = _planned(wishes, model, output / "tokens", view)
    if (output / RUN_NAME).exists():
        begun = read_run(output / RUN_NAME)
        check_same(begun, run)
        # auto, on whatever it goes on
        run = replace(run, fit=replace(run.fit, precision=begun.fit.precision))
        # whatever --eval-every now is
        kept = replace(run.keeping, eval_tokens=begun.keeping.eval_tokens)
        run = _measured(replace(run, keeping=kept), output / "tokens")
    if wishes.launch.node_rank == 0 or not (output / RUN_NAME).exists():
        run.write()
    return run


def _planned(wishes: HealOptions, model: Model, folder: Path, view: View) -> Run:
    """The run, with its data's token files in `folder`."""
    data = prepare_data(wishes, model, folder, view)
    return _measured(resolve.make_run(wishes, model, data.record, data.rows_per_epoch), folder)


def _measured(run: Run, folder: Path) -> Run:
    """The run, told what its measurements predict."""
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


def prepare_data(wishes: HealOptions, model: Model, folder: Path, view: View) -> _Prepared:
    """Token files of all data, made or found in `folder`.

    Raises:
        DataError: the data cannot be used.
    """
    from dus_cli.data.shelf import prepare
    from dus_cli.data.streams import Rows

    folder.mkdir(parents=True, exist_ok=True)
    data = wishes.data
    name, column = data.field
    sources, eval_sources = _sources(wishes, folder)
    view.status("tokenising")
    prepared = prepare(
        sources,
        eval_sources,
        wishes.model,
        folder,
        vocab_size=model.vocab_size,
        text_field=name,
        column=column,
        on_bad_line=data.on_bad_line,
        holdout=data.holdout,
        special_tokens=data.special_tokens,
        wait=wishes.launch.nnodes > 1,
        say=view.note,
        on_progress=view.tokenising,
    )
    rows = Rows(prepared, folder, resolve.seq_length(wishes, model), wishes.recipe.seed)
    if not prepared.num_heldout_tokens:
        raise HealError(
            "the held-out set is empty, and without one nothing is proven; give --eval-data or "
            "--holdout"
        )
    return _Prepared(prepared.to_json(), rows.rows_per_epoch)


def _sources(wishes: HealOptions, folder: Path) -> tuple[tuple[Source, ...], tuple[Source, ...]]:
    data = wishes.data
    name, _ = data.field
    return (
        parse_sources(data.files, folder, name),
        parse_heldout(data.eval_files, folder, name),
    )


def prepared_command(wishes: HealOptions, view: View) -> list[str]:
    """What `--print-command` prints, for a batch job or a container. Data and run.json are made
    first.

    Raises:
        DusError: as `heal`.
    """
    prepare_run(wishes, check(wishes), view)
    return workers_command(wishes.launch, wishes.output.resolve() / RUN_NAME)


# --- the dry run ----------------------------------------------------------------------------------


def preview(wishes: HealOptions, view: View) -> tuple[Run, Shape]:
    """The run as it would be, and the model's shape. Token files that OUT lacks are made elsewhere,
    and removed.

    Raises:
        DusError: as `heal`.
    """
    model = check(wishes)
    with contextlib.ExitStack() as stack:
        folder = wishes.output.resolve() / "tokens"
        if not folder.is_dir():
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        run = _planned(wishes, model, folder, view)
    return run, model_shape(model, run)


def model_shape(model: Model, run: Run) -> Shape:
    """What the model's FLOPs and memory depend on."""
    fields = decoder_config(model.checkpoint.config).fields
    tied = {"tie_word_embeddings": ties_embeddings(model.checkpoint)}
    return shape_of(fields | tied, run.num_parameters, run.num_layers)
