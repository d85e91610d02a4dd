"""Parse the values of a command's options without importing pydantic.

typer 0.29 builds a pydantic adapter for every parameter of a command, given or not. Importing
pydantic and building the adapters takes as long as planning a 7B model. The options of dus need
none: they are text, an enum member's value, or have a parser of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from enum import EnumMeta
from functools import partial
from typing import Any

import typer


@dataclass(frozen=True)
class _Value:
    """Stands in for what `get_runtime_param` of typer 0.29 returns: parses a parameter's text.

    Attributes:
        parse: parses one text; it also receives a default, and returns it as it is.
    """

    parse: Callable[[Any], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:  # noqa: ARG002  (as typer calls it)
        is_list = param.multiple or param.nargs == -1
        if value is None:
            return () if is_list else None
        return [self.parse(item) for item in value] if is_list else self.parse(value)


def read_without_pydantic(parameters: Iterable[Any]) -> None:
    """Let a command's parameters parse their text themselves.

    A typer that does not call `get_runtime_param` makes the same values in its own way.
    """
    for parameter in parameters:
        kind = getattr(parameter, "type_descriptor", None)
        if kind is None or not hasattr(parameter, "get_runtime_param"):
            continue
        parse = kind.parameter_info.parser
        if parse is None and kind.annotation in (str, list[str]):
            parse = str
        elif parse is None and isinstance(kind.annotation, EnumMeta):
            parse = partial(_member, kind.annotation)
        elif parse is None and kind.annotation is bool:
            parse = _flag
        if parse is not None:
            value = _Value(parse)
            parameter.get_runtime_param = lambda value=value: value


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):  # a flag takes no text, and --config checks for itself
        raise typer.BadParameter(f"{value!r} is neither true nor false")
    return value


def _member(kind: EnumMeta, value: Any) -> Any:
    from dus_cli.common.options import choice

    try:
        return choice(kind, value)
    except ValueError as error:
        raise typer.BadParameter(str(error)) from None
