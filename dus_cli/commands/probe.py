"""The command `dus probe`: parse, call, print."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Optional

import typer

from dus_cli import api
from dus_cli.commands.options import (
    AsJson,
    MoreData,
    Quiet,
    ShowProgress,
    path_parser,
    progress_for,
)
from dus_cli.commands.signature import takes_options
from dus_cli.console.terminal import fitted
from dus_cli.hub.options import Revision, Token
from dus_cli.pictures.files import check_picture, write_pictures
from dus_cli.probe.options import ProbeOptions
from dus_cli.progress import ProgressMode


@takes_options("model", "data", "more_data")
def probe(
    model: Annotated[
        str,
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint's directory, or a Hub id: org/name or org/name@revision.",
        ),
    ],
    options: ProbeOptions,
    more_data: MoreData = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Option(
            "--plot",
            metavar="FILE.svg",
            parser=path_parser,
            help="Also draw losses and distances; FILE-dark.svg for dark pages.",
        ),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="List the maps, what they cost and the memory needed; measure nothing.",
        ),
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what loss layer maps would have right after scaling, and write no model.

    Calls the layers of one model in the order of each map, on the same text. Recommends a map and
    prints the command line of dus upscale for it.
    """
    # Imported here, because they import torch.
    from dus_cli.probe.found import ProbePlan
    from dus_cli.probe.picture import probe_svg
    from dus_cli.probe.report import plan_json, plan_text, probe_json, probe_text

    options = replace(options, data=(*options.data, *(more_data or ())))
    prints_text = not (quiet or as_json)
    if plot is not None:
        check_picture(plot)
    with progress_for(progress, quiet=not prints_text) as view:
        result = api.probe(
            model, options, revision=revision, token=token, dry_run=dry_run, progress=view
        )
    if isinstance(result, ProbePlan):
        record, text = plan_json(result), plan_text(result)
    else:
        record, text = probe_json(result), probe_text(result)
        if plot is not None:
            write_pictures(plot, lambda dark: probe_svg(result, dark=dark))
    if as_json:
        sys.stdout.write(json.dumps(record) + "\n")
    elif prints_text:
        sys.stdout.write(fitted(text) + "\n")
