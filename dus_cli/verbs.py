"""The Python API of the verbs that take options as objects: `from dus_cli import heal, probe,
evaluate, push`.

The commands of these names call exactly these functions with the same objects. Like `upscale` they
print nothing and raise `DusError` with one line for each known failure. docs/api.md describes the
results.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, overload

from dus_cli.common.libraries import require
from dus_cli.common.options import settled
from dus_cli.common.reference import ModelRef, model_text, user_path
from dus_cli.errors import UsageError
from dus_cli.evaluation.options import ScoringOptions, TaskOptions, TextOptions
from dus_cli.heal.options import Budget, DataOptions, Fit, HealOptions, Keeping, Launch, Recipe
from dus_cli.probe.options import ProbeOptions
from dus_cli.progress import NoProgress, Progress
from dus_cli.push.options import PushOptions

if TYPE_CHECKING:
    from dus_cli.evaluation.report import EvalReport, Gates
    from dus_cli.heal.watch.views import View
    from dus_cli.probe.found import Probe, ProbePlan
    from dus_cli.push.report import PushReport


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
        revision: of a Hub id: a branch, tag or commit.
        token: Hub access token; HF_TOKEN or the stored login by default.
        dry_run: measure nothing, and return the plan: which maps would be measured, and what that
            takes.
        progress: told what happens while it happens.

    Raises:
        UsageError: an option that no model could make right.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    from dus_cli.probe import verb

    told, given = progress or NoProgress(), settled(options)
    ref = ModelRef.parse(model_text(model), revision=revision, token=token)
    if dry_run:
        return verb.plan_probe(ref, given, quiet=not told.is_live)
    return verb.probe(ref, given, told, quiet=not told.is_live)


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

    What a model misses of `gates` is no exception: the report's `missed` lists it.

    Args:
        models: Hub ids or directories; the first is the baseline that the others are held against.
        text: the held-out text, and how much of it is read.
        tasks: tasks of lm-evaluation-harness (takes the eval extra).
        scoring: how text is cut, and how the models are run.
        gates: what every model but the baseline must reach.
        with_base: the first model is an up-scaled one, and the base inside it is the baseline of
            the text.
        token: Hub access token; HF_TOKEN or the stored login by default.
        progress: told what happens while it happens.

    Raises:
        UsageError: options that no model could make right, or that do not go together.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    from dus_cli.evaluation.report import EvalReport, Gates

    told, kept = progress or NoProgress(), settled(gates or Gates())
    read, run = settled(text or TextOptions()), settled(tasks or TaskOptions())
    refs = [ModelRef.parse(model_text(model), token=token) for model in models]
    if not refs:
        raise UsageError("models: there is none; give a directory or a Hub id")
    found = kept.misfit(len(refs) + with_base, has_data=bool(read.data), has_tasks=bool(run.tasks))
    if found is None and with_base and not read.data:
        found = "--with-base", "it is the baseline of --data; give --data"
    if found is not None:
        raise UsageError(f"{found[0]}: {found[1]}")
    require("dus eval", "numpy", "torch", "transformers")
    from dus_cli.evaluation.verb import evaluate as verb

    losses, scores = verb(
        refs,
        read if read.data else None,
        settled(scoring or ScoringOptions()),
        told,
        tasks=run if run.tasks else None,
        with_base=with_base,
        quiet=not told.is_live,
    )
    return EvalReport(losses, scores, kept)


def push(
    output: str | Path,
    repo: str,
    options: PushOptions | None = None,
    *,
    dry_run: bool = False,
    progress: Progress | None = None,
) -> PushReport:
    """Push a finished model to the Hub, once it is verified, and compare what the Hub then holds.

    Args:
        output: the directory that `upscale` or `heal` wrote.
        repo: `org/name` on the Hub.
        options: which kind of repo and branch, whose token, how many parallel reads.
        dry_run: say what would be pushed, and where; push nothing.
        progress: told what happens while it happens, from several threads.

    Raises:
        UsageError: an option that no model could make right.
        DusError: any other known failure, in one line; its kinds are in `dus_cli.errors`.
    """
    from dus_cli.push.target import Target
    from dus_cli.push.verb import preview_folder, send

    given, folder = settled(options or PushOptions()), user_path(output)
    target = Target.parse(repo, branch=given.branch, private=given.private, token=given.token)
    if dry_run:
        return preview_folder(folder, target)
    return send(folder, target, jobs=given.jobs, progress=progress or NoProgress())


def heal(
    model: str | Path,
    output: str | Path | None = None,
    *,
    data: DataOptions,
    budget: Budget | None = None,
    recipe: Recipe | None = None,
    fit: Fit | None = None,
    launch: Launch | None = None,
    keeping: Keeping | None = None,
    dry_run: bool = False,
    view: View | None = None,
) -> dict[str, Any]:
    """Heal an up-scaled model by continued pretraining, and prove that it healed.

    The same call again goes on where a run was. While the workers run, a signal that would end the
    process makes them save a checkpoint first, and the call ends with a `StoppedError`.

    Args:
        model: the directory of the model to heal.
        output: where the healed model goes; MODEL-healed by default.
        data: the text.
        budget: how long; one epoch by default.
        recipe: how it learns.
        fit: how it fits the devices.
        launch: the workers.
        keeping: what is measured and kept on the way.
        dry_run: count tokens and steps, estimate memory and FLOPs; write nothing.
        view: told what happens while it happens; `dus_cli.heal.watch.views.NoView` has all its
            methods.

    Returns:
        The report, as `--json` prints it: report.json, or the dry run's.

    Raises:
        UsageError: an option that no model could make right.
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
        keeping=keeping,
    )
    require("dus heal", "numpy", "torch", "transformers")
    from dus_cli.heal.launch import verb
    from dus_cli.heal.launch.report import dry_run_json
    from dus_cli.heal.watch.views import NoView

    with view or NoView() as told:
        if dry_run:
            run, shape = verb.preview(options, told)
            return dry_run_json(run, shape, options)
        return verb.heal(options, told)


def heal_options(
    model: str | Path,
    output: str | Path | None = None,
    *,
    data: DataOptions,
    budget: Budget | None = None,
    recipe: Recipe | None = None,
    fit: Fit | None = None,
    launch: Launch | None = None,
    keeping: Keeping | None = None,
) -> HealOptions:
    """The options of a healing, checked each by itself. Arguments as of `heal`.

    Raises:
        UsageError: a value that an option does not take.
    """
    folder = user_path(model)
    return HealOptions(
        model=folder,
        output=folder.resolve().with_name(f"{folder.resolve().name}-healed")
        if output is None
        else user_path(output),
        data=settled(data),
        budget=settled(budget or Budget()),
        recipe=settled(recipe or Recipe()),
        fit=settled(fit or Fit()),
        launch=settled(launch or Launch()),
        keeping=settled(keeping or Keeping()),
    )
