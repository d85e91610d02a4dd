"""The command line: parse, call, print. The one place that knows the terminal and exit codes.

Exit codes: 0 done, 1 a known failure (one line on stderr), 2 a usage error, 130 SIGINT, 143 SIGTERM,
129 SIGHUP. stdout carries results only.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, Optional

import typer

from dus_cli import __version__
from dus_cli.dtypes import Dtype
from dus_cli.errors import DusError, LayerMapError, StoppedError, UsageError, shown
from dus_cli.evaluation.command import evaluate
from dus_cli.heal.command import heal
from dus_cli.layers import parse_layers
from dus_cli.options import Revision, Token, parse_assumption
from dus_cli.planning import MapRequest, parse_size
from dus_cli.probe.command import probe
from dus_cli.progress import NoProgress, Progress
from dus_cli.recipes import RECIPES
from dus_cli.reference import ModelRef
from dus_cli.remaking import read_remaking
from dus_cli.report import upscale_text, verification_json, verification_text
from dus_cli.terminal import BarProgress, PlainProgress, print_plan
from dus_cli.transfer import DEFAULT_JOBS, CopyMode
from dus_cli.upscaling import open_base
from dus_cli.upscaling import preview as run_preview
from dus_cli.upscaling import upscale as run_upscale
from dus_cli.verification import VerifyMode
from dus_cli.verification import verify as run_verify

app = typer.Typer(
    name="dus",
    help="Depth up-scaling: grow a language model by stacking two trimmed copies of its layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(value: bool) -> None:
    if value:
        print(f"dus {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version_option: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    """Depth up-scaling: grow a language model by stacking two trimmed copies of its layers."""


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None


def _layers(text: str) -> str:
    try:
        parse_layers(text)
    except LayerMapError as error:
        raise typer.BadParameter(str(error)) from None
    return text


def _recipe(text: str) -> str:
    if text not in RECIPES:
        raise typer.BadParameter(f"there is no recipe {shown(text)!r}; there are {', '.join(RECIPES)}")
    return text


# Parameters of `upscale` that a lineage records.
_RECORDED = ("revision", "trim", "layers", "copies", "assume", "recipe", "identity", "dtype", "max_shard_size")


def _refuse_beside_from(context: typer.Context) -> None:
    given = [
        f"--{name.replace('_', '-')}"
        for name in _RECORDED
        if getattr(context.get_parameter_source(name), "name", "") == "COMMANDLINE"
    ]
    if given:
        raise UsageError(f"--from says {' and '.join(given)} already, as it was; leave it out")


@app.command()
def upscale(
    context: typer.Context,
    output: Annotated[
        Path, typer.Option("--output", "-o", metavar="OUT", help="Where to write; must not exist, or be empty.")
    ],
    model: Annotated[
        Optional[str],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Argument(metavar="MODEL", help="A checkpoint's directory, or a Hub id: org/name or org/name@revision."),
    ] = None,
    lineage: Annotated[
        Optional[Path],  # noqa: UP045
        typer.Option(
            "--from",
            metavar="DUS.JSON",
            help="Make a release again from its dus.json, and compare with the SHA256SUMS beside it. MODEL then says "
            "where the base is now.",
        ),
    ] = None,
    revision: Revision = None,
    token: Token = None,
    trim: Annotated[
        Optional[int],  # noqa: UP045
        typer.Option("--trim", "-t", min=0, metavar="M", help="Layers trimmed from each copy. Default: a quarter."),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--layers",
            metavar="MAP",
            parser=_layers,
            help="Any other map, as half-open ranges of base layers: 0:24,8:32. Excludes --trim and --copies.",
        ),
    ] = None,
    copies: Annotated[int, typer.Option("--copies", min=2, metavar="K", help="Copies to stack.")] = 2,
    assume: Annotated[
        Optional[list[Any]],  # noqa: UP045
        typer.Option(
            "--assume",
            metavar="FIELD=keep|map",
            parser=parse_assumption,
            help="A field of config.json that dus does not know: keep it, or let its entries follow the layers.",
        ),
    ] = None,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--recipe",
            metavar="NAME",
            parser=_recipe,
            help=f"A published map: {', '.join(RECIPES)}. Excludes --trim, --layers and --copies.",
        ),
    ] = None,
    identity: Annotated[
        bool,
        typer.Option(
            "--identity",
            help="New layers start as identities (output projections zero): the model computes what MODEL does.",
        ),
    ] = False,
    dtype: Annotated[
        Optional[Dtype],  # noqa: UP045
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            help="Cast floating-point tensors to bfloat16, float16 or float32, rounding as torch does (heal extra).",
        ),
    ] = None,
    max_shard_size: Annotated[
        int,
        typer.Option(
            "--max-shard-size", metavar="SIZE", parser=_size, help="Largest shard, in decimal KB, MB, GB or TB."
        ),
    ] = "5GB",  # type: ignore[assignment]  # the parser makes it an int
    copy_mode: Annotated[
        CopyMode,
        typer.Option("--copy-mode", help="How bytes move: auto clones (reflinks) where the file system can."),
    ] = CopyMode.auto,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=64, metavar="J", help="Parallel copies.")] = DEFAULT_JOBS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the whole plan and write nothing.")] = False,
    verify: Annotated[
        VerifyMode,
        typer.Option("--verify", help="What to check before publishing: structure, or full (every byte)."),
    ] = VerifyMode.structure,
    checksums: Annotated[bool, typer.Option("--checksums", help="Also write SHA256SUMS.")] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an existing OUT, once the new one is whole.")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Write a deeper model: base layers 0…n−m−1, then m…n−1.

    The result is an ordinary checkpoint of 2(n − m) layers. Heal it before you use it.
    """
    for given, hint in ((recipe, "--recipe"), (layers, "--layers")):
        others = {"--trim": trim, "--layers": layers, "--copies": copies if copies != 2 else None}
        if given is not None and any(value is not None for name, value in others.items() if name != hint):
            raise typer.BadParameter(
                f"it says the whole map; leave out {' and '.join(name for name in others if name != hint)}",
                param_hint=hint,
            )
    remaking = None
    if lineage is not None:
        _refuse_beside_from(context)
        remaking = read_remaking(lineage, model, token=token)
        ref, request, max_shard_size, dtype = remaking.parts
    elif model is not None:
        ref = ModelRef.parse(model, revision=revision, token=token)
        request = MapRequest(trim, layers, copies, recipe=recipe, identity=identity, assume=tuple(assume or ()))
    else:
        raise UsageError("which model? give MODEL, a directory or a Hub id; see dus upscale --help")
    speaks = not (quiet or as_json)
    if dry_run:
        report = run_preview(
            ref,
            output,
            request,
            max_shard_bytes=max_shard_size,
            dtype=dtype,
            remaking=remaking,
            copy_mode=copy_mode,
            overwrite=overwrite,
            quiet=not speaks,
        )
        if speaks:
            print_plan(report.plan)
    else:
        with progress_for(speaks) as progress:
            report = run_upscale(
                ref,
                output,
                request,
                max_shard_bytes=max_shard_size,
                dtype=dtype,
                remaking=remaking,
                copy_mode=copy_mode,
                jobs=jobs,
                verify=verify,
                with_checksums=checksums,
                overwrite=overwrite,
                quiet=not speaks,
                progress=progress,
            )
    if as_json:
        print(json.dumps(report.to_json()))
    elif speaks:
        print(upscale_text(report))


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(metavar="OUT", help="The directory to check.")],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--base", metavar="MODEL", help="Also hold every tensor against this base (directory or Hub id)."),
    ] = None,
    token: Token = None,
    jobs: Annotated[int, typer.Option("--jobs", min=1, max=64, metavar="J", help="Parallel reads.")] = DEFAULT_JOBS,
    as_json: Annotated[bool, typer.Option("--json", help="Print the findings as one JSON object.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")] = False,
) -> None:
    """Check a checkpoint: headers, index, config, duplicated layers byte by byte, checksums.

    Lists every problem it finds, and exits 1 if there is any.
    """
    if not model.is_dir():
        raise DusError(f"{shown(model)} is not a directory; give the one that dus upscale wrote")
    speaks = not (quiet or as_json)
    checkpoint = open_base(ModelRef.parse(base, token=token), quiet=not speaks) if base is not None else None
    with progress_for(speaks) as progress:
        found = run_verify(model, checkpoint, jobs=jobs, progress=progress)
    if as_json:
        print(json.dumps(verification_json(found)))
    elif speaks or not found.is_sound:
        print(verification_text(found))
    if not found.is_sound:
        raise typer.Exit(1)


