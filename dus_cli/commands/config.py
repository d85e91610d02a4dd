"""`--config`: options from a TOML, YAML or JSON file; the command line takes precedence."""

from __future__ import annotations

import json
import types
from collections.abc import Callable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any, Optional, Union, get_args, get_origin

import typer

from dus_cli.common.reference import user_path
from dus_cli.console import events
from dus_cli.errors import CheckpointError, DusError, UsageError, shown, shown_list
from dus_cli.progress import ProgressMode
from dus_cli.source.json_objects import parse_json_object
from dus_cli.source.reading import open_regular

# Larger than any list of options.
_MOST_BYTES = 1_000_000

# Parameters that a file cannot give.
_NOT_IN_A_FILE = frozenset({"config", "help", "print_config"})

# Turns the content of another kind of file, such as run.json, into options; None if it is not one.
Converter = Callable[[dict[str, Any]], dict[str, Any] | None]


def config_option(kinds: Mapping[str, Any], convert: Converter | None) -> Any:
    """The annotation of a command's `--config`.

    Args:
        kinds: the types of the command's parameters, by name.
        convert: turns another kind of file that the command knows into options.
    """

    def read(context: typer.Context, path: Path | None) -> Path | None:
        if path is not None and not context.resilient_parsing:
            values = _texts(path, context, kinds, convert)
            context.default_map = values
            events.EventsWanted.by_a_file = values.get("progress") == ProgressMode.json.value
        return path

    return Annotated[
        Optional[Path],  # noqa: UP045  (typer reads the annotation at run time, also on Python 3.10)
        typer.Option(
            "--config",
            metavar="FILE",
            parser=_path,
            callback=read,
            is_eager=True,
            help="Read options from a .toml, .yaml or .json file by their names without dashes; "
            "the command line wins.",
        ),
    ]


def _path(text: str | Path) -> Path:
    return user_path(text)


def _texts(
    path: Path, context: typer.Context, kinds: Mapping[str, Any], convert: Converter | None
) -> dict[str, Any]:
    """The values in a file, by parameter name, in the form that a command line would give.

    Raises:
        UsageError: the file cannot be read, or holds an unknown option or an invalid value.
    """
    name, command = f"--config {shown(path)}", str(context.command.name)
    content = read_file(path)
    if convert is not None:
        try:
            content = convert(content) or content
        except DusError as error:
            raise UsageError(f"{name}: {error}") from None
    parameters = {
        key: p for p in context.command.params if p.name not in _NOT_IN_A_FILE for key in _keys(p)
    }
    unknown = [str(key) for key in content if str(key).replace("_", "-") not in parameters]
    if unknown:
        from difflib import get_close_matches

        near = get_close_matches(unknown[0].replace("_", "-"), parameters, 1)
        hint = f"; do you mean {near[0]}?" if near else f"; see dus {command} --help"
        raise UsageError(f"{name}: dus {command} has no option {shown_list(unknown)}{hint}")
    values: dict[str, Any] = {}
    for key, value in content.items():
        parameter = parameters[str(key).replace("_", "-")]
        if value is None:  # YAML's way of leaving an option unset
            continue
        if parameter.name in values:
            raise UsageError(
                f"{name}: {key} is there twice, with a dash and with an underscore; leave one out"
            )
        try:
            values[str(parameter.name)] = _text(value, kinds[str(parameter.name)])
            parameter.process_value(context, values[str(parameter.name)])
        except TypeError as error:
            raise UsageError(f"{name}: {key}: {error}") from None
        except typer.BadParameter as error:
            raise UsageError(f"{name}: {key}: {error.message.rstrip('.')}") from None
    return values


def _keys(parameter: Any) -> list[str]:
    """The names of a parameter in a file: an option's without leading dashes, an argument's own."""
    if parameter.param_type_name == "argument":
        return [str(parameter.name).replace("_", "-")]
    return [spelling[2:] for spelling in parameter.opts if spelling.startswith("--")]


