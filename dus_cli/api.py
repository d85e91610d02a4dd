"""The Python API: `from dus_cli import upscale, plan, verify`. The commands of the same names call
exactly these.

They take what a person types, return what `--json` prints as typed objects, and raise `DusError`
with one line for each known failure. They print nothing, ask nothing, and set no signal handlers: a
KeyboardInterrupt leaves nothing behind. docs/api.md describes the results.
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
from dus_cli.upscaling.wanted import Wanted
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
    """Write a deeper model: two copies of the base's layers, trimmed where they meet, or any other
    map.

    `output` appears whole and verified, or not at all. If it is already what this call would
    write, the report's `status` is "unchanged" and nothing is done.

    Args:
        model: a Hub id (`org/name`, `org/name@revision`) or a directory. A `Path` is always a
            directory. None: the base that `lineage` records.
        output: the directory to write; it must not exist, or be empty.
        options: the layer map, and how the output is written and pushed.
        progress: told what happens while it happens, from several threads.
        fields: fields of `options` by keyword, each a value or what a person would type for it.

    Raises:
        UsageError: an argument that no model could make right.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    told, folder = progress or NoProgress(), user_path(output)
    given = options_of(UpscaleOptions, options, fields)
    wanted = Wanted.of(model, given)
    target = _target(given)
    if target is not None and given.verify is VerifyMode.none:
        raise UsageError("--push-to pushes what was verified: leave out --verify none")
    if target is not None:
        from dus_cli.push.target import look

        look(target)  # what is in the way is said before gigabytes are written
    report = upscaling.upscale(wanted, folder, given, quiet=not told.is_live, progress=told)
    if target is None:
        return report
    from dus_cli.push import verb as pushing

    pushed = pushing.send(folder, target, jobs=given.jobs, progress=told, is_verified=True)
    return replace(report, push=pushed)


@takes_fields(UpscaleOptions)
def plan(
    model: str | Path | None,
    output: str | Path,
    options: UpscaleOptions | None = None,
    **fields: Any,
) -> UpscaleReport:
    """What `upscale` with the same arguments would write, as its dry run: nothing is written, no
    weights are read.

    The report's `status` is "planned"; its `plan` has every tensor, and its warnings what would
    stop the run.

    Raises:
        UsageError: an argument that no model could make right.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    given = options_of(UpscaleOptions, options, fields)
    wanted = Wanted.of(model, given)
    target = _target(given)
    if target is None:
        return upscaling.preview(wanted, user_path(output), given)
    from dus_cli.push import verb as pushing
    from dus_cli.push.target import look

    remote = look(target)
    report = upscaling.preview(wanted, user_path(output), given)
    pushed = pushing.preview(report.plan, target, remote, with_checksums=given.checksums)
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

    Problems are no exceptions: the result lists every one, and `is_sound` is true if there is none.

    Args:
        folder: the directory to check.
        options: what it is held against, and how bytes are read.
        progress: told what happens while it happens, from several threads.
        fields: fields of `options` by keyword.

    Raises:
        UsageError: an argument that no model could make right.
        DusError: the folder is not there, or the base cannot be read; a library is missing.
    """
    from dus_cli.verification import verb as verification

    told, folder = progress or NoProgress(), user_path(folder)
    given = options_of(VerifyOptions, options, fields)
    if given.forward and given.base is None:
        raise UsageError("--forward compares with the base; give --base")
    if given.data and not given.forward:
        raise UsageError("--data is the text of --forward; give it too")
    if given.forward:
        require("--forward", "numpy", "torch", "transformers")
    if not folder.is_dir():
        raise DusError(f"{shown(folder)} is not a directory; give the one that dus upscale wrote")
    ref = None if given.base is None else ModelRef.parse(given.base, token=given.token)
    base = None if ref is None else open_base(ref, quiet=not told.is_live, progress=told)
    return verification.verify(folder, base, given, progress=told)


def _target(options: UpscaleOptions) -> Target | None:
    """Where to push; None for nowhere."""
    if options.push_to is None:
        if options.private or options.branch is not None:
            raise UsageError("--private and --branch are of --push-to; say where to push")
        return None
    from dus_cli.push.target import Target

    return Target.parse(
        options.push_to, branch=options.branch, private=options.private, token=options.token
    )
