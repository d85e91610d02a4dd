"""The program `dus`: load the named command, run it, and turn its outcome into an exit code.

Exit codes: 0 success, 1 a known failure (one line on stderr), 2 a usage error, 130 SIGINT, 143
SIGTERM, 129 SIGHUP, 141 a closed pipe on stdout. stdout carries results only.
"""

from __future__ import annotations

import inspect
import os
import signal
import sys
import threading
from collections.abc import Mapping
from importlib import import_module
from types import MappingProxyType
from typing import Annotated, Any, NoReturn, cast

import typer
from typer.core import TyperCommand, TyperGroup

from dus_cli import __version__
from dus_cli.commands.signals import EndingSignals, Terminated, ended_by
from dus_cli.commands.values import read_without_pydantic
from dus_cli.common.unforeseen import explained
from dus_cli.console import events
from dus_cli.console.terminal import say, silence
from dus_cli.errors import StoppedError, UsageError

# Every command: its function, as MODULE.FUNCTION in dus_cli.commands, and its line in `dus --help`.
# Importing all of them takes longer than most of them run, so a command is imported when it is
# named. A test checks that each line is the first of the function's docstring.
COMMANDS = {
    "upscale": ("upscale.upscale", "Write a deeper model: base layers 0…n−m−1, then m…n−1."),
    "verify": (
        "verify.verify",
        "Check a checkpoint: headers, index, config, duplicated layers byte by byte, checksums.",
    ),
    "heal": (
        "heal.heal",
        "Heal an up-scaled model by continued pretraining, and prove that it healed.",
    ),
    "eval": (
        "eval.evaluate",
        (
            "Compare models on the same held-out text: loss, perplexity, bits per byte, paired "
            "intervals."
        ),
    ),
    "probe": (
        "probe.probe",
        "Measure what loss layer maps would have right after scaling, and write no model.",
    ),
    "push": (
        "push.push_command",
        ("Verify a finished model, push it to the Hub, and compare what the Hub holds afterwards."),
    ),
}

_HELP_OPTIONS = {"help_option_names": ["-h", "--help"]}


def load_command(name: str) -> TyperCommand:
    """Import a command's module, and return the command with its options."""
    module, _, function = COMMANDS[name][0].partition(".")
    callback = getattr(import_module(f"dus_cli.commands.{module}"), function)
    alone = typer.Typer(
        add_completion=False, pretty_exceptions_enable=False, context_settings=_HELP_OPTIONS
    )
    alone.command(name, cls=_Command, help=_unbroken(inspect.getdoc(callback) or ""))(callback)
    command = cast("_Command", typer.main.get_command(alone))
    command.once = callback.once
    return command


def _unbroken(text: str) -> str:
    """A docstring with one line per paragraph: --help would keep its line ends, which do not fit
    every terminal.
    """
    return "\n\n".join(" ".join(paragraph.split()) for paragraph in text.split("\n\n"))


class _Command(TyperCommand):
    # By parameter: what to do instead of giving the option twice (`Option.once`).
    once: Mapping[str, str] = MappingProxyType({})

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        read_without_pydantic(self.get_params(ctx))
        _, _, given = self.make_parser(ctx).parse_args(args=list(args))
        for parameter in given:
            if parameter.name in self.once and given.count(parameter) > 1:
                advice, shown = self.once[parameter.name], f"'{parameter.opts[0]}'"
                raise typer.BadParameter(f"it is given twice; {advice}", ctx=ctx, param_hint=shown)
        return super().parse_args(ctx, args)


class _Unloaded(TyperCommand):
    """A command's name and summary, for `dus --help`; it loads the command when there are arguments
    to parse.
    """

    def make_context(
        self, info_name: str | None, args: list[str], *others: Any, **extra: Any
    ) -> typer.Context:
        return cast(
            "typer.Context",
            load_command(str(self.name)).make_context(info_name, args, *others, **extra),
        )


class _Commands(TyperGroup):
    def __init__(self, **attributes: Any) -> None:
        super().__init__(**attributes)
        self.commands = {
            name: _Unloaded(name, help=summary) for name, (_, summary) in COMMANDS.items()
        }

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        read_without_pydantic(self.get_params(ctx))
        return super().parse_args(ctx, args)


app = typer.Typer(
    name="dus",
    cls=_Commands,
    help="Depth up-scaling: grow a language model by stacking two trimmed copies of its layers.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings=_HELP_OPTIONS,
)


def _version(value: bool) -> None:
    if value:
        print(f"dus {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    _version_option: Annotated[
        bool,
        typer.Option(
            "--version", help="Print the version and exit.", callback=_version, is_eager=True
        ),
    ] = False,
) -> None:
    """Depth up-scaling: grow a language model by stacking two trimmed copies of its layers."""


# typer vendors click, so its usage errors have no public name: it is the parent of BadParameter.
_UsageError: type[Exception] = typer.BadParameter.__mro__[1]


def main() -> NoReturn:
    """Run the command line and exit with its code. DUS_DEBUG=1 shows tracebacks."""
    _open_streams()
    signals = EndingSignals()
    try:
        code, message = _run()
    except Exception:
        if signals.signum is None or os.environ.get("DUS_DEBUG"):
            raise
        code, message = 1, None
    # a library turned the signal's exception into another error, in the middle of an import
    if code == 1 and signals.signum is not None:
        code, message = ended_by(signals.signum)
    if events.are_wanted(sys.argv[1:]):
        events.emit("exit", exit_code=code, error=message)
    elif message is not None:
        say(f"error: {message}")
    try:
        sys.stdout.flush()
    except OSError:  # reported already; Python would report it again on exit
        silence(sys.stdout.fileno())
    # after a signal, a library's threads may still run and would delay the exit
    if code > 128 and threading.active_count() > 1:
        os._exit(code)
    sys.exit(code)


def _open_streams() -> None:
    """Replace a standard stream that was closed (`>&-`) by /dev/null, before a file that is opened
    gets its descriptor.
    """
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            setattr(sys, name, open(os.devnull, "w" if descriptor else "r", encoding="utf-8"))  # noqa: SIM115
    # a terminal without Unicode shows question marks instead of a traceback
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")


def _run() -> tuple[int, str | None]:
    """Run the command line; return its exit code, and its error as one line or None."""
    try:
        code = app(prog_name="dus", standalone_mode=False)
        sys.stdout.flush()
    except StoppedError as error:
        return 128 + error.signum, str(error)
    except _UsageError as error:
        message = " ".join(error.format_message().split())  # type: ignore[attr-defined]
        command = getattr(getattr(error, "ctx", None), "command_path", "dus")
        # `dus` alone printed the help
        return (2, f"{message.rstrip('.')}; see {command} --help" if message else None)
    except Terminated as error:
        return ended_by(error.signum)
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
    """End `dus … | head` silently, with the code that a shell gives to SIGPIPE."""
    silence(sys.stdout.fileno())
    return 128 + signal.SIGPIPE, None
