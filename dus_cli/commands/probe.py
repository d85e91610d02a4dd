"""The command `dus probe`: parse, call, print."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dus_cli.commands.options import (
    DATA_KINDS,
    AsJson,
    Assume,
    MoreData,
    OnBadLine,
    Quiet,
    Revision,
    ShowProgress,
    SpecialTokens,
    TextField,
    Token,
    check_map,
    engines_option,
    named_engines,
    number,
    parser,
    path_parser,
    progress_for,
)
from dus_cli.common.reference import ModelRef
from dus_cli.common.units import parse_count, parse_share, parse_size
from dus_cli.console.terminal import fitted
from dus_cli.data.documents import BadLine
from dus_cli.data.holdout import parse_holdout
from dus_cli.models.precision import Precision
from dus_cli.pictures.files import check_picture, write_pictures
from dus_cli.probe.maps import parse_trims
from dus_cli.progress import ProgressMode

_DATA, _MAPS, _FIT = "Data", "Maps", "Memory and speed"


def probe(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", help="A checkpoint's directory, or a Hub id: org/name or org/name@revision."),
    ],
    data: Annotated[
        list[str],
        typer.Option(
            "--data",
            metavar="FILE",
            help="Text that the model was not trained on, as dus heal takes it: "
            f"{DATA_KINDS}; files, globs, folders, - for standard input; FILE:0.7 weighs a mixture. Repeat for more.",
            rich_help_panel=_DATA,
        ),
    ],
    more_data: MoreData = None,
    tokens: Annotated[
        int,
        typer.Option(
            "--tokens",
            metavar="N",
            parser=number("tokens", parse_count),
            help="How many tokens of the data are read, at most.",
            rich_help_panel=_DATA,
        ),
    ] = "20480",  # type: ignore[assignment]  # the parser makes it an int
    seq_length: Annotated[
        Optional[int],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Option(
            "--seq-length",
            parser=number("seq-length"),
            metavar="T",
            help="Tokens of a row. Default: min(512, the model's).",
            rich_help_panel=_DATA,
        ),
    ] = None,
    text_field: TextField = "text",
    on_bad_line: OnBadLine = BadLine.error,
    special_tokens: SpecialTokens = True,
    holdout: Annotated[
        Optional[float],  # noqa: UP045
        typer.Option(
            "--holdout",
            metavar="SHARE",
            parser=number("holdout", parse_holdout),
            help="Read only documents that dus heal --holdout SHARE holds out of this data. Default: all.",
            rich_help_panel=_DATA,
        ),
    ] = None,
    trims: Annotated[
        Optional[Any],  # noqa: UP045
        typer.Option(
            "--trims",
            metavar="FIRST:END",
            parser=parser(parse_trims),
            help="Trims to measure, half-open: 4:12 is 4 to 11. Default: all, unless there are --layers.",
            rich_help_panel=_MAPS,
        ),
    ] = None,
    layers: Annotated[
        Optional[list[str]],  # noqa: UP045
        typer.Option(
            "--layers",
            metavar="MAP",
            parser=parser(check_map),
            help="Any other map, as dus upscale takes it: 0:28,12:32. Repeat for more.",
            rich_help_panel=_MAPS,
        ),
    ] = None,
    copies: Annotated[
        int,
        typer.Option(
            "--copies",
            parser=number("copies"),
            metavar="K",
            help="Copies to stack, of each trim.",
            rich_help_panel=_MAPS,
        ),
    ] = 2,
    search: Annotated[
        bool,
        typer.Option(
            "--search",
            help="Look beyond symmetric trims, [0,a)+[b,n) for all a, b: by distance first, the best by loss.",
            rich_help_panel=_MAPS,
        ),
    ] = False,
    best: Annotated[
        int,
        typer.Option(
            "--best",
            parser=number("best"),
            metavar="K",
            help="Maps of a search that are measured.",
            rich_help_panel=_MAPS,
        ),
    ] = 10,
    engines: Annotated[
        Optional[list[Any]],  # noqa: UP045
        engines_option("Recommend only what inference engines compute as config.json says.", _MAPS),
    ] = None,
    assume: Assume = None,
    within: Annotated[
        float,
        typer.Option(
            "--within",
            metavar="SHARE",
            parser=number("within", parse_share),
            help="Recommend the largest model whose loss is at most this much above the base's.",
        ),
    ] = "20%",  # type: ignore[assignment]
    precision: Annotated[
        Precision,
        typer.Option(
            "--precision",
            metavar="[auto|bf16|fp32]",
            parser=parser(Precision.parse),
            help="Of weights and activations; auto is bf16, or fp32 on a CPU that is slow at bf16.",
            rich_help_panel=_FIT,
        ),
    ] = Precision.auto,
    stream_layers: Annotated[
        bool,
        typer.Option(
            "--stream-layers",
            help="Read each layer from disk when its turn comes: memory for one layer, not for the model.",
            rich_help_panel=_FIT,
        ),
    ] = False,
    max_memory: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--max-memory",
            metavar="SIZE",
            parser=number("max-memory", parse_size),
            help="Memory to use (8GB). Rows that do not fit go through the layers later. Default: 85% of what is free.",
            rich_help_panel=_FIT,
        ),
    ] = None,
    plot: Annotated[
        Optional[Path],  # noqa: UP045
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
        bool, typer.Option("--dry-run", help="List the maps, what they cost and the memory needed; measure nothing.")
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Measure what loss layer maps would have right after scaling, and write no model.

    The layers of one model are called in the order of each map, all on the same text. Recommends a map and prints the
    line for dus upscale.
    """
    # Imported here, like torch below it: what `dus --help` and `dus upscale` do not need.
    from dus_cli.probe.maps import Asked
    from dus_cli.probe.options import Options
    from dus_cli.probe.picture import probe_svg
    from dus_cli.probe.report import probe_json, probe_text
    from dus_cli.probe.verb import probe as run

    ref = ModelRef.parse(model, revision=revision, token=token)
    asked = Asked(trims, tuple(layers or ()), copies, search, best, tuple(assume or ()), named_engines(engines))
    options = Options(
        (*data, *(more_data or ())),
        tokens,
        seq_length,
        text_field,
        on_bad_line,
        holdout,
        precision,
        stream_layers,
        max_memory,
        within,
        special_tokens,
    )
    says = not (quiet or as_json)
    if plot is not None:
        check_picture(plot)
    with progress_for(progress, quiet=not says) as told:
        found = run(ref, asked, options, told, dry_run=dry_run, quiet=not told.is_live)
    if plot is not None and not dry_run:
        write_pictures(plot, lambda dark: probe_svg(found, dark=dark))
    if as_json:
        sys.stdout.write(json.dumps(probe_json(found)) + "\n")
    elif says:
        sys.stdout.write(fitted(probe_text(found)) + "\n")
