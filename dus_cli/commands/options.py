"""Options that several commands share, and the progress view that follows from them."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Optional, TypeVar

import typer

from dus_cli.common.bounds import parse_number
from dus_cli.common.reference import user_path
from dus_cli.console.events import JsonProgress
from dus_cli.console.terminal import BarProgress, PlainProgress, is_live
from dus_cli.errors import DusError
from dus_cli.progress import NoProgress, Progress, ProgressMode
from dus_cli.upscaling.report import plan_text

_T = TypeVar("_T")

# Files after the first one of --data, which a shell's glob adds.
MoreData = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[FILE]...", help="More files of --data, so that --data *.jsonl works."),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

ShowProgress = Annotated[
    ProgressMode,
    typer.Option(
        "--progress",
        help="What to show on stderr: a bar on a terminal and lines elsewhere (auto; none with "
        "--json or -q), or JSON Lines.",
    ),
]


def effective_mode(mode: ProgressMode, *, quiet: bool) -> ProgressMode:
    """The mode that `--progress` stands for: with --json or -q, auto is none."""
    return ProgressMode.none if quiet and mode is ProgressMode.auto else mode


def progress_for(mode: ProgressMode, *, quiet: bool) -> AbstractContextManager[Progress]:
    """The progress view of a command, as a context manager. `quiet` is `-q` or `--json`.

    >>> with progress_for(ProgressMode.auto, quiet=True) as view:
    ...     view.start("writing", 8)
    ...     view.advance(8)
    """
    mode = effective_mode(mode, quiet=quiet)
    if mode is ProgressMode.json:
        return JsonProgress()
    if mode is ProgressMode.none:
        return nullcontext(NoProgress())
    view = BarProgress if mode is ProgressMode.auto and is_live() else PlainProgress
    return view(plan_text)


def parser(parse: Callable[[str], _T], option: str | None = None) -> Callable[[str], _T]:
    """A typer parser, which turns an invalid value into a usage error.

    typer adds the option's name to the error; a call from elsewhere passes it as `option`.
    """

    def run(text: str) -> _T:
        if not isinstance(text, str):  # a default, parsed already
            return text
        try:
            return parse(text)
        except (ValueError, DusError) as error:
            raise typer.BadParameter(str(error), param_hint=option) from None

    return run


def number(name: str, parse: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """A typer parser of an option's number, which must be within its `BOUNDS`."""
    return parser(lambda text: parse_number(name, text, parse))


# The parser of every option and argument that is a path.
path_parser = parser(user_path)
