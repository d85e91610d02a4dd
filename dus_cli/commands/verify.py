"""The command `dus verify`: parse, call, print."""

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
from dus_cli.verification.options import VerifyOptions


@takes_options()
def verify(
    model: Annotated[
        Path, typer.Argument(metavar="OUT", parser=path_parser, help="The directory to check.")
    ],
    *,
    options: VerifyOptions,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint: headers, index, config, duplicated layers byte by byte, checksums.

    Lists every problem, and exits 1 if there is one.
    """
    prints_text = not (quiet or as_json)
    with progress_for(progress, quiet=not prints_text) as view:
        result = api.verify(model, options, progress=view)
    if as_json:
        print(json.dumps(result.to_json()))
    elif prints_text or not result.is_sound:
        print(fitted(result))
    if not result.is_sound:
        raise typer.Exit(1)
