"""The command `dus verify`: parse, call, print."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Optional

import typer

from dus_cli import api
from dus_cli.commands.options import (
    AsJson,
    Quiet,
    ShowProgress,
    number,
    path_parser,
    progress_for,
)
from dus_cli.commands.signature import takes_options
from dus_cli.console.terminal import fitted
from dus_cli.hub.options import Token
from dus_cli.maps.options import engines_option
from dus_cli.progress import ProgressMode
from dus_cli.writing.transfer import DEFAULT_JOBS


@takes_options()
def verify(
    model: Annotated[
        Path, typer.Argument(metavar="OUT", parser=path_parser, help="The directory to check.")
    ],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--base",
            metavar="MODEL",
            help="Also compare every tensor with this base (directory or Hub id).",
        ),
    ] = None,
    engines: Annotated[
        tuple[str, ...],
        engines_option(
            "Also say whether inference engines compute what config.json says, whoever made OUT."
        ),
    ] = (),
    token: Token = None,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs", parser=number("jobs"), metavar="J", help="Number of parallel reads."
        ),
    ] = DEFAULT_JOBS,
    read: Annotated[
        bool,
        typer.Option(
            "--read",
            help="Read every byte, also where both files share blocks of the disk (reflinks) and "
            "so cannot differ.",
        ),
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint: headers, index, config, duplicated layers byte by byte, checksums.

    Lists every problem it finds, and exits 1 if there is any.
    """
    says = not (quiet or as_json)
    with progress_for(progress, quiet=not says) as told:
        found = api.verify(
            model, base=base, engines=engines, token=token, jobs=jobs, read=read, progress=told
        )
    if as_json:
        print(json.dumps(found.to_json()))
    elif says or not found.is_sound:
        print(fitted(found))
    if not found.is_sound:
        raise typer.Exit(1)
