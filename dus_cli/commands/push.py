"""The command `dus push`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from dus_cli import api
from dus_cli.commands.options import AsJson, Quiet, ShowProgress, path_parser, progress_for
from dus_cli.commands.signature import takes_options
from dus_cli.console.terminal import fitted
from dus_cli.progress import ProgressMode
from dus_cli.push.options import PushOptions
from dus_cli.push.report import folder_push_json, push_text


@takes_options()
def push_command(
    output: Annotated[
        Path,
        typer.Argument(
            metavar="OUT",
            parser=path_parser,
            help="The directory that dus upscale or dus heal wrote.",
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="REPO", help="Where to push: org/name on the Hub.")
    ],
    *,
    options: PushOptions,
    dry_run: Annotated[
        bool,
        typer.Option("--dry-run", help="Report what would be pushed, and where; push nothing."),
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Verify a finished model, push it to the Hub, and compare what the Hub holds afterwards.

    The same command run again continues an interrupted push, and changes nothing after a finished
    one.
    """
    prints_text = not (quiet or as_json)
    if dry_run:
        report = api.push(output, repo, options, dry_run=True)
    else:
        with progress_for(progress, quiet=not prints_text) as view:
            report = api.push(output, repo, options, progress=view)
    if as_json:
        print(json.dumps(folder_push_json(output, report)))
    elif prints_text:
        print(fitted(push_text(report)))
        for warning in report.warnings:
            print(fitted(f"warning: {warning}"))
