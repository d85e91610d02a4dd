"""An option, said once: beside the field of the dataclass that a verb takes. No command line is
needed for it.

    @dataclass(frozen=True, kw_only=True)
    class Budget:
        steps: Annotated[int | None, Option("Budget in steps.", metavar="N", panel="Budget")] = None

`commands/signature.py` makes `--steps N` of this field, with its help, its default and its bounds
(`bounds.py` has them by the option's name). Whoever calls the verb from Python gives
`Budget(steps=8)`.
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
    """What a field's option is called, and how it is explained and read.

    Attributes:
        help: what --help says of it.
        name: of the option, without dashes. The field's name, with dashes for underscores, if
            empty.
        short: a second spelling, such as "-o".
        metavar: what stands for the value in --help.
        panel: the group in which --help lists it.
        parse: makes the value of its text; raises ValueError or DusError if the text is not
            understood. From Python a field of text may be given a path, which goes through it too.
            Plain numbers, paths, enums and text need none.
        show: makes of the value what a person types for it, if that is not the value itself.
        auto: "auto" may be typed for None, and is the default.
        splits: of an option that repeats: `parse` makes a tuple of values of one text.
        choices: what a shell proposes for it.
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
    choices: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class OptionField:
    """An option with the field that holds its value.

    Attributes:
        field: the field's name.
        name: the option's name, without dashes.
        kind: the type of the value without None; of one of its items if it `repeats`.
        is_optional: the value may be None.
        repeats: the option may be given several times, and the field is a tuple.
        default: the field's default; `dataclasses.MISSING` if it has none.
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
        """What makes the value of its text; None if nothing but the type does. It raises
        ValueError or DusError.
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

    def taken(self, value: Any) -> Any:
        """The field's value, of what a caller from Python gave: the value itself, or what a person
        would type.

        Raises:
            UsageError: it is neither, or a number out of its bounds.
        """
        if value is None and self.is_optional:
            return None
        if not self.repeats:
            return self._taken(value)
        if isinstance(value, Mapping):
            value = value.items()
        items = [
            self._taken(item) for item in ([value] if isinstance(value, (str, Path)) else value)
        ]
        if self.option.splits:
            items = [
                part for item in items for part in (item if isinstance(item, tuple) else (item,))
            ]
        return tuple(items)

    def _taken(self, value: Any) -> Any:
        parse, kind = self.parse, self.kind
        if value is None:
            raise UsageError(f"{self.field}: None is no value of it; leave it out for the default")
        try:
            if isinstance(value, Path) and kind is str:
                return str(value) if parse is None else parse(value)
            if isinstance(value, str) and parse is not None:
                return parse(value)
            if isinstance(kind, EnumMeta):
                return _choice(kind, value)
        except (ValueError, DusError) as error:
            raise UsageError(f"{self.field}: {error}") from None
        check_numbers(**{self.name.replace("-", "_"): value})
        if kind in (bool, str, Path) and not isinstance(value, kind):
            raise UsageError(f"{self.field}: {shown(repr(value))} is no {kind.__name__.lower()}")
        return value

    def typed(self, value: Any) -> Any:
        """What a person types for a value: text, a number, a truth value, or a list of them;
        None for nothing.
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
        """The default for a command line: an enum's choice, or as it is typed; None if there is
        none.
        """
        if self.default is dataclasses.MISSING or self.default == ():
            return None
        return self.default if isinstance(self.default, Enum) else self.typed(self.default)


def _choice(kind: EnumMeta, value: Any) -> Any:
    """The member of an enum that has a value.

    Raises:
        ValueError: there is none.
    """
    choices: list[Any] = list(kind)
    if value not in {choice.value for choice in choices}:
        names = ", ".join(str(choice.value) for choice in choices)
        raise ValueError(f"{shown(str(value))!r} is not one of {names}")
    return kind(value)


def option_field(field: str, annotation: Any, default: Any) -> OptionField | None:
    """The option of an annotated field; None if its annotation holds none."""
    if get_origin(annotation) is not Annotated:
        return None
    kind, *notes = get_args(annotation)
    found = [note for note in notes if isinstance(note, Option)]
    if not found:
        return None
    choices = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    (kind,) = (choice for choice in choices if choice is not type(None))
    repeats = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    return OptionField(
        field=field,
        name=found[0].name or field.replace("_", "-"),
        kind=get_args(kind)[0] if repeats else kind,
        is_optional=type(None) in choices,
        repeats=repeats,
        default=default,
        option=found[0],
    )


def option_fields(kind: type) -> list[OptionField]:
    """The options of a dataclass, in the order of its fields."""
    hints = get_type_hints(kind, include_extras=True)
    found = [
        option_field(field.name, hints[field.name], field.default)
        for field in dataclasses.fields(kind)
    ]
    return [option for option in found if option is not None]


def settled(options: _T) -> _T:
    """Options from Python, checked as those of a command line are; a text stands for what it would
    mean there.

    Raises:
        UsageError: a value that the option does not take.
    """
    given: Any = options
    taken = {
        option.field: option.taken(getattr(given, option.field))
        for option in option_fields(type(given))
    }
    return dataclasses.replace(given, **taken)  # type: ignore[no-any-return]


def options_of(kind: type[_T], options: _T | None, fields: Mapping[str, Any]) -> _T:
    """The options that a caller from Python gave: as an object, as its fields by keyword, or as an
    object with some fields replaced.

    Raises:
        TypeError: a keyword is no field.
        UsageError: a value that the option does not take.
    """
    given: Any = kind() if options is None else options
    return settled(dataclasses.replace(given, **fields))  # type: ignore[no-any-return]


def takes_fields(kind: type) -> Callable[[_F], _F]:
    """Show of a function that ends in `**fields` which keywords these are: the fields of a
    dataclass.
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
