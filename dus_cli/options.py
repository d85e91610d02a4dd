"""Options that several commands share, by the names that they have everywhere."""

from __future__ import annotations

from typing import Annotated, Optional, cast, get_args

import typer

from dus_cli.errors import shown
from dus_cli.heal.corpus import BadLine
from dus_cli.model_config import Assumption

Revision = Annotated[
    Optional[str],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
    typer.Option("--revision", metavar="REV", help="Branch, tag or commit of a Hub id, as org/name@REV says it."),
]

Token = Annotated[
    Optional[str],  # noqa: UP045
    typer.Option("--token", metavar="TOKEN", help="Of the Hub. Default: HF_TOKEN, or the stored login."),
]

# How documents are found in --data.
TextField = Annotated[
    str, typer.Option("--text-field", metavar="NAME", help="The field or column with the text.", rich_help_panel="Data")
]

OnBadLine = Annotated[
    BadLine, typer.Option("--on-bad-line", help="Stop at a line without text, or count it.", rich_help_panel="Data")
]


def parse_assumption(text: str) -> tuple[str, Assumption]:
    """What `--assume` says of a field of config.json."""
    field, _, value = text.partition("=")
    if not field or value not in get_args(Assumption):
        raise typer.BadParameter(f"{shown(text)!r} is not of the form FIELD=keep or FIELD=map")
    return field, cast("Assumption", value)
