"""The verb upscale: plan, write, verify, publish, report."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from dus_cli.common.libraries import require
from dus_cli.common.reference import ModelRef
from dus_cli.common.storage import known
from dus_cli.errors import CheckpointError, DusError, OutputError, UsageError, shown
from dus_cli.hub.fetching import Fetch
from dus_cli.planning.plan import UpscalePlan, dump_json
from dus_cli.progress import NoProgress, Progress
from dus_cli.release import checksums, lineage
from dus_cli.release.texts import written_texts
from dus_cli.source import incomplete
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.report import UpscaleReport
from dus_cli.upscaling.request import UpscaleRequest, plan_for
from dus_cli.upscaling.space import Space, check_space, space_for
from dus_cli.verification.planned import (
    VerifyMode,
    check_against_plan,
    check_bytes_against_plan,
    check_forward,
)
from dus_cli.writing import journal
from dus_cli.writing.in_place import check_left, in_place_warning
from dus_cli.writing.journal import Journal
from dus_cli.writing.outputs import ByteCounts
from dus_cli.writing.sequential import transfer_in_order
from dus_cli.writing.staging import Staging, check_apart, check_output, why_within
from dus_cli.writing.transfer import CopyMode, transfer

if TYPE_CHECKING:
    from dus_cli.hub.streaming import Streamed

# The modes that read the weights of the base.
_READS_BASE = frozenset([VerifyMode.full, VerifyMode.forward])


def preview(
    request: UpscaleRequest,
    output: Path,
    options: UpscaleOptions | None = None,
    *,
    quiet: bool = True,
) -> UpscaleReport:
    """The report of a dry run: the whole plan, with warnings for what would stop the run.

    Writes nothing.

    Raises:
        DusError: as `plan_for`.
    """
    started = time.monotonic()
    options = options or UpscaleOptions()
    copy_mode, overwrite, stream = options.copy_mode, options.overwrite, options.stream
    ref, remaking = request.ref, request.remaking
    _check_stream(ref, copy_mode, stream=stream)
    plan = plan_for(request, fetch=Fetch.headers, quiet=quiet)
    streams = _streams(plan, stream=stream)
    within = why_within(output.resolve())
    folder = output.resolve() if within is not None else output.resolve().parent
    while not folder.is_dir():
        folder = folder.parent
    space = space_for(plan, folder, CopyMode.copy if streams else copy_mode, may_create=False)
    obstacles = []
    why = storage.no_rename if (storage := known(folder)) is not None else within
    checks: list[Callable[[], object]] = [
        lambda: check_output(output, overwrite=overwrite),
        lambda: check_left(output, lineage.digest(lineage.lineage(plan)), overwrite=overwrite),
        lambda: check_apart(output, plan.checkpoint.folder),
        lambda: check_space(space, copy_mode, output),
    ]
    if not overwrite and _is_written(plan, ref, output, 1, VerifyMode.none, with_checksums=False):
        checks.clear()
        obstacles.append(
            f"{shown(output)} is already what this would write; the run would change nothing"
        )
    for check in checks:
        try:
            check()
        except OutputError as error:
            obstacles.append(str(error))
    if why is not None:
        obstacles.append(in_place_warning(output, why))
    warnings = (*(remaking.warnings if remaking else ()), *obstacles)
    return UpscaleReport(
        plan,
        output,
        "planned",
        space=space,
        tally=ByteCounts(),
        verified="none",
        seconds=time.monotonic() - started,
        notes=warnings,
        remaking=remaking,
    )


def upscale(
    request: UpscaleRequest,
    output: Path,
    options: UpscaleOptions | None = None,
    *,
    quiet: bool = True,
    progress: Progress | None = None,
) -> UpscaleReport:
    """Write the deeper model beside `output`, verify it, and give it its name in one step.

    A failure or a kill before that step leaves nothing under `output`, and leaves an output that
    `overwrite` is to replace as it was. On a file system that cannot rename a folder, the model is
    written in place, and marked as incomplete until it is whole (`writing.in_place`). If `output`
    is already what would be written, by its lineage, nothing is done. If a lineage is followed, the
    files are also compared with the sums beside it.

    Args:
        request: the base, the map, and what else decides the bytes.
        output: the directory to write.
        options: how it is written and verified; fields that `request` covers are ignored.
        quiet: no progress bars from huggingface_hub.
        progress: receives the progress, from several threads.

    Raises:
        DusError: as `plan_for`.
        OutputError: `output` exists, there is not enough space, or the disk failed.
        CheckpointError: the base is unreadable or changed meanwhile, or a number is out of the
            dtype's range.
        MissingExtraError: a cast needs torch.
        VerificationError: what was written is not what was planned.
    """
    started = time.monotonic()
    progress, options = progress or NoProgress(), options or UpscaleOptions()
    copy_mode, jobs, verify = options.copy_mode, options.jobs, options.verify
    overwrite, stream = options.overwrite, options.stream
    ref, remaking = request.ref, request.remaking
    _check_stream(ref, copy_mode, stream=stream, runs=verify is VerifyMode.forward)
    sums_wanted = remaking is not None and remaking.sums is not None
    with_checksums = options.checksums or sums_wanted
    warnings = tuple(remaking.warnings) if remaking is not None else ()
    if not overwrite and (output / lineage.NAME).is_file():
        fetch = Fetch.weights if verify in _READS_BASE and not stream else Fetch.headers
        plan = plan_for(request, fetch=fetch, quiet=quiet, progress=progress)
        if _is_written(plan, ref, output, jobs, verify, with_checksums=with_checksums):
            if sums_wanted and remaking is not None:
                remaking.check_sums(checksums.folder_sums(output, jobs))
            space = space_for(plan, output.resolve().parent, copy_mode, may_create=False)
            seconds = time.monotonic() - started
            return UpscaleReport(
                plan,
                output,
                "unchanged",
                space=space,
                tally=ByteCounts(),
                verified=verify.value,
                seconds=seconds,
                notes=warnings,
                remaking=remaking,
            )
    real = check_output(output, overwrite=overwrite)
    plan = plan_for(
        request, fetch=Fetch.files if stream else Fetch.weights, quiet=quiet, progress=progress
    )
    streams = _streams(plan, stream=stream)
    check_apart(output, plan.checkpoint.folder)
    progress.planned(plan)
    key, files = (
        lineage.digest(lineage.lineage(plan)),
        [*lineage.output_files(plan), lineage.NAME, checksums.NAME],
    )
    with Staging(real, overwrite=overwrite, key=key, resumes=streams, files=files) as staging:
        if verify is VerifyMode.forward:
            _check_runs(staging)
        for warning in staging.warnings:
            progress.note(f"warning: {warning}")
        way = copy_mode if staging.storage.writes_anywhere and not streams else CopyMode.copy
        space = space_for(plan, staging.folder, way, may_create=True)
        check_space(space, copy_mode, output)
        for name, path in plan.files:
            staging.copy_file(name, path)
        sums: dict[str, str] | None = {} if with_checksums else None
        if streams:
            tally, streamed = _stream_weights(plan, ref, staging, output, jobs, progress)
        else:
            tally, streamed = (
                _write_weights(
                    plan,
                    staging,
                    space,
                    copy_mode=copy_mode,
                    jobs=jobs,
                    progress=progress,
                    sums=sums,
                ),
                None,
            )

        for name, text in written_texts(plan).items():
            staging.write_text(name, text)
        _verify(plan, ref, staging, verify, jobs, progress)
        if sums is not None:
            sums = checksums.folder_sums(staging.folder, jobs, staging.held, sums)
            if remaking is not None:
                remaking.check_sums(sums)
            staging.write_text(checksums.NAME, checksums.sums_text(sums))
        journal.remove(staging.folder)
        staging.publish()
    seconds, notes = time.monotonic() - started, (*warnings, *staging.warnings)
    return UpscaleReport(
        plan,
        output,
        "written",
        space=space,
        tally=tally,
        verified=verify.value,
        seconds=seconds,
        notes=notes,
        remaking=remaking,
        published=staging.published,
        streamed=streamed,
    )


def _check_runs(staging: Staging) -> None:
    """Check that --verify forward can run the model before it is published.

    Raises:
        OutputError: it is written in place, under its final name.
        MissingExtraError: a library is missing.
    """
    require("--verify forward", "torch", "transformers")
    if staging.published != "rename":
        raise OutputError(
            f"{shown(staging.output)} is written in place, and --verify forward runs a model "
            "before it is published; leave it out, and run dus verify OUT --base MODEL --forward "
            "afterwards"
        )


def _verify(
    plan: UpscalePlan,
    ref: ModelRef,
    staging: Staging,
    verify: VerifyMode,
    jobs: int,
    progress: Progress,
) -> None:
    """Check what was written, before it is published."""
    if verify is not VerifyMode.none:
        check_against_plan(plan, staging.folder, staging.held)
    if verify is VerifyMode.full:
        progress.start("verifying", plan.num_data_bytes)
        _check_bytes(plan, ref, staging.folder, jobs, progress.advance)
    if verify is VerifyMode.forward:
        check_forward(plan, staging.folder, progress)


def _check_stream(ref: ModelRef, copy_mode: CopyMode, *, stream: bool, runs: bool = False) -> None:
    if stream and ref.path is not None:
        raise UsageError(
            f"--stream is for a model on the Hub, and {shown(ref)} is a directory; leave it out"
        )
    if stream and runs:
        raise UsageError(
            "--verify forward runs the base too, and --stream keeps no copy of it; leave out one"
        )
    if stream and copy_mode is CopyMode.clone:
        raise UsageError(
            "--stream has no copy of the model to share blocks with; leave out --copy-mode clone"
        )


def _streams(plan: UpscalePlan, *, stream: bool) -> bool:
    """Whether weights are streamed from the Hub: not if they are all in the cache.

    Raises:
        CheckpointError: they are pickled, and cannot be streamed.
    """
    if not stream or all(shard.fingerprint is not None for shard in plan.checkpoint.shards):
        return False
    if plan.checkpoint.is_pickled:
        raise CheckpointError(
            "--stream: the weights are pickled, and the places of their tensors are known for sure "
            "only after the download; "
            "leave out --stream, or name a revision with safetensors (refs/pr/N often is one)"
        )
    return True


def _is_written(
    plan: UpscalePlan,
    ref: ModelRef,
    output: Path,
    jobs: int,
    verify: VerifyMode,
    *,
    with_checksums: bool,
) -> bool:
    """Whether `output` is what this plan would write, by its lineage, its headers and, if `verify`
    says so, its bytes.
    """
    try:
        incomplete.check_whole(output)
        record = lineage.read_lineage(output)
        if record is None or record != json.loads(dump_json(lineage.lineage(plan))):
            return False
        if with_checksums and not (output / checksums.NAME).is_file():
            return False
        check_against_plan(plan, output)
        if verify is VerifyMode.full:
            _check_bytes(plan, ref, output, jobs, lambda _: None)
        if verify is VerifyMode.forward:
            check_forward(plan, output, NoProgress())
    except (DusError, OSError):
        return False  # `check_output` then refuses it
    return True


def _check_bytes(
    plan: UpscalePlan, ref: ModelRef, folder: Path, jobs: int, on_bytes: Callable[[int], object]
) -> None:
    """Compare every byte with its source. A source that is only on the Hub is replaced by the
    tensor's other copies and the Hub's sha256.
    """
    from dus_cli.hub.streaming import check_against_hub

    check_bytes_against_plan(plan, folder, jobs, on_bytes)
    check_against_hub(plan, ref, folder, jobs=jobs)


def _write_weights(
    plan: UpscalePlan,
    staging: Staging,
    space: Space,
    copy_mode: CopyMode,
    jobs: int,
    progress: Progress,
    sums: dict[str, str] | None,
) -> ByteCounts:
    """Write the shards. If `sums` is not None, it receives the SHA-256 of each file that is summed
    while it is written.

    That takes a file whose bytes all pass through this process: not shared blocks, and not zeros,
    which are holes.
    """
    progress.start("writing", plan.num_data_bytes)
    anywhere = staging.storage.writes_anywhere
    if not anywhere or (sums is not None and not space.can_clone and not plan.treatment.zeros):
        return transfer_in_order(
            plan,
            staging.folder,
            jobs=jobs,
            before_shard=staging.check_ours,
            on_bytes=progress.advance,
            sums=sums,
            direct=anywhere,
        )
    return transfer(
        plan,
        staging.folder,
        clone=space.can_clone,
        must_clone=copy_mode is CopyMode.clone,
        jobs=jobs,
        on_bytes=progress.advance,
    )


def _stream_weights(
    plan: UpscalePlan, ref: ModelRef, staging: Staging, output: Path, jobs: int, progress: Progress
) -> tuple[ByteCounts, Streamed]:
    from dus_cli.hub.streaming import stream_weights

    if not staging.storage.writes_anywhere:
        raise OutputError(
            f"--stream writes bytes in the order in which they arrive, and the file system of "
            f"{shown(output)} takes a file only from its first byte to its last; leave out --stream"
        )
    progress.start("streaming", plan.num_data_bytes)
    with Journal(staging.folder, staging.key) as notes:
        staging.keeps = True
        return stream_weights(
            plan, ref, staging.folder, notes, jobs=jobs, on_bytes=progress.advance
        )