def _text(value: Any, kind: Any) -> Any:
    """A value as on a command line: text, a boolean for a flag, or a list of texts.

    Raises:
        TypeError: the option does not take a value of this type.
    """
    if get_origin(kind) is list:
        items = value if isinstance(value, list) else [value]
        return [_text(item, *get_args(kind)) for item in items]
    if kind is bool:
        if not isinstance(value, bool):
            raise TypeError(f"{_json_text(value)} is neither true nor false")
        return value
    if isinstance(value, str):
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{_json_text(value)} is no value of this option; write a text or a number")
    # 1e3 or 007 has become a number, and its text is lost
    if kind in (str, Path):
        raise TypeError(
            f"{_json_text(value)} is a number, and this option takes a text; write it in quotes"
        )
    from decimal import Decimal

    return format(Decimal(repr(value)), "f")


def _json_text(value: Any) -> str:
    return shown(json.dumps(value, default=str, ensure_ascii=False))


def kind_of(annotation: Any) -> Any:
    """The type of a parameter's values, without its annotation for typer and without None."""
    if get_origin(annotation) is Annotated:
        annotation = get_args(annotation)[0]
    if get_origin(annotation) in (Union, types.UnionType):
        (annotation,) = (kind for kind in get_args(annotation) if kind is not type(None))
    return annotation


# --- the file -------------------------------------------------------------------------------------


def read_file(path: Path) -> dict[str, Any]:
    """The mapping in a file; its suffix says whether that is TOML, YAML or JSON.

    Raises:
        UsageError: the file cannot be read, or is not such a mapping.
    """
    name = f"--config {shown(path)}"
    readers = {".toml": _toml, ".yaml": _yaml, ".yml": _yaml, ".json": _json}
    if path.suffix.lower() not in readers:
        raise UsageError(f"{name}: its name must end in .toml, .yaml, .yml or .json")
    try:
        with open_regular(path) as file:
            content = file.read(_MOST_BYTES + 1)
        if len(content) > _MOST_BYTES:
            raise UsageError(
                f"{name}: it is larger than {_MOST_BYTES:,} bytes, and no list of options"
            )
        text = content.decode("utf-8-sig")
    except OSError as error:
        raise UsageError(
            f"{name} cannot be read ({error.strerror}); give a file of options"
        ) from None
    except UnicodeDecodeError as error:
        raise UsageError(f"{name}: it is not UTF-8 (byte {error.start})") from None
    try:
        return readers[path.suffix.lower()](text)
    except (TypeError, ValueError, RecursionError) as error:
        raise UsageError(f"{name}: {' '.join(str(error).split())}") from None


def _toml(text: str) -> dict[str, Any]:
    # tomllib is part of Python 3.11 and later; tomli is the same for older ones, if installed.
    for module in ("tomllib", "tomli"):
        try:
            tomllib = import_module(module)
        except ModuleNotFoundError:
            continue
        break
    else:
        raise ValueError(
            "reading TOML takes Python 3.11 or tomli (pip install tomli); or write YAML"
        )
    try:
        content: dict[str, Any] = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ValueError(f"it is no TOML ({error})") from None
    return content


def _yaml(text: str) -> dict[str, Any]:
    import yaml

    try:
        root = yaml.compose(text, Loader=yaml.SafeLoader)
        content = yaml.safe_load(text)
    except yaml.YAMLError as error:
        raise ValueError(f"it is no YAML ({error})") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise TypeError("it is no list of options; write a line such as seq-length: 512 for each")
    keys = [key.value for key, _ in root.value]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"{shown_list(twice)} is there twice; leave one out")
    return content


def _json(text: str) -> dict[str, Any]:
    try:
        return parse_json_object(text.encode(), "the file")
    except CheckpointError as error:
        raise ValueError(str(error)) from None


def toml_text(options: Mapping[str, Any]) -> str:
    """Options as a TOML file that `--config` reads.

    >>> values = {"data": ["a.jsonl"], "lr": 0.0001, "compile": False, "warmup": "2%"}
    >>> print(toml_text(values), end="")
    data = ["a.jsonl"]
    lr = 0.0001
    compile = false
    warmup = "2%"
    """
    return "".join(f"{name} = {_toml_value(value)}\n" for name, value in options.items())


def _toml_value(value: Any) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml_value, value))}]"
    # A JSON string is a TOML string, except that TOML requires DEL to be escaped.
    return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
