"""Options about layer maps that several commands share."""

from __future__ import annotations

from typing import Annotated, cast, get_args

from dus_cli.common.options import Option
from dus_cli.errors import shown
from dus_cli.maps.engines import ALL, ENGINES, parse_engines
from dus_cli.maps.layers import parse_double, parse_layers
from dus_cli.maps.naming import Assumption
from dus_cli.maps.starts import StartRule


def engines_option(help_text: str, panel: str | None = None) -> Option:
    """The option `--for`, with its help for one command. It takes engines separated by commas, and
    may be repeated.
    """
    names = tuple(engine.name for engine in ENGINES)
    return Option(
        f"{help_text} One or more of {', '.join(names)}, or {ALL}.",
        name="for",
        metavar="ENGINE",
        panel=panel,
        parse=lambda text: parse_engines([text]),
        splits=True,
        choices=(*names, ALL),
    )


def check_map(text: str) -> str:
    """Check the form of a map for `--layers`, and return its text.

    Raises:
        LayerMapError: the text is not of this form.
    """
    parse_layers(text)
    return text


def check_double(text: str) -> str:
    """Check the form of ranges for `--double`, and return their text.

    Raises:
        LayerMapError: the text is not of this form.
    """
    parse_double(text)
    return text


def check_start(text: str) -> str:
    """Check a start, and return its text.

    Raises:
        ValueError: there is no such start.
    """
    StartRule.parse(text)
    return text


def parse_assumption(text: str) -> tuple[str, Assumption]:
    """Parse `--assume`: the name of a field, and "keep" or "map".

    >>> parse_assumption("rope_parameters.factor=keep")
    ('rope_parameters.factor', 'keep')

    Raises:
        ValueError: not of the form FIELD=keep or FIELD=map.
    """
    field, _, value = text.partition("=")
    if not field or value not in get_args(Assumption):
        raise ValueError(f"{shown(text)!r} is not of the form FIELD=keep or FIELD=map")
    return field, cast("Assumption", value)


Assume = Annotated[
    tuple[tuple[str, Assumption], ...],
    Option(
        "Decide about a field of config.json (a.b for b in a), or a numbered stack of tensors (by "
        "its prefix), that dus does not know: keep it, or let it follow the layer map.",
        metavar="FIELD=keep|map",
        panel="Layer map",
        parse=parse_assumption,
    ),
]
