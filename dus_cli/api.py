"""The Python API: `from dus_cli import upscale, plan, verify`. The commands call these functions.

They take the values that a user types, return what `--json` prints as typed objects, and raise
`DusError` with one line for each known failure. They print nothing, prompt for nothing, and set no
signal handlers: a KeyboardInterrupt leaves nothing behind. docs/api.md describes the results.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_cli.common.libraries import require
from dus_cli.common.options import options_of, takes_fields
from dus_cli.common.reference import ModelRef, user_path
from dus_cli.errors import DusError, UsageError, shown
from dus_cli.hub.opening import open_base
from dus_cli.progress import NoProgress, Progress
from dus_cli.upscaling import verb as upscaling
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.report import UpscaleReport
from dus_cli.upscaling.request import UpscaleRequest
from dus_cli.verification.options import VerifyOptions
from dus_cli.verification.planned import VerifyMode

# Modules that few calls need are imported in the calls: importing them takes longer than a plan.
if TYPE_CHECKING:
    from dus_cli.push.target import Target
    from dus_cli.verification.report import Verification


@takes_fields(UpscaleOptions)
def upscale(
    model: str | Path | None,
    output: str | Path,
    options: UpscaleOptions | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> UpscaleReport:
    """Write a deeper model: two copies of the base's layers, trimmed where they meet (SOLAR,
    arXiv:2312.15166), or any other layer map.

    `output` appears whole and verified, or not at all. If it is already what this call would
    write, the report's `status` is "unchanged" and nothing is done.

    Args:
        model: a Hub id (`org/name`, `org/name@revision`) or a directory. A `Path` is always a
            directory. None: the base that `lineage` records.
        output: the directory to write; it must not exist, or be empty.
        options: the layer map, and how the output is written and pushed.
        progress: receives the progress, from several threads.
        fields: fields of `options` by keyword, each a value or the text that a user would type.

    Raises:
        UsageError: an argument is wrong for any model.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    progress, folder = progress or NoProgress(), user_path(output)
    options = options_of(UpscaleOptions, options, fields)
    request = UpscaleRequest.of(model, options)
    target = _target(options)
    if target is not None and options.verify is VerifyMode.none:
        raise UsageError("--push-to pushes what was verified: leave out --verify none")
    if target is not None:
        from dus_cli.push.target import look

        look(target)  # report what would stop the push before gigabytes are written
    report = upscaling.upscale(
        request, folder, options, quiet=not progress.is_live, progress=progress
    )
    if target is None:
        return report
    from dus_cli.push import verb as pushing

    pushed = pushing.send(folder, target, jobs=options.jobs, progress=progress, is_verified=True)
    return replace(report, push=pushed)


@takes_fields(UpscaleOptions)
def plan(
    model: str | Path | None,
    output: str | Path,
    options: UpscaleOptions | None = None,
    **fields: Any,
) -> UpscaleReport:
    """Plan what `upscale` would write with the same arguments (its dry run). Write nothing, and
    read no weights.

    The report's `status` is "planned"; its `plan` has every tensor, and its `warnings` say what
    would stop the run.

    Raises:
        UsageError: an argument is wrong for any model.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    options = options_of(UpscaleOptions, options, fields)
    request = UpscaleRequest.of(model, options)
    target = _target(options)
    if target is None:
        return upscaling.preview(request, user_path(output), options)
    from dus_cli.push import verb as pushing
    from dus_cli.push.target import look

    remote = look(target)
    report = upscaling.preview(request, user_path(output), options)
    pushed = pushing.preview(report.plan, target, remote, with_checksums=options.checksums)
    return replace(report, push=pushed)


@takes_fields(VerifyOptions)
def verify(
    folder: str | Path,
    options: VerifyOptions | None = None,
    *,
    progress: Progress | None = None,
    **fields: Any,
) -> Verification:
    """Check a checkpoint: headers, index, config, duplicated layers byte by byte, checksums.

    Problems do not raise: the result lists every one, and `is_sound` is true if there is none.

    Args:
        folder: the directory to check.
        options: the base to compare with, and how bytes are read.
        progress: receives the progress, from several threads.
        fields: fields of `options` by keyword.

    Raises:
        UsageError: an argument is wrong for any model.
        DusError: the folder does not exist, the base cannot be read, or a library is missing.
    """
    from dus_cli.verification import verb as verification

    progress, folder = progress or NoProgress(), user_path(folder)
    options = options_of(VerifyOptions, options, fields)
    if options.forward and options.base is None:
        raise UsageError("--forward compares with the base; give --base")
    if options.data and not options.forward:
        raise UsageError("--data is the text of --forward; give it too")
    if options.forward:
        require("--forward", "numpy", "torch", "transformers")
    if not folder.is_dir():
        raise DusError(f"{shown(folder)} is not a directory; give the one that dus upscale wrote")
    ref = None if options.base is None else ModelRef.parse(options.base, token=options.token)
    base = None if ref is None else open_base(ref, quiet=not progress.is_live, progress=progress)
    return verification.verify(folder, base, options, progress=progress)


def _target(options: UpscaleOptions) -> Target | None:
    """Where to push; None if nothing is pushed."""
    if options.push_to is None:
        if options.private or options.branch is not None:
            raise UsageError("--private and --branch need --push-to; give it, or leave them out")
        return None
    from dus_cli.push.target import Target

    return Target.parse(
        options.push_to, branch=options.branch, private=options.private, token=options.token
    )
