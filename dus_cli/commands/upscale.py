"""The command `dus upscale`: parse, call, print."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Optional

import typer

from dus_cli import api
from dus_cli.commands.options import AsJson, Quiet, ShowProgress, path_parser, progress_for
from dus_cli.commands.signals import Terminated
from dus_cli.commands.signature import takes_options
from dus_cli.console.terminal import fitted
from dus_cli.errors import StoppedError, UsageError
from dus_cli.progress import ProgressMode
from dus_cli.upscaling.options import RECORDED, UpscaleOptions
from dus_cli.upscaling.request import refuse_recorded
from dus_cli.writing.outputs import KEPT
from dus_cli.writing.staging import has_kept


def _typed(context: typer.Context) -> list[str]:
    """The fields in `RECORDED` that were typed, even with their default values, which the API
    cannot see.
    """
    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in RECORDED}
    typed = {"COMMANDLINE", "DEFAULT_MAP"}  # the second is --config
    return [name for name, source in sources.items() if source in typed]


@takes_options()
def upscale(
    context: typer.Context,
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="OUT",
            parser=path_parser,
            help="Directory to write; it must be empty or not exist.",
        ),
    ],
    model: Annotated[
        Optional[str],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint's directory, or a Hub id: org/name or org/name@revision.",
        ),
    ] = None,
    *,
    options: UpscaleOptions,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the whole plan and write nothing.")
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a deeper model: base layers 0…n−m−1, then m…n−1.

    The result is an ordinary checkpoint of 2(n − m) layers. Heal it before you use it.
    """
    if options.lineage is not None:
        refuse_recorded(_typed(context))
    elif model is None:
        raise UsageError(
            "no model is given; give MODEL, a directory or a Hub id; see dus upscale --help"
        )
    prints_text = not (quiet or as_json)
    keeping = _kept_if_streamed(output, stream=options.stream)
    with keeping, progress_for(progress, quiet=not prints_text) as view:
        if dry_run:
            report = api.plan(model, output, options)
            view.planned(report.plan)
        else:
            report = api.upscale(model, output, options, progress=view)
    if as_json:
        print(json.dumps(report.to_json()))
    elif prints_text:
        print(fitted(report))


@contextlib.contextmanager
def _kept_if_streamed(output: Path, *, stream: bool) -> Iterator[None]:
    """Report for a streamed run that a signal ended that its bytes are kept."""
    try:
        yield
    except Terminated as ended:
        if stream and has_kept(output):
            raise StoppedError(
                f"ended by {signal.Signals(ended.signum).name}; {KEPT}", ended.signum
            ) from None
        raise
