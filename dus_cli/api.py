"""The Python API: `from dus_cli import upscale, plan, verify`. The commands of the same names call
exactly these.

They take what a person types, return what `--json` prints as typed objects, and raise `DusError`
with one line for each known failure. They print nothing, ask nothing, and set no signal handlers: a
KeyboardInterrupt leaves nothing behind. docs/api.md describes the results.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, TypeVar

from dus_cli.common.bounds import check_numbers
from dus_cli.common.options import options_of, takes_fields
from dus_cli.common.reference import ModelRef, model_text, user_path
from dus_cli.common.units import parse_size
from dus_cli.errors import DusError, UsageError, shown
from dus_cli.hub.opening import open_base
from dus_cli.maps.engines import parse_engines
from dus_cli.maps.naming import Assumption
from dus_cli.maps.recipes import RECIPES
from dus_cli.maps.starts import IDENTITY, StartRule
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import DEFAULT_SHARD_BYTES, MapRequest
from dus_cli.progress import NoProgress, Progress
from dus_cli.push.target import Target, look
from dus_cli.release.remaking import read_remaking
from dus_cli.upscaling import verb as upscaling
from dus_cli.upscaling.report import UpscaleReport
from dus_cli.upscaling.wanted import Wanted
from dus_cli.verification import verb as verification
from dus_cli.verification.options import VerifyOptions
from dus_cli.verification.planned import VerifyMode
from dus_cli.verification.report import Verification
from dus_cli.writing.transfer import DEFAULT_JOBS, CopyMode

_E = TypeVar("_E", bound=Enum)


def upscale(
    model: str | Path | None,
    output: str | Path,
    *,
    lineage: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    trim: int | None = None,
    layers: str | None = None,
    copies: int = 2,
    recipe: str | None = None,
    identity: bool = False,
    double: str | None = None,
    start: str | None = None,
    engines: Sequence[str] = (),
    assume: Mapping[str, Assumption] | None = None,
    dtype: Dtype | Literal["bfloat16", "float16", "float32", "bf16", "fp16", "fp32"] | None = None,
    max_shard_size: int | str = "5GB",
    copy_mode: CopyMode | Literal["auto", "clone", "copy"] = CopyMode.auto,
    stream: bool = False,
    jobs: int = DEFAULT_JOBS,
    verify: VerifyMode | Literal["none", "structure", "full"] = VerifyMode.structure,
    checksums: bool = False,
    overwrite: bool = False,
    push_to: str | None = None,
    private: bool = False,
    branch: str | None = None,
    progress: Progress | None = None,
) -> UpscaleReport:
    """Write a deeper model: two copies of the base's layers, trimmed where they meet, or any other
    map.

    `output` appears whole and verified, or not at all. Where it is already what this call would
    write, the report's `status` is "unchanged" and nothing is done.

    Args:
        model: a Hub id (`org/name`, `org/name@revision`) or a directory. A `Path` is always a
            directory. None: the base that `lineage` records.
        output: the directory to write; it must not exist, or be empty.
        lineage: a release's dus.json, to make it again as it was; `model` then says where the base
            is now.
        revision: of a Hub id: a branch, tag or commit.
        token: of the Hub; HF_TOKEN or the stored login by default.
        trim: layers trimmed from each copy; a quarter of the base's by default.
        layers: any other map, as half-open ranges of base layers, such as "0:24,8:32".
        double: the base with the layers of these ranges twice in a row, such as "2:29".
        copies: how many copies are stacked.
        recipe: a published map by name. It excludes `trim`, `layers`, `double` and `copies`, as
            `layers` and `double` do the others.
        identity: new layers start as identities, so that the model computes what its base does.
        start: how loudly layers speak at first: "copy" (the default), "identity", "half", "fade",
            "fade:cosine" or "scale:C" (`dus_cli.maps.starts`).
        engines: names of inference engines, such as "llama.cpp", that must compute the output as
            config.json says; "all" for every one that dus knows. Without `trim` it is then the
            nearest to a quarter that is right for them.
        assume: for fields of config.json that dus does not know, "keep" or "map".
        dtype: what floating-point tensors are cast to (takes the heal extra).
        max_shard_size: of the largest file of weights: bytes, or text such as "5GB" in decimal
            units.
        copy_mode: how bytes move; "auto" clones where the file system can.
        stream: weights come from the Hub straight into the output, without a copy in the cache.
            What a killed run has fetched is kept beside it, and the same call goes on from there.
        jobs: parallel copies, 1 to 64.
        verify: what is checked before publishing.
        checksums: also write SHA256SUMS.
        overwrite: replace an existing output, once the new one is whole.
        push_to: a repo on the Hub, to push the verified output to; made where it is not there.
        private: that repo is a private one.
        branch: of that repo; made where it is not there, main by default.
        progress: told what happens while it happens, from several threads.

    Raises:
        UsageError: an argument that no model could make right.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    told = progress or NoProgress()
    wanted = _wanted(
        model,
        lineage,
        revision,
        token=token,
        trim=trim,
        layers=layers,
        copies=copies,
        recipe=recipe,
        assume=assume,
        dtype=dtype,
        max_shard_size=max_shard_size,
        identity=identity,
        double=double,
        start=start,
        engines=parse_engines(engines),
    )
    mode = _choice(VerifyMode, verify, "verify")
    target = _target(push_to, branch, token, private=private)
    if target is not None and mode is VerifyMode.none:
        raise UsageError("--push-to pushes what was verified: leave out --verify none")
    if target is not None:
        look(target)  # what is in the way is said before gigabytes are written
    report = upscaling.upscale(
        wanted,
        user_path(output),
        copy_mode=_choice(CopyMode, copy_mode, "copy_mode"),
        stream=stream,
        jobs=_jobs(jobs),
        verify=mode,
        with_checksums=checksums,
        overwrite=overwrite,
        quiet=not told.is_live,
        progress=told,
    )
    if target is None:
        return report
    from dus_cli.push import verb as pushing  # most outputs are pushed by nobody

    return replace(
        report,
        push=pushing.send(user_path(output), target, jobs=jobs, progress=told, is_verified=True),
    )


