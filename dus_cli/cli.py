"""The command line: parse, call, print. The one place that knows the terminal and exit codes.

Exit codes: 0 done, 1 a known failure (one line on stderr), 2 a usage error, 130 SIGINT, 143 SIGTERM,
129 SIGHUP, 141 a closed pipe on stdout. stdout carries results only.
"""

from __future__ import annotations

import contextlib
import inspect
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Annotated, Any, NoReturn, Optional

import typer

from dus_cli import __version__, api, events
from dus_cli.errors import StoppedError, UsageError, shown
from dus_cli.evaluation.command import evaluate
from dus_cli.heal.command import heal
from dus_cli.maps.recipes import RECIPES
from dus_cli.options import (
    HUB,
    AsJson,
    Assume,
    Branch,
    Private,
    Quiet,
    Revision,
    ShowProgress,
    Token,
    check_map,
    number,
    parser,
    path_parser,
    progress_for,
)
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import parse_size
from dus_cli.probe.command import probe
from dus_cli.progress import ProgressMode
from dus_cli.push.command import push_command
from dus_cli.terminal import fitted, say, silence
from dus_cli.unforeseen import explained
from dus_cli.verification import VerifyMode
from dus_cli.writing.outputs import KEPT
from dus_cli.writing.staging import has_kept
from dus_cli.writing.transfer import DEFAULT_JOBS, CopyMode

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


def _recipe(text: str) -> str:
    if text not in RECIPES:
        raise typer.BadParameter(f"there is no recipe {shown(text)!r}; there are {', '.join(RECIPES)}")
    return text


# The groups in which --help lists the options of `upscale`; the Hub's are in `options`.
_MAP, _WRITING = "Layer map", "Writing"

# Parameters of `upscale` that a lineage records.
_RECORDED = ("revision", "trim", "layers", "copies", "assume", "recipe", "identity", "dtype", "max_shard_size")


def _refuse_beside_from(context: typer.Context, lineage: Path | None) -> None:
    """The API refuses what differs from a default; here also a default that was typed."""
    sources = {name: getattr(context.get_parameter_source(name), "name", "") for name in _RECORDED}
    given = [f"--{name.replace('_', '-')}" for name, source in sources.items() if source == "COMMANDLINE"]
    if lineage is not None and given:
        raise UsageError(f"--from says {' and '.join(given)} already, as it was; leave it out")


@app.command()
def upscale(
    context: typer.Context,
    output: Annotated[
        Path,
        typer.Option(
            "--output", "-o", metavar="OUT", parser=path_parser, help="Where to write; must not exist, or be empty."
        ),
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
            parser=path_parser,
            help="Make a release again from its dus.json, and compare with the SHA256SUMS beside it. MODEL then says "
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
            help="Layers trimmed from each copy. Default: a quarter.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    layers: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--layers",
            metavar="MAP",
            parser=parser(check_map),
            help="Any other map, as half-open ranges of base layers: 0:24,8:32. Excludes --trim and --copies.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    copies: Annotated[
        int,
        typer.Option("--copies", parser=number("copies"), metavar="K", help="Copies to stack.", rich_help_panel=_MAP),
    ] = 2,
    assume: Assume = None,
    recipe: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option(
            "--recipe",
            metavar="NAME",
            parser=_recipe,
            autocompletion=lambda: list(RECIPES),
            help=f"A published map: {', '.join(RECIPES)}. Excludes --trim, --layers and --copies.",
            rich_help_panel=_MAP,
        ),
    ] = None,
    identity: Annotated[
        bool,
        typer.Option(
            "--identity",
            help="New layers start as identities (output projections zero): the model computes what MODEL does.",
            rich_help_panel=_MAP,
        ),
    ] = False,
    dtype: Annotated[
        Optional[Dtype],  # noqa: UP045
        typer.Option(
            "--dtype",
            metavar="DTYPE",
            parser=parser(Dtype.parse),
            help="Cast floating-point tensors to bf16, fp16 or fp32, rounding as torch does (heal extra).",
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
            help="How bytes move: auto clones (reflinks) where the file system can.",
            rich_help_panel=_WRITING,
        ),
    ] = CopyMode.auto,
    stream: Annotated[
        bool,
        typer.Option(
            "--stream",
            help="Weights come from the Hub straight into OUT, without a copy in the cache. Killed, it goes on.",
            rich_help_panel=HUB,
        ),
    ] = False,
    jobs: Annotated[
        int,
        typer.Option(
            "--jobs",
            parser=number("jobs"),
            metavar="J",
            help="Parallel copies, or requests of --stream.",
            rich_help_panel=_WRITING,
        ),
    ] = DEFAULT_JOBS,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show the whole plan and write nothing.")] = False,
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
            help="What to check before publishing: structure, or full (every byte; with --stream copies against each "
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
            "--overwrite", help="Replace an existing OUT, once the new one is whole.", rich_help_panel=_WRITING
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
        "assume": dict(assume or ()),
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
            report = api.upscale(model, output, checksums=checksums, **options, jobs=jobs, verify=verify, progress=told)
    if as_json:
        print(json.dumps(report.to_json()))
    elif says:
        print(fitted(report))


