"""The Python API: `from dus_cli import upscale, plan, verify, probe, evaluate, heal, push`. The
commands call these functions.

They take the values that a user types, return what `--json` prints as typed objects, and raise
`DusError` with one line for each known failure. They print nothing, prompt for nothing, and set no
signal handlers: a KeyboardInterrupt leaves nothing behind. docs/api.md describes the results.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from dus_cli.common.bounds import check_numbers
from dus_cli.common.libraries import require
from dus_cli.common.options import options_of, settled, takes_fields
from dus_cli.common.reference import ModelRef, model_text, user_path
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
    from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
    from dus_cli.evaluation.report import EvalReport, Gates
    from dus_cli.heal.options import (
        BudgetOptions,
        DataOptions,
        FitOptions,
        HealOptions,
        LaunchOptions,
        RecipeOptions,
        SavingOptions,
    )
    from dus_cli.heal.watch.views import View
    from dus_cli.probe.found import Probe, ProbePlan
    from dus_cli.probe.options import ProbeOptions
    from dus_cli.push.options import PushOptions
    from dus_cli.push.report import PushReport
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


@overload
def probe(
    model: str | Path,
    options: ProbeOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    dry_run: Literal[False] = False,
    progress: Progress | None = None,
) -> Probe: ...


@overload
def probe(
    model: str | Path,
    options: ProbeOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool,
    progress: Progress | None = None,
) -> Probe | ProbePlan: ...


def probe(
    model: str | Path,
    options: ProbeOptions,
    *,
    revision: str | None = None,
    token: str | None = None,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> Probe | ProbePlan:
    """Measure what loss layer maps would have right after scaling, and write no model.

    Args:
        model: a Hub id (`org/name`, `org/name@revision`) or a directory. A `Path` is always a
            directory.
        options: the text, the maps, and how they are measured.
        revision: branch, tag or commit of a Hub id.
        token: Hub access token; HF_TOKEN or the stored login by default.
        dry_run: measure nothing, and return the plan: which maps would be measured, and what that
            takes.
        progress: receives the progress.

    Raises:
        UsageError: an option is wrong for any model.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    from dus_cli.probe import verb

    progress, options = progress or NoProgress(), settled(options)
    ref = ModelRef.parse(model_text(model), revision=revision, token=token)
    if dry_run:
        return verb.plan_probe(ref, options, quiet=not progress.is_live)
    return verb.probe(ref, options, progress, quiet=not progress.is_live)