def plan(
    model: str | Path | None,
    output: str | Path,
    *,
    lineage: str | Path | None = None,
    revision: str | None = None,
    token: str | None = None,
    trim: int | None = None,
    layers: str | None = None,
    copies: int = 2,
    recipe: str | None = None,
    identity: bool = False,
    double: str | None = None,
    start: str | None = None,
    engines: Sequence[str] = (),
    assume: Mapping[str, Assumption] | None = None,
    dtype: Dtype | Literal["bfloat16", "float16", "float32", "bf16", "fp16", "fp32"] | None = None,
    max_shard_size: int | str = "5GB",
    copy_mode: CopyMode | Literal["auto", "clone", "copy"] = CopyMode.auto,
    stream: bool = False,
    checksums: bool = False,
    overwrite: bool = False,
    push_to: str | None = None,
    private: bool = False,
    branch: str | None = None,
) -> UpscaleReport:
    """What `upscale` with the same arguments would write, as its dry run: nothing is written, no
    weights are read.

    The report's `status` is "planned"; its `plan` has every tensor, and its warnings what would
    stop the run.

    Raises:
        UsageError: an argument that no model could make right.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    wanted = _wanted(
        model,
        lineage,
        revision,
        token=token,
        trim=trim,
        layers=layers,
        copies=copies,
        recipe=recipe,
        assume=assume,
        dtype=dtype,
        max_shard_size=max_shard_size,
        identity=identity,
        double=double,
        start=start,
        engines=parse_engines(engines),
    )
    target = _target(push_to, branch, token, private=private)
    remote = None if target is None else look(target)
    report = upscaling.preview(
        wanted,
        user_path(output),
        copy_mode=_choice(CopyMode, copy_mode, "copy_mode"),
        stream=stream,
        overwrite=overwrite,
    )
    if target is None or remote is None:
        return report
    from dus_cli.push import verb as pushing

    return replace(
        report, push=pushing.preview(report.plan, target, remote, with_checksums=checksums)
    )


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
        DusError: the folder is not there, or the base cannot be read.
    """
    told, folder = progress or NoProgress(), user_path(folder)
    given = options_of(VerifyOptions, options, fields)
    if not folder.is_dir():
        raise DusError(f"{shown(folder)} is not a directory; give the one that dus upscale wrote")
    ref = None if given.base is None else ModelRef.parse(given.base, token=given.token)
    base = None if ref is None else open_base(ref, quiet=not told.is_live, progress=told)
    return verification.verify(folder, base, given, progress=told)