app.command()(heal)
app.command("eval")(evaluate)
app.command()(probe)


def progress_for(speaks: bool) -> contextlib.AbstractContextManager[Progress]:
    if not speaks:
        return contextlib.nullcontext(NoProgress())
    return BarProgress() if sys.stderr.isatty() else contextlib.nullcontext(PlainProgress())


# typer vendors click, so its usage errors have no public name: it is the parent of BadParameter.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Terminated(BaseException):
    """A signal that ends the run. It unwinds, so that context managers clean up; typer does not know it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def _handle_signals() -> None:
    def handle(signum: int, _frame: FrameType | None) -> None:
        for other in handled:  # a second Ctrl-C must not interrupt the clean-up
            signal.signal(other, signal.SIG_IGN)
        raise _Terminated(signum)

    handled = [s for s in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP) if signal.getsignal(s) != signal.SIG_IGN]
    for signum in handled:
        signal.signal(signum, handle)


def fail(message: str, code: int) -> NoReturn:
    """One line on stderr, then exit."""
    print(f"error: {message}", file=sys.stderr)
    sys.exit(code)


def main() -> NoReturn:
    """The entry point of `dus`: turns outcomes into exit codes. DUS_DEBUG=1 shows tracebacks."""
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode gets question marks, no traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
    _handle_signals()
    try:
        code = app(prog_name="dus", standalone_mode=False)
        sys.stdout.flush()
        sys.exit(code if isinstance(code, int) else 0)
    except StoppedError as error:
        fail(str(error), 128 + error.signum)
    except DusError as error:
        if os.environ.get("DUS_DEBUG"):
            raise
        fail(str(error), 2 if isinstance(error, UsageError) else 1)
    except _UsageError as error:
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        if not message:  # `dus` alone: the help was printed
            sys.exit(2)
        command = getattr(getattr(error, "ctx", None), "command_path", "dus")
        fail(f"{message.rstrip('.')}; see {command} --help", 2)
    except BrokenPipeError:  # dus … | head
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except _Terminated as error:
        fail(f"ended by {signal.Signals(error.signum).name}; nothing was left behind", 128 + error.signum)
    except OSError as error:  # whatever the operating system refuses that no module foresaw
        if os.environ.get("DUS_DEBUG"):
            raise
        where = f"{shown(error.filename)}: " if error.filename else ""
        fail(f"{where}{error.strerror or error}; check the path, its permissions and the disk", 1)
    except MemoryError:
        fail("out of memory; nothing was left behind", 1)
