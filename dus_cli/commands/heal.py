"""The command `dus heal`: parse, call, print."""

from __future__ import annotations

import json
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from dus_cli import api
from dus_cli.commands.config import toml_text
from dus_cli.commands.options import (
    AsJson,
    MoreData,
    Quiet,
    ShowProgress,
    effective_mode,
    parser,
    path_parser,
)
from dus_cli.commands.signature import takes_options
from dus_cli.common.libraries import require
from dus_cli.console.terminal import fitted
from dus_cli.errors import UsageError
from dus_cli.heal.launch.jobs import JobKind, job_text
from dus_cli.heal.options import (
    BudgetOptions,
    DataOptions,
    FitOptions,
    LaunchOptions,
    RecipeOptions,
    SavingOptions,
    parse_time,
    typed_options,
)
from dus_cli.heal.run import options_of_run
from dus_cli.progress import ProgressMode


@takes_options(
    "model",
    "files",
    "more_data",
    "output",
    "text_field",
    "on_bad_line",
    "eval_files",
    convert=options_of_run,
)
def heal(
    model: Annotated[
        Path,
        typer.Argument(
            metavar="MODEL", parser=path_parser, help="The directory of the model to heal."
        ),
    ],
    *,
    more_data: MoreData = None,
    output: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=path_parser,
            help="Directory for the healed model. Default: MODEL-healed.",
        ),
    ] = None,
    data: DataOptions,
    budget: BudgetOptions,
    recipe: RecipeOptions,
    fit: FitOptions,
    launch: LaunchOptions,
    print_command: Annotated[
        bool,
        typer.Option(
            "--print-command",
            help="Print the workers' command line and exit.",
            rich_help_panel="Workers",
        ),
    ] = False,
    print_job: Annotated[
        Optional[JobKind],  # noqa: UP045
        typer.Option(
            "--print-job",
            metavar="KIND",
            help="Print the batch job (slurm, k8s, sky or hf-jobs) that runs this on --nnodes "
            "nodes with --nproc-per-node GPUs each, and exit.",
            rich_help_panel="Workers",
        ),
    ] = None,
    saving: SavingOptions,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Count tokens and steps, estimate memory and FLOPs; write nothing."
        ),
    ] = False,
    pilot: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--pilot",
            metavar="TIME",
            parser=parser(parse_time),
            help="With --dry-run: train for so long (2m) in a temporary folder, and tell the run's "
            "speed, memory and time by it.",
        ),
    ] = None,
    print_config: Annotated[
        bool,
        typer.Option("--print-config", help="Print all options as TOML, for --config, and exit."),
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Heal an up-scaled model by continued pretraining, and prove that it healed.

    Example: dus heal out/ --data corpus.jsonl --until base -o healed/

    Five options are enough for most runs: --data (the text), -o (the directory to write), --tokens
    (how long; one epoch by default), --until base (stop once the loss is the base's) and --dry-run
    (estimate time and memory).

    Measures the loss of the base and of the scaled model, trains under torchrun, and writes an
    ordinary checkpoint with its loss curve. The same command run again continues a run.
    """
    if pilot is not None and not dry_run:
        raise UsageError("--pilot is a part of --dry-run; give it too")
    data = replace(data, files=(*data.files, *(more_data or ())))
    options = api.heal_options(
        model,
        output,
        data=data,
        budget=budget,
        recipe=recipe,
        fit=fit,
        launch=launch,
        saving=saving,
    )
    if print_config:
        typed = typed_options(data, budget, recipe, fit, launch, saving)
        sys.stdout.write(toml_text({"model": str(model), "output": str(options.output), **typed}))
        return
    if print_job is not None:
        job = job_text(print_job, replace(options, output=output or _beside(model)))
        sys.stdout.write(json.dumps({"job": job}) + "\n" if as_json else job)
        return
    # Imported here, because they import torch.
    require("dus heal", "numpy", "torch", "transformers")
    from dus_cli.heal.launch import verb as launcher
    from dus_cli.heal.launch.report import command_json, dry_run_json, dry_run_text, heal_text
    from dus_cli.heal.watch.views import view_for

    prints_text = not (quiet or as_json)
    with view_for(effective_mode(progress, quiet=not prints_text)) as view:
        if dry_run:
            run, model_shape, found = launcher.preview(options, view, pilot)
            output_text = (
                json.dumps(dry_run_json(run, model_shape, options, found))
                if as_json
                else dry_run_text(run, model_shape, options, found)
            )
        elif print_command:
            command = launcher.prepared_command(options, view)
            output_text = (
                json.dumps(command_json(command, options)) if as_json else shlex.join(command)
            )
        else:
            report = launcher.heal(options, view)
            output_text = json.dumps(report) if as_json else heal_text(report, options.output)
    if as_json or prints_text or print_command:
        is_exact = as_json or (print_command and not dry_run)
        sys.stdout.write((output_text if is_exact else fitted(output_text)) + "\n")


def _beside(model: Path) -> Path:
    """The default output as the job will see it: relative if MODEL is."""
    return model.with_name(f"{model.name}-healed")
