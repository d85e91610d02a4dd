"""The command `dus upscale`: parse, call, print."""

from __future__ import annotations

import contextlib
import json
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Optional

import typer

from dus_cli import api
from dus_cli.commands.options import (
    AsJson,
    Quiet,
    ShowProgress,
    number,
    parser,
    path_parser,
    progress_for,
)
from dus_cli.commands.signals import Terminated
from dus_cli.commands.signature import takes_options
from dus_cli.common.units import parse_size
from dus_cli.console.terminal import fitted
from dus_cli.errors import StoppedError, UsageError, shown
from dus_cli.hub.options import HUB, Branch, Private, Revision, Token
from dus_cli.maps.options import Assume, check_double, check_map, check_start, engines_option
from dus_cli.maps.recipes import RECIPES
from dus_cli.maps.starts import STARTS
from dus_cli.planning.dtypes import Dtype
from dus_cli.progress import ProgressMode
from dus_cli.verification.planned import VerifyMode
from dus_cli.writing.outputs import KEPT
from dus_cli.writing.staging import has_kept
from dus_cli.writing.transfer import DEFAULT_JOBS, CopyMode


def _recipe(text: str) -> str:
    if text not in RECIPES:
        raise typer.BadParameter(
            f"there is no recipe {shown(text)!r}; there are {', '.join(RECIPES)}"
        )
    return text


# The groups in which --help lists the options of `upscale`; the Hub's are in `options`.
_MAP, _WRITING = "Layer map", "Writing"

# Parameters of `upscale` that a lineage records.
_RECORDED = (
    "revision trim layers double copies assume recipe identity start dtype max_shard_size".split()
)