@app.command()
def verify(
    model: Annotated[Path, typer.Argument(metavar="OUT", parser=path_parser, help="The directory to check.")],
    base: Annotated[
        Optional[str],  # noqa: UP045
        typer.Option("--base", metavar="MODEL", help="Also hold every tensor against this base (directory or Hub id)."),
    ] = None,
    token: Token = None,
    jobs: Annotated[
        int, typer.Option("--jobs", parser=number("jobs"), metavar="J", help="Parallel reads.")
    ] = DEFAULT_JOBS,
    progress: ShowProgress = ProgressMode.auto,
    as_json: AsJson = False,
    quiet: Quiet = False,
) -> None:
    """Check a checkpoint: headers, index, config, duplicated layers byte by byte, checksums.

    Lists every problem it finds, and exits 1 if there is any.
    """
    says = not (quiet or as_json)
    with progress_for(progress, quiet=not says) as told:
        found = api.verify(model, base=base, token=token, jobs=jobs, progress=told)
    if as_json:
        print(json.dumps(found.to_json()))
    elif says or not found.is_sound:
        print(fitted(found))
    if not found.is_sound:
        raise typer.Exit(1)


app.command()(heal)
app.command("eval")(evaluate)
app.command()(probe)
app.command("push")(push_command)


def _unbroken(text: str) -> str:
    """A docstring's paragraphs without their line ends, which --help would keep: a terminal breaks them for itself."""
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


for _command in app.registered_commands:
    _command.help = _unbroken(inspect.getdoc(_command.callback) or "")


# typer vendors click, so its usage errors have no public name: it is the parent of BadParameter.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


class _Terminated(BaseException):
    """A signal that ends the run. It unwinds, so that context managers clean up; typer does not know it."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


@contextlib.contextmanager
def _kept_if_streamed(output: Path, *, stream: bool) -> Iterator[None]:
    """Say of a streamed run that a signal ended that nothing is lost."""
    try:
        yield
    except _Terminated as ended:
        if stream and has_kept(output):
            raise StoppedError(f"ended by {signal.Signals(ended.signum).name}; {KEPT}", ended.signum) from None
        raise


# Seconds that a clean-up has before another signal ends the process in the middle of it.
_CLEAN_UP = 5.0


class _Signals:
    """The signals that end a run: the first unwinds it, another one ends what does not unwind."""

    def __init__(self) -> None:
        self.signum: int | None = None
        self._came = 0.0
        for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            if signal.getsignal(signum) != signal.SIG_IGN:
                signal.signal(signum, self._handle)

    def _handle(self, signum: int, _frame: FrameType | None) -> None:
        if self.signum is None:
            self.signum, self._came = signum, time.monotonic()
            raise _Terminated(signum)
        if time.monotonic() - self._came > _CLEAN_UP:  # an impatient Ctrl-C does not interrupt the clean-up
            os._exit(128 + signum)


def _ended_by(signum: int) -> tuple[int, str]:
    return 128 + signum, f"ended by {signal.Signals(signum).name}; nothing was left behind"


def main() -> NoReturn:
    """The entry point of `dus`: turns outcomes into exit codes. DUS_DEBUG=1 shows tracebacks."""
    _open_streams()
    signals = _Signals()
    try:
        code, message = _run()
    except Exception:
        if signals.signum is None or os.environ.get("DUS_DEBUG"):
            raise
        code, message = 1, None
    if code == 1 and signals.signum is not None:  # a library made another error of it, in the middle of an import
        code, message = _ended_by(signals.signum)
    if events.are_wanted(sys.argv[1:]):
        events.emit("exit", exit_code=code, error=message)
    elif message is not None:
        say(f"error: {message}")
    try:
        sys.stdout.flush()
    except OSError:  # was told already; Python would tell it again
        silence(sys.stdout.fileno())
    if code > 128 and threading.active_count() > 1:  # a signal came, and a library still has threads at work
        os._exit(code)
    sys.exit(code)


def _open_streams() -> None:
    """Standard streams that can be written to: what `>&-` closed becomes /dev/null, before a file gets its number."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):  # a terminal without Unicode gets question marks, no traceback
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _run() -> tuple[int, str | None]:
    """Run the command line: its exit code, and the one line that says what went wrong."""
    try:
        code = app(prog_name="dus", standalone_mode=False)
        sys.stdout.flush()
    except StoppedError as error:
        return 128 + error.signum, str(error)
    except _UsageError as error:
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        command = getattr(getattr(error, "ctx", None), "command_path", "dus")
        return 2, f"{message.rstrip('.')}; see {command} --help" if message else None  # `dus` alone printed the help
    except _Terminated as error:
        return _ended_by(error.signum)
    except BrokenPipeError:
        return _closed_pipe()
    except Exception as error:
        if os.environ.get("DUS_DEBUG"):
            raise
        return 2 if isinstance(error, UsageError) else 1, explained(error)
    except SystemExit as error:
        if not isinstance(error.__context__, BrokenPipeError):  # which typer makes an exit of 1
            raise
        return _closed_pipe()
    return code if isinstance(code, int) else 0, None


def _closed_pipe() -> tuple[int, None]:
    """The end of `dus … | head`: quiet, and with the code that a shell gives to SIGPIPE."""
    silence(sys.stdout.fileno())
    return 128 + signal.SIGPIPE, None