def _wanted(
    model: str | Path | None,
    lineage: str | Path | None,
    revision: str | None,
    token: str | None,
    trim: int | None,
    layers: str | None,
    copies: int,
    recipe: str | None,
    assume: Mapping[str, Assumption] | None,
    dtype: Dtype | str | None,
    max_shard_size: int | str,
    *,
    identity: bool,
    double: str | None,
    start: str | None,
    engines: tuple[str, ...],
) -> Wanted:
    size = _size(max_shard_size)
    if lineage is not None:
        given = {
            "revision": revision,
            "trim": trim,
            "layers": layers,
            "copies": copies != 2,
            "assume": assume or None,
            "recipe": recipe,
            "identity": identity,
            "double": double,
            "start": start,
            "dtype": dtype,
            "max-shard-size": size != DEFAULT_SHARD_BYTES,
        }
        names = [
            f"--{name}" for name, value in given.items() if value is not None and value is not False
        ]
        if names:
            raise UsageError(f"--from says {' and '.join(names)} already, as it was; leave it out")
        remaking = read_remaking(
            user_path(lineage), None if model is None else model_text(model), token=token
        )
        remaking = replace(remaking, request=replace(remaking.request, engines=engines))
        return Wanted(*remaking.parts, remaking)
    if model is None:
        raise UsageError("which model? give a directory or a Hub id, or lineage")
    return Wanted(
        ModelRef.parse(model_text(model), revision=revision, token=token),
        _request(
            trim,
            layers,
            copies,
            recipe=recipe,
            double=double,
            start=start,
            assume=assume or {},
            engines=engines,
            identity=identity,
        ),
        size,
        None if dtype is None else _choice(Dtype, dtype, "dtype"),
    )


def _request(
    trim: int | None,
    layers: str | None,
    copies: int,
    recipe: str | None,
    double: str | None,
    start: str | None,
    assume: Mapping[str, Assumption],
    engines: tuple[str, ...],
    *,
    identity: bool,
) -> MapRequest:
    """The map and its start; `identity` and a start of that name are one."""
    try:
        rule = StartRule() if start is None else StartRule.parse(start)
    except ValueError as error:
        raise UsageError(f"start: {error}") from None
    if rule.name == IDENTITY:
        identity, rule = True, StartRule()
    elif start is not None and (
        identity or (recipe is not None and recipe in RECIPES and RECIPES[recipe].identity)
    ):
        what = "--identity" if identity else f"--recipe {recipe}"
        raise UsageError(f"{what} says how new layers start; leave out --start")
    return MapRequest(
        trim,
        layers,
        copies,
        recipe=recipe,
        identity=identity,
        assume=tuple(assume.items()),
        engines=engines,
        double=double,
        start=rule,
    )


def _target(
    push_to: str | None, branch: str | None, token: str | None, *, private: bool
) -> Target | None:
    """Where to push; None for nowhere."""
    if push_to is None:
        if private or branch is not None:
            raise UsageError("--private and --branch are of --push-to; say where to push")
        return None
    return Target.parse(push_to, branch=branch, private=private, token=token)


def _size(size: int | str) -> int:
    try:
        num_bytes = parse_size(str(size))
    except ValueError as error:
        raise UsageError(f"max_shard_size: {error}") from None
    check_numbers(max_shard_size=num_bytes)
    return num_bytes


def _choice(kind: type[_E], value: _E | str, name: str) -> _E:
    try:
        return kind(value)
    except ValueError:
        raise UsageError(
            f"{name}: {shown(value)!r} is not one of {', '.join(choice.value for choice in kind)}"
        ) from None


def _jobs(jobs: int) -> int:
    check_numbers(jobs=jobs)
    return jobs
