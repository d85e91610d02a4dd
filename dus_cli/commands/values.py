"""The values of a command's options, without the import of pydantic.

typer 0.29 builds a pydantic adapter for every parameter of a command, given or not. Importing
pydantic and building them takes as long as planning a 7B model. Our options need none: they are
text, an enum's member by its value, or have a parser of their own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from enum import Enum, EnumMeta
from typing import Any


@dataclass(frozen=True)
class _Value:
    """What `get_runtime_param` of typer 0.29 returns: makes a parameter's value of its text.

    Attributes:
        parse: makes the value of one text; a parser also gets a default, and returns it.
        choices: an enum's members by what a person types for them.
        typers_own: typer's own, which says in its words what is no choice.
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
    """Let parameters of a command make their values themselves. Another typer, which does not ask
    `get_runtime_param` for them, makes the same values in its own way.
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
