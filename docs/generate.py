"""Write docs/cli.md, dus.1 and engines.md from the code, and two pictures of the layer map.
`--check` only compares.
"""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Any

import typer
from enginespage import engines_page
from manpage import Command, Option, man_page

from dus_cli.cli import COMMANDS, app, load_command
from dus_cli.common.bounds import BOUNDS
from dus_cli.maps.layers import stack
from dus_cli.pictures.layer_map import PICTURES, layer_map_svg

DOCS = Path(__file__).parent

_EXIT_CODES = (
    "Exit codes: 0 done, 1 a known failure (one line on stderr), 2 a usage error, 130 SIGINT, 143 "
    "SIGTERM, 129 SIGHUP, 141 when nobody reads the results (`dus … | head`; quiet). stdout "
    "carries results only. Nothing ever asks. `DUS_DEBUG=1` shows the traceback of a failure."
)

_CONFIG = (
    "Every command takes `--config FILE`: a file of options whose keys are their names without "
    "dashes (`seq-length` or `seq_length`), and for an argument its name (`model`). What also "
    "stands on the command line wins over the file; paths are relative to the folder that dus is "
    "started in, as they are on a command line. An option that may be repeated takes a list, a "
    "flag true or false, all others what would be typed, a number or a text. A key that is no "
    "option is an error. TOML takes Python 3.11, or tomli. `dus heal --print-config` writes such "
    "a file, and the `run.json` of a healed model is one."
)


def commands() -> list[Command]:
    """`dus` itself and every command, as typer knows them."""
    group: Any = typer.main.get_command(app)
    found = [Command("dus", group.help, _options(group))]
    for name in COMMANDS:
        command: Any = load_command(name)
        usage = " ".join(
            ["dus", name, "[OPTIONS]", *(p.metavar for p in command.params if _is_argument(p))]
        )
        found.append(Command(usage, command.help.strip(), _options(command)))
    return found


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _options(command: Any) -> tuple[Option, ...]:
    options = []
    for parameter in command.params:
        default, is_flag = parameter.default, getattr(parameter, "is_flag", False)
        value = parameter.metavar
        if isinstance(default, Enum):
            value, default = " or ".join(choice.value for choice in type(default)), default.value
        spellings = ", ".join([*parameter.opts, *parameter.secondary_opts])
        names = parameter.metavar if _is_argument(parameter) else spellings
        shown = names if _is_argument(parameter) or is_flag or not value else f"{names} {value}"
        if parameter.required:
            default = "required"
        elif is_flag or default is None:
            default = ""
        bounds = BOUNDS.get(parameter.opts[0].lstrip("-"))
        meaning = parameter.help or ""
        meaning += f" Takes {bounds}." if bounds else ""
        options.append(Option(shown, meaning, str(default)))
    return tuple(options)


def cli_reference(root: Command, others: list[Command]) -> str:
    """Every command, argument and option, in Markdown."""
    parts = [
        "# CLI reference",
        (
            "Generated from the code by `make docs`, like the manual page [dus.1](dus.1); a test "
            "fails when it is stale."
        ),
        _EXIT_CODES,
        _CONFIG,
        "## dus",
        root.help,
        _table(root.options),
    ]
    for command in others:
        name = " ".join(command.usage.split()[:2])
        parts += [f"## {name}", f"```\n{command.usage}\n```", command.help, _table(command.options)]
    return "\n\n".join(parts) + "\n"


def _table(options: tuple[Option, ...]) -> str:
    rows = [f"| `{option.spelling}` | {option.meaning} | {option.default} |" for option in options]
    return "\n".join(["| option | meaning | default |", "|---|---|---|", *rows])


def main() -> None:
    solar = stack(32, trim=8)
    root, *others = commands()
    pages = {"cli.md": cli_reference(root, others), "dus.1": man_page(root, others)}
    pages["engines.md"] = engines_page()
    pages |= {name: layer_map_svg(solar, dark=dark) for name, dark in PICTURES.items()}
    stale = [
        name
        for name, text in pages.items()
        if not (DOCS / name).exists() or (DOCS / name).read_text(encoding="utf-8") != text
    ]
    if "--check" in sys.argv:
        sys.exit(f"stale: {', '.join(stale)}; run make docs" if stale else 0)
    for name in stale:
        (DOCS / name).write_text(pages[name], encoding="utf-8")
        print(f"wrote docs/{name}")


if __name__ == "__main__":
    main()
