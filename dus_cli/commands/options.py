"""Options that several commands share, by the names that they have everywhere, and what follows from them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Annotated, Any, Optional, TypeVar, cast, get_args

import typer

from dus_cli.common.bounds import parse_number
from dus_cli.common.reference import user_path
from dus_cli.console.events import JsonProgress
from dus_cli.console.terminal import BarProgress, PlainProgress, is_live
from dus_cli.data.documents import BadLine
from dus_cli.errors import DusError, shown
from dus_cli.maps.engines import ALL, ENGINES, parse_engines
from dus_cli.maps.layers import parse_layers
from dus_cli.maps.naming import Assumption
from dus_cli.progress import NoProgress, Progress, ProgressMode
from dus_cli.upscaling.report import plan_text

# The group in which --help lists what concerns the Hub.
HUB = "The Hub"

Revision = Annotated[
    Optional[str],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
    typer.Option(
        "--revision",
        metavar="REV",
        help="Branch, tag or commit of a Hub id, as org/name@REV says it.",
        rich_help_panel=HUB,
    ),
]

_T = TypeVar("_T")

Private = Annotated[
    bool,
    typer.Option("--private", help="The repo is private; refused where it is a public one.", rich_help_panel=HUB),
]

Branch = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--branch",
        metavar="NAME",
        help="Branch to push to, made where it is not there. Default: main.",
        rich_help_panel=HUB,
    ),
]

Token = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option(
        "--token", metavar="TOKEN", help="Of the Hub. Default: HF_TOKEN, or the stored login.", rich_help_panel=HUB
    ),
]

# What --data reads, for its help.
DATA_KINDS = ".jsonl, .json, .csv and .txt (also .gz, .zst, .xz, .bz2), .parquet, .arrow"

# Files behind the first one of --data.
MoreData = Annotated[
    Optional[list[str]],  # noqa: UP045
    typer.Argument(metavar="[FILE]...", help="More --data, as a shell makes of --data *.jsonl."),
]

# How documents are found in --data.
TextField = Annotated[
    str, typer.Option("--text-field", metavar="NAME", help="The field or column with the text.", rich_help_panel="Data")
]

OnBadLine = Annotated[
    BadLine, typer.Option("--on-bad-line", help="Stop at a line without text, or count it.", rich_help_panel="Data")
]

# How a document begins.
SpecialTokens = Annotated[
    bool,
    typer.Option(
        "--special-tokens/--no-special-tokens",
        help="A document begins with what the model's tokenizer puts before a text (<s>), or with the text itself.",
        rich_help_panel="Data",
    ),
]

AsJson = Annotated[bool, typer.Option("--json", help="Print the report as one JSON object.")]

Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors only.")]

ShowProgress = Annotated[
    ProgressMode,
    typer.Option(
        "--progress",
        help="On stderr: a bar on a terminal and lines elsewhere (auto, none with --json or -q), or JSON Lines.",
    ),
]


def effective_mode(mode: ProgressMode, *, quiet: bool) -> ProgressMode:
    """What `--progress` comes to: auto is none with --json or -q; what was asked for by name stays."""
    return ProgressMode.none if quiet and mode is ProgressMode.auto else mode


def progress_for(mode: ProgressMode, *, quiet: bool) -> AbstractContextManager[Progress]:
    """What a command tells while it works. `quiet` is `-q` or `--json`.

    >>> with progress_for(ProgressMode.auto, quiet=True) as told:
    ...     told.start("writing", 8)
    ...     told.advance(8)
    """
    mode = effective_mode(mode, quiet=quiet)
    if mode is ProgressMode.json:
        return JsonProgress()
    if mode is ProgressMode.none:
        return nullcontext(NoProgress())
    view = BarProgress if mode is ProgressMode.auto and is_live() else PlainProgress
    return view(plan_text)


def parser(parse: Callable[[str], _T], option: str | None = None) -> Callable[[str], _T]:
    """A typer parser: a value that is not understood is a usage error. Outside of typer it must name its option."""

    def run(text: str) -> _T:
        if not isinstance(text, str):  # a default, parsed already
            return text
        try:
            return parse(text)
        except (ValueError, DusError) as error:
            raise typer.BadParameter(str(error), param_hint=option) from None

    return run


def number(name: str, parse: Callable[[str], Any] | None = None) -> Callable[[str], Any]:
    """A typer parser of an option's number, which must be within its bounds in `bounds`."""
    return parser(lambda text: parse_number(name, text, parse))


# Of every option and argument that is a path.
path_parser = parser(user_path)


def check_map(text: str) -> str:
    """A map in the grammar of `--layers`, as it was typed.

    Raises:
        LayerMapError: it is not.
    """
    parse_layers(text)
    return text


def parse_assumption(text: str) -> tuple[str, Assumption]:
    """What `--assume` says of a field of config.json."""
    field, _, value = text.partition("=")
    if not field or value not in get_args(Assumption):
        raise typer.BadParameter(f"{shown(text)!r} is not of the form FIELD=keep or FIELD=map")
    return field, cast("Assumption", value)


Assume = Annotated[
    Optional[list[Any]],  # noqa: UP045
    typer.Option(
        "--assume",
        metavar="FIELD=keep|map",
        parser=parse_assumption,
        help="What dus cannot tell of a field of config.json (a.b for b in a), or of a numbered stack of tensors "
        "(by its prefix): keep it, or let it follow the layers.",
        rich_help_panel="Layer map",
    ),
]


def engines_option(help_text: str, panel: str | None = None) -> Any:
    """`--for` with what it means to a command. Several engines stand behind it with commas, or it is repeated."""
    return typer.Option(
        "--for",
        metavar="ENGINE",
        parser=parser(lambda text: parse_engines([text])),
        autocompletion=lambda: [*(engine.name for engine in ENGINES), ALL],
        help=f"{help_text} One or more of {', '.join(engine.name for engine in ENGINES)}, or {ALL}.",
        rich_help_panel=panel,
    )


def named_engines(given: Sequence[tuple[str, ...]] | None) -> tuple[str, ...]:
    """The engines of every `--for`."""
    return tuple(dict.fromkeys(name for names in given or () for name in names))
