"""An option, defined once: as the annotation of a field of the dataclass that a verb takes.

    @dataclass(frozen=True, kw_only=True)
    class Budget:
        steps: Annotated[int | None, Option("Budget in steps.", metavar="N", panel="Budget")] = None

`commands/signature.py` makes the option `--steps N` from this field, with its help, its default and
its bounds (by the option's name in `bounds.py`). From Python the same is `Budget(steps=8)`.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum, EnumMeta
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeVar, Union, get_args, get_origin, get_type_hints

from dus_cli.common.bounds import BOUNDS, check_numbers, parse_number
from dus_cli.common.reference import user_path
from dus_cli.errors import DusError, UsageError, shown

_T = TypeVar("_T")
_F = TypeVar("_F", bound=Callable[..., Any])


@dataclass(frozen=True)
class Option:
    """The name, the help and the parser of a field's option.

    Attributes:
        help: its text in --help.
        name: its name without leading dashes; if empty, the field's name with dashes for
            underscores.
        short: a second spelling, such as "-o".
        metavar: the placeholder of its value in --help.
        panel: the group in which --help lists it.
        parse: turns its text into the value; raises ValueError or DusError for an invalid text. A
            `Path` given from Python for a text field is parsed too. Plain numbers, paths, enums and
            text need no parser.
        show: turns the value into what a user would type, if that is not the value itself.
        auto: "auto" may be typed for None, and is the default.
        splits: for an option that repeats: `parse` turns one text into a tuple of values.
        once: for an option whose one text is a list: what to do instead of giving it twice, which
            would replace the first list by the second.
        choices: what shell completion proposes.
    """

    help: str
    name: str = ""
    short: str = ""
    metavar: str | None = None
    panel: str | None = None
    parse: Callable[[Any], Any] | None = None
    show: Callable[[Any], Any] | None = None
    auto: bool = False
    splits: bool = False
    once: str = ""
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OptionField:
    """An option with the field that holds its value.

    Attributes:
        field: the field's name.
        name: the option's name, without dashes.
        kind: the type of the value, without None; the type of one item if the option `repeats`.
        is_optional: the value may be None.
        repeats: the option may be given several times, and the field is a tuple.
        default: the field's default; `dataclasses.MISSING` if it has none.
        option: its name, help and parser as annotated.
    """

    field: str
    name: str
    kind: Any
    is_optional: bool
    repeats: bool
    default: Any
    option: Option

    @property
    def parse(self) -> Callable[[Any], Any] | None:
        """The parser of its text, which raises ValueError or DusError; None if the type alone
        decides.
        """
        parse = self.option.parse
        if self.name in BOUNDS:
            return self._number
        if parse is None and self.kind is Path:
            return user_path
        return parse

    def _number(self, text: str) -> Any:
        if self.option.auto and text == "auto":
            return None
        return parse_number(self.name, text, self.option.parse)

    def checked(self, value: Any) -> Any:
        """The field's value, from what a Python caller gave: a value, or the text that a user would
        type.

        Raises:
            UsageError: it is neither, or a number out of bounds.
        """
        if value is None and self.is_optional:
            return None
        if not self.repeats:
            return self._checked_item(value)
        if isinstance(value, Mapping):
            value = value.items()
        items = [
            self._checked_item(item)
            for item in ([value] if isinstance(value, (str, Path)) else value)
        ]
        if self.option.splits:
            items = [
                part for item in items for part in (item if isinstance(item, tuple) else (item,))
            ]
        return tuple(items)

    def _checked_item(self, value: Any) -> Any:
        parse, kind = self.parse, self.kind
        if value is None:
            raise UsageError(f"{self.field}: None is no value of it; leave it out for the default")
        try:
            if isinstance(value, Path) and kind is str:
                return str(value) if parse is None else parse(value)
            if isinstance(value, str) and parse is not None:
                return parse(value)
            if isinstance(kind, EnumMeta):
                return choice(kind, value)
        except (ValueError, DusError) as error:
            raise UsageError(f"{self.field}: {error}") from None
        check_numbers(**{self.name.replace("-", "_"): value})
        if kind in (bool, str, Path) and not isinstance(value, kind):
            raise UsageError(f"{self.field}: {shown(repr(value))} is no {kind.__name__.lower()}")
        return value

    def typed(self, value: Any) -> Any:
        """A value as a user types it: text, a number, a boolean, or a list of them; None for
        nothing.
        """
        if value is None:
            return "auto" if self.option.auto else None
        if self.repeats:
            return [self._typed(item) for item in value]
        return self._typed(value)

    def _typed(self, value: Any) -> Any:
        if self.option.show is not None:
            return self.option.show(value)
        if isinstance(value, Enum):
            return value.value
        return value if isinstance(value, (bool, int, float)) else str(value)

    @property
    def typed_default(self) -> Any:
        """The default on the command line: an enum member, or as `typed`; None for none."""
        if self.default is dataclasses.MISSING or self.default == ():
            return None
        return self.default if isinstance(self.default, Enum) else self.typed(self.default)


def choice(kind: EnumMeta, value: Any) -> Any:
    """The enum's member with this value.

    Raises:
        ValueError: there is none.
    """
    choices: list[Any] = list(kind)
    if value not in {choice.value for choice in choices}:
        names = ", ".join(str(choice.value) for choice in choices)
        raise ValueError(f"{shown(str(value))!r} is not one of {names}")
    return kind(value)


def option_field(field: str, annotation: Any, default: Any) -> OptionField | None:
    """The option in a field's annotation; None if there is none."""
    if get_origin(annotation) is not Annotated:
        return None
    kind, *notes = get_args(annotation)
    options = [note for note in notes if isinstance(note, Option)]
    if not options:
        return None
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    (kind,) = (choice for choice in choices if choice is not type(None))
    repeats = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    return OptionField(
        field=field,
        name=options[0].name or field.replace("_", "-"),
        kind=get_args(kind)[0] if repeats else kind,
        is_optional=type(None) in choices,
        repeats=repeats,
        default=default,
        option=options[0],
    )