def evaluate(
    models: Sequence[str | Path],
    *,
    text: TextOptions | None = None,
    tasks: TaskOptions | None = None,
    scoring: ScoringOptions | None = None,
    gates: Gates | None = None,
    with_base: bool = False,
    token: str | None = None,
    progress: Progress | None = None,
) -> EvalReport:
    """Compare models on the same held-out text, on tasks, or on both.

    A missed gate does not raise: the report's `missed` lists it.

    Args:
        models: Hub ids or directories; the others are compared with the first, the baseline.
        text: the held-out text, and how much of it is read.
        tasks: tasks of lm-evaluation-harness (needs the eval extra).
        scoring: how text is cut into windows, and how the models are run.
        gates: limits that every model but the baseline must meet.
        with_base: also evaluate the base inside the first model, an up-scaled one, on the text,
            and take it as the baseline.
        token: Hub access token; HF_TOKEN or the stored login by default.
        progress: receives the progress.

    Raises:
        UsageError: options are wrong for any model, or do not go together.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
    from dus_cli.evaluation.report import EvalReport, Gates

    progress, gates = progress or NoProgress(), settled(gates or Gates())
    text, tasks = settled(text or TextOptions()), settled(tasks or TaskOptions())
    refs = [ModelRef.parse(model_text(model), token=token) for model in models]
    if not refs:
        raise UsageError("models: there is none; give a directory or a Hub id")
    misfit = gates.misfit(
        len(refs) + with_base, has_data=bool(text.data), has_tasks=bool(tasks.tasks)
    )
    if misfit is None and with_base and not text.data:
        misfit = "--with-base", "it is the baseline of --data; give --data"
    if misfit is not None:
        raise UsageError(f"{misfit[0]}: {misfit[1]}")
    require("dus eval", "numpy", "torch", "transformers")
    from dus_cli.evaluation.verb import evaluate as verb

    losses, scores = verb(
        refs,
        text if text.data else None,
        settled(scoring or ScoringOptions()),
        progress,
        tasks=tasks if tasks.tasks else None,
        with_base=with_base,
        quiet=not progress.is_live,
    )
    return EvalReport(losses, scores, gates)


def push(
    output: str | Path,
    repo: str,
    options: PushOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Verify a finished model, push it to the Hub, and compare what the Hub holds afterwards.

    Args:
        output: the directory that `upscale` or `heal` wrote.
        repo: `org/name` on the Hub.
        options: a private repo or not, the branch, the token, and the number of parallel reads.
        dry_run: report what would be pushed, and where; push nothing.
        progress: receives the progress, from several threads.

    Raises:
        UsageError: an option is wrong for any model.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    from dus_cli.push.options import PushOptions
    from dus_cli.push.target import Target
    from dus_cli.push.verb import preview_folder, send

    options, folder = settled(options or PushOptions()), user_path(output)
    target = Target.parse(repo, branch=options.branch, private=options.private, token=options.token)
    if dry_run:
        return preview_folder(folder, target)
    return send(folder, target, jobs=options.jobs, progress=progress or NoProgress())


def heal(
    model: str | Path,
    output: str | Path | None = None,
    *,
    data: DataOptions,
    budget: BudgetOptions | None = None,
    recipe: RecipeOptions | None = None,
    fit: FitOptions | None = None,
    launch: LaunchOptions | None = None,
    saving: SavingOptions | None = None,
    dry_run: bool = False,
    pilot_seconds: float | None = None,
    view: View | None = None,
) -> dict[str, Any]:
    """Heal an up-scaled model by continued pretraining, and prove that it healed.

    The same call again continues an interrupted run. While the workers run, a signal that would
    end the process makes them save a checkpoint first, and the call raises `StoppedError`.

    Args:
        model: the directory of the model to heal.
        output: the directory to write; MODEL-healed by default.
        data: the training text and the held-out text.
        budget: how many tokens, steps or epochs to train; one epoch by default.
        recipe: batch size, learning rates and what is trained.
        fit: how the run fits the devices: precision, sharding, micro-batch.
        launch: how many workers, on how many nodes.
        saving: how often the model is measured, saved and exported.
        dry_run: count tokens and steps, estimate memory and FLOPs; write nothing.
        pilot_seconds: with `dry_run`: train for so long in a temporary folder, and report the
            run's speed, memory and time by it.
        view: receives the progress; `dus_cli.heal.watch.views.NoView` has all its methods.

    Returns:
        The report, as `--json` prints it: report.json, or the dry run's.

    Raises:
        UsageError: an option is wrong for any model.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    options = heal_options(
        model,
        output,
        data=data,
        budget=budget,
        recipe=recipe,
        fit=fit,
        launch=launch,
        saving=saving,
    )
    check_numbers(pilot_seconds=pilot_seconds)
    if pilot_seconds is not None and not dry_run:
        raise UsageError("pilot_seconds is a part of dry_run; give it too")
    require("dus heal", "numpy", "torch", "transformers")
    from dus_cli.heal.launch import verb
    from dus_cli.heal.launch.report import dry_run_json
    from dus_cli.heal.watch.views import NoView

    with view or NoView() as shown_view:
        if dry_run:
            run, shape, found = verb.preview(options, shown_view, pilot_seconds)
            return dry_run_json(run, shape, options, found)
        return verb.heal(options, shown_view)


def heal_options(
    model: str | Path,
    output: str | Path | None = None,
    *,
    data: DataOptions,
    budget: BudgetOptions | None = None,
    recipe: RecipeOptions | None = None,
    fit: FitOptions | None = None,
    launch: LaunchOptions | None = None,
    saving: SavingOptions | None = None,
) -> HealOptions:
    """The options of a run, each one checked. The arguments are those of `heal`.

    Raises:
        UsageError: an option does not take its value.
    """
    from dus_cli.heal.options import (
        BudgetOptions,
        FitOptions,
        HealOptions,
        LaunchOptions,
        RecipeOptions,
        SavingOptions,
    )

    folder = user_path(model)
    return HealOptions(
        model=folder,
        output=folder.resolve().with_name(f"{folder.resolve().name}-healed")
        if output is None
        else user_path(output),
        data=settled(data),
        budget=settled(budget or BudgetOptions()),
        recipe=settled(recipe or RecipeOptions()),
        fit=settled(fit or FitOptions()),
        launch=settled(launch or LaunchOptions()),
        saving=settled(saving or SavingOptions()),
    )


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