def _refuse_beside_from(context: typer.Context, lineage: Path | None) -> None:
    """The API refuses what differs from a default; here also a default that was typed."""
    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in _RECORDED}
    typed = {"COMMANDLINE", "DEFAULT_MAP"}  # the second is --config
    given = [f"--{name.replace('_', '-')}" for name, source in sources.items() if source in typed]
    if lineage is not None and given:
        raise UsageError(f"--from says {' and '.join(given)} already, as it was; leave it out")


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
            help="Directory to write; must not exist, or be empty.",
        ),
    ],
    model: Annotated[
        Optional[str],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Argument(
            metavar="MODEL",
            help="A checkpoint's directory, or a Hub id: org/name or org/name@revision.",
        ),
    ] = None,
    lineage: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--from",
            metavar="DUS.JSON",
            parser=path_parser,
            help="Make a release again from its dus.json, and compare with the SHA256SUMS beside "
            "it. MODEL then says "
            "where the base is now.",
        ),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    trim: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option(
            "--trim",
            "-t",
            parser=number("trim"),
            metavar="M",
            help="Layers trimmed from each copy. Default: a quarter, or the nearest to it that "
            "every inference engine "
            "computes as it should.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--layers",
            metavar="MAP",
            parser=parser(check_map),
            help="Any other map, as half-open ranges of base layers: 0:24,8:32. Excludes --trim "
            "and --copies.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    double: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--double",
            metavar="A:B",
            parser=parser(check_double),
            help="The base with its layers A to B - 1 each twice in a row; several stretches: "
            "2:8,20:29. Excludes "
            "--trim, --layers and --copies.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    copies: Annotated[
        int,
        typer.Option(
            "--copies",
            parser=number("copies"),
            metavar="K",
            help="Copies to stack.",
            rich_help_panel=_MAP,
        ),
    ] = 2,
    assume: Assume = (),
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--recipe",
            metavar="NAME",
            parser=_recipe,
            autocompletion=lambda: list(RECIPES),
            help=f"A published map: {', '.join(RECIPES)}. Excludes --trim, --layers, --double and "
            "--copies.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    identity: Annotated[
        bool,
        typer.Option(
            "--identity",
            help="New layers start as identities (output projections zero): the model computes "
            "what MODEL does. The "
            "same as --start identity.",
            rich_help_panel=_MAP,
        ),
    ] = False,
    start: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--start",
            metavar="START",
            parser=parser(check_start),
            autocompletion=lambda: list(STARTS),
            help="How loudly layers speak at first: copy (as in MODEL), identity, half (copies of "
            "a layer in equal "
            "parts), fade (overlapping copies cross-fade; fade:linear or fade:cosine), scale:C "
            "(new layers times C). "
            "Default: copy.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    engines: Annotated[
        tuple[str, ...],
        engines_option(
            "Refuse what an inference engine would not compute as config.json says; without "
            "--trim, take the nearest to a quarter that is right for it.",
            _MAP,
        ),
    ] = (),
    dtype: Annotated[
        Optional[Dtype],  # noqa: UP045
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            parser=parser(Dtype.parse),
            help="Cast floating-point tensors to bf16, fp16 or fp32, rounding as torch does (heal "
            "extra).",
            rich_help_panel=_WRITING,
        ),
    ] = None,
    max_shard_size: Annotated[
        int,
        typer.Option(
            "--max-shard-size",
            metavar="SIZE",
            parser=number("max-shard-size", parse_size),
            help="Largest shard, in decimal KB, MB, GB or TB.",
            rich_help_panel=_WRITING,
        ),
    ] = "5GB",  # type: ignore[assignment]  # the parser makes it an int
    copy_mode: Annotated[
        CopyMode,
        typer.Option(
            "--copy-mode",
            help="How to move bytes: auto clones them (reflinks) if the file system can.",
            rich_help_panel=_WRITING,
        ),
    ] = CopyMode.auto,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Stream the weights from the Hub straight into OUT, without a copy in the cache. "
            "After a kill the same command goes on.",
            rich_help_panel=HUB,
        ),
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            parser=number("jobs"),
            metavar="J",
            help="Number of parallel copies, or of parallel requests with --stream.",
            rich_help_panel=_WRITING,
        ),
    ] = DEFAULT_JOBS,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show the whole plan and write nothing.")
    ] = False,
    push_to: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--push-to",
            metavar="REPO",
            help="Push OUT to the Hub once it is verified: org/name.",
            rich_help_panel=HUB,
        ),
    ] = None,
    private: Private = False,
    branch: Branch = None,
    verify: Annotated[
        VerifyMode,
        typer.Option(
            "--verify",
            help="What to check before publishing: structure, or full (every byte; with --stream "
            "copies against each "
            "other, and whole files against the Hub's sha256).",
            rich_help_panel=_WRITING,
        ),
    ] = VerifyMode.structure,
    checksums: Annotated[
        bool, typer.Option("--checksums", help="Also write SHA256SUMS.", rich_help_panel=_WRITING)
    ] = False,
    overwrite: Annotated[
        bool,
        typer.Option(
            "--overwrite",
            help="Replace an existing OUT, once the new one is whole.",
            rich_help_panel=_WRITING,
        ),
    ] = False,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Write a deeper model: base layers 0…n−m−1, then m…n−1.

    The result is an ordinary checkpoint of 2(n − m) layers. Heal it before you use it.
    """
    _refuse_beside_from(context, lineage)
    if model is None and lineage is None:
        raise UsageError("which model? give MODEL, a directory or a Hub id; see dus upscale --help")
    says = not (quiet or as_json)
    options: dict[str, Any] = {
        "lineage": lineage,
        "revision": revision,
        "token": token,
        "trim": trim,
        "layers": layers,
        "copies": copies,
        "recipe": recipe,
        "identity": identity,
        "double": double,
        "start": start,
        "engines": engines,
        "assume": dict(assume),
        "dtype": dtype,
        "max_shard_size": max_shard_size,
        "copy_mode": copy_mode,
        "overwrite": overwrite,
        "stream": stream,
        "push_to": push_to,
        "private": private,
        "branch": branch,
    }
    with _kept_if_streamed(output, stream=stream), progress_for(progress, quiet=not says) as told:
        if dry_run:
            report = api.plan(model, output, checksums=checksums, **options)
            told.planned(report.plan)
        else:
            report = api.upscale(
                model,
                output,
                checksums=checksums,
                **options,
                jobs=jobs,
                verify=verify,
                progress=told,
            )
    if as_json:
        print(json.dumps(report.to_json()))
    elif says:
        print(fitted(report))


@contextlib.contextmanager
def _kept_if_streamed(output: Path, *, stream: bool) -> Iterator[None]:
    """Say of a streamed run that a signal ended that nothing is lost."""
    try:
        yield
    except Terminated as ended:
        if stream and has_kept(output):
            raise StoppedError(
                f"ended by {signal.Signals(ended.signum).name}; {KEPT}", ended.signum
            ) from None
        raise