def option_fields(kind: type) -> list[OptionField]:
    """The options of a dataclass, in the order of its fields."""
    hints = get_type_hints(kind, include_extras=True)
    options = [
        option_field(field.name, hints[field.name], field.default)
        for field in dataclasses.fields(kind)
    ]
    return [option for option in options if option is not None]


def settled(options: _T) -> _T:
    """Options from Python, checked and parsed as on the command line.

    Raises:
        UsageError: an option does not take its value.
    """
    dataclass_object: Any = options
    values = {
        option.field: option.checked(getattr(dataclass_object, option.field))
        for option in option_fields(type(dataclass_object))
    }
    return dataclasses.replace(dataclass_object, **values)  # type: ignore[no-any-return]


def options_of(kind: type[_T], options: _T | None, fields: Mapping[str, Any]) -> _T:
    """The options of a Python call: an object, its fields by keyword, or an object with some fields
    replaced.

    Raises:
        TypeError: a keyword is not a field.
        UsageError: an option does not take its value.
    """
    start: Any = kind() if options is None else options
    return settled(dataclasses.replace(start, **fields))  # type: ignore[no-any-return]


def takes_fields(kind: type) -> Callable[[_F], _F]:
    """Give a function that takes `**fields` a signature with the fields of a dataclass in their
    place, for `help` and `inspect.signature`.
    """

    def decorate(function: _F) -> _F:
        signature = inspect.signature(function)
        own = [
            parameter
            for parameter in signature.parameters.values()
            if parameter.kind is not inspect.Parameter.VAR_KEYWORD
        ]
        hints = get_type_hints(kind)
        fields = [
            parameter.replace(annotation=hints[name])
            for name, parameter in inspect.signature(kind).parameters.items()
        ]
        whole = signature.replace(parameters=[*own, *fields])
        function.__signature__ = whole  # type: ignore[attr-defined]
        return function

    return decorate
