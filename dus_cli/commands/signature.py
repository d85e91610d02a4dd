"""A command's signature for typer, made from the options in the annotations of its dataclasses."""

from __future__ import annotations

import dataclasses
import functools
import inspect
from collections.abc import Callable
from enum import EnumMeta
from pathlib import Path
from typing import Annotated, Any, Optional, get_type_hints

import typer

from dus_cli.commands.config import Converter, config_option, kind_of
from dus_cli.commands.options import parser
from dus_cli.common.options import OptionField, option_field, option_fields

# Types that typer parses itself; any other needs a parser.
_PLAIN = (bool, int, float, str, Path)

Command = Callable[..., None]


def takes_options(*first: str, convert: Converter | None = None) -> Callable[[Command], Command]:
    """Turn a function that takes dataclasses into a command whose options are their fields.

    A parameter whose type is a dataclass is replaced by one parameter for each of its options; the
    function is called with the dataclass. A parameter annotated with an `Option` becomes that
    option. Others stay as they are. `--config` is added as the last. The command's `once` has the
    advice of each option that may be given only once, by field.

    Args:
        first: fields and parameters that come before all others in --help, in this order.
        convert: turns another kind of file that is given as --config into options.
    """

    def decorate(function: Command) -> Command:
        hints = get_type_hints(function, include_extras=True)
        groups: dict[str, tuple[type, list[OptionField]]] = {}
        singles: dict[str, OptionField] = {}
        parameters: list[inspect.Parameter] = []
        for parameter in inspect.signature(function).parameters.values():
            name, hint = parameter.name, hints[parameter.name]
            default = (
                dataclasses.MISSING if parameter.default is parameter.empty else parameter.default
            )
            single = option_field(name, hint, default)
            if dataclasses.is_dataclass(hint) and isinstance(hint, type):
                groups[name] = hint, option_fields(hint)
                parameters += [_parameter(option) for option in groups[name][1]]
            elif single is not None:
                singles[name] = single
                parameters.append(_parameter(single))
            else:
                parameters.append(parameter.replace(annotation=hint, kind=parameter.KEYWORD_ONLY))

        @functools.wraps(function)
        def command(**values: Any) -> None:
            arguments: dict[str, Any] = {}
            for name, (kind, options) in groups.items():
                arguments[name] = kind(
                    **{option.field: _pop_value(option, values) for option in options}
                )
            for name, option in singles.items():
                arguments[name] = _pop_value(option, values)
            values.pop("config")
            function(**arguments, **values)

        parameters.sort(key=lambda parameter: _place(parameter.name, first))
        kinds = {parameter.name: kind_of(parameter.annotation) for parameter in parameters}
        config = config_option(kinds, convert)
        parameters.append(
            inspect.Parameter(
                "config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=config
            )
        )
        del command.__wrapped__  # its signature differs from the command's
        command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        command.once = {  # type: ignore[attr-defined]
            option.field: option.option.once
            for option in (*singles.values(), *(one for _, some in groups.values() for one in some))
            if option.option.once
        }
        command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return command

    return decorate


def _place(name: str, first: tuple[str, ...]) -> int:
    return first.index(name) if name in first else len(first)


def _pop_value(option: OptionField, values: dict[str, Any]) -> Any:
    """Take an option's value out of what typer parsed, in the form that its field has."""
    value = values.pop(option.field)
    if not option.repeats:
        return value
    if option.option.splits:
        return tuple(dict.fromkeys(item for items in value or () for item in items))
    return tuple(value or ())


def _parameter(option: OptionField) -> inspect.Parameter:
    """The parameter from which typer makes the option."""
    is_required = option.default is dataclasses.MISSING
    default = inspect.Parameter.empty if is_required else option.typed_default
    annotation: Any = Annotated[_kind(option, is_required=is_required), _typer_option(option)]
    return inspect.Parameter(
        option.field, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation
    )


def _kind(option: OptionField, *, is_required: bool) -> Any:
    is_plain = option.kind in _PLAIN or isinstance(option.kind, EnumMeta)
    kind = option.kind if is_plain else Any
    if option.repeats:
        kind = list[kind]  # type: ignore[valid-type]
        return kind if is_required else Optional[kind]  # noqa: UP045  (a type that is made here)
    return Optional[kind] if option.is_optional else kind  # noqa: UP045


def _typer_option(option: OptionField) -> Any:
    """The option in typer's form. A flag that may be on by default gets a --no- spelling."""
    annotation = option.option
    has_no = option.default is True or (option.kind is bool and option.is_optional)
    spellings = [f"--{option.name}/--no-{option.name}" if has_no else f"--{option.name}"]
    spellings += [annotation.short] if annotation.short else []
    more: dict[str, Any] = {} if option.parse is None else {"parser": parser(option.parse)}
    if annotation.choices:
        more["autocompletion"] = lambda: list(annotation.choices)
    return typer.Option(
        *spellings,
        help=annotation.help,
        metavar=annotation.metavar,
        rich_help_panel=annotation.panel,
        **more,
    )
