"""Options about layer maps that several commands have."""

from __future__ import annotations

from typing import Annotated, cast, get_args

from dus_cli.common.options import Option
from dus_cli.errors import shown
from dus_cli.maps.engines import ALL, ENGINES, parse_engines
from dus_cli.maps.layers import parse_double, parse_layers
from dus_cli.maps.naming import Assumption
from dus_cli.maps.starts import StartRule


def engines_option(help_text: str, panel: str | None = None) -> Option:
    """`--for` with what it means to a command. Several engines stand behind it with commas, or
    it is repeated.
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
    """A map in the grammar of `--layers`, as it was typed.

    Raises:
        LayerMapError: it is not.
    """
    parse_layers(text)
    return text


def check_double(text: str) -> str:
    """Stretches of layers in the grammar of `--double`, as they were typed.

    Raises:
        LayerMapError: they are not.
    """
    parse_double(text)
    return text


def check_start(text: str) -> str:
    """A start, as it was typed.

    Raises:
        ValueError: there is none of this name.
    """
    StartRule.parse(text)
    return text


def parse_assumption(text: str) -> tuple[str, Assumption]:
    """What `--assume` says of a field of config.json.

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
        "Decide what dus cannot tell about a field of config.json (a.b for b in a) or a numbered "
        "stack of tensors (by its prefix): keep it, or map it as the layers are.",
        metavar="FIELD=keep|map",
        panel="Layer map",
        parse=parse_assumption,
    ),
]
