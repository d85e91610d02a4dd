"""Parse the values of a command's options without importing pydantic.

typer 0.29 builds a pydantic adapter for every parameter of a command, given or not. Importing
pydantic and building the adapters takes as long as planning a 7B model. The options of dus need
none: they are text, an enum member's value, or have a parser of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, EnumMeta
from typing import Any


@dataclass(frozen=True)
class _Value:
    """Stands in for what `get_runtime_param` of typer 0.29 returns: parses a parameter's text.

    Attributes:
        parse: parses one text; it also receives a default, and returns it as it is.
        choices: an enum's members by the text that a user types for them.
        typers_own: typer's own parser, for its error message about an invalid choice.
    """

    parse: Callable[[Any], Any] | None
    choices: Mapping[str, Enum]
    typers_own: Callable[[], Any]

    def coerce(self, value: Any, param: Any, ctx: Any) -> Any:
        is_list = param.multiple or param.nargs == -1
        if value is None:
            return () if is_list else None
        if isinstance(value, Enum):
            return value
        if isinstance(value, str) and value in self.choices:
            return self.choices[value]
        if self.parse is None:
            return self.typers_own().coerce(value, param=param, ctx=ctx)
        return [self.parse(item) for item in value] if is_list else self.parse(value)


def read_without_pydantic(parameters: Iterable[Any]) -> None:
    """Let a command's parameters parse their text themselves.

    A typer that does not call `get_runtime_param` makes the same values in its own way.
    """
    for parameter in parameters:
        kind = getattr(parameter, "type_descriptor", None)
        typers_own = getattr(parameter, "get_runtime_param", None)
        if kind is None or typers_own is None:
            continue
        parse = kind.parameter_info.parser
        if parse is None and kind.annotation in (str, list[str]):
            parse = str
        is_enum = isinstance(kind.annotation, EnumMeta)
        choices = {choice.value: choice for choice in kind.annotation} if is_enum else {}
        value = _Value(parse, choices, typers_own)
        parameter.get_runtime_param = lambda value=value: value
