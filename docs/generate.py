"""Write docs/cli.md from the code, and the two pictures of the layer map. `--check` only compares."""

from __future__ import annotations

import sys
from enum import Enum
from pathlib import Path
from typing import Any

import typer

from dus_cli.cli import app

DOCS = Path(__file__).parent

COLOURS = {
    "light": {"text": "#1f2328", "base": "#afb8c1", "first": "#0969da", "second": "#1a7f37", "seam": "#cf222e"},
    "dark": {"text": "#e6edf3", "base": "#59636e", "first": "#4493f8", "second": "#3fb950", "seam": "#f85149"},
}

_EXIT_CODES = (
    "Exit codes: 0 done, 1 a known failure (one line on stderr), 2 a usage error, 130 SIGINT, 143 SIGTERM, "
    "129 SIGHUP. stdout carries results only. `DUS_DEBUG=1` shows the traceback of a known failure."
)


def cli_reference() -> str:
    """Markdown of every command, argument and option, as typer knows them."""
    group: Any = typer.main.get_command(app)
    parts = [
        "# CLI reference",
        "Generated from the code by `make docs`; a test fails when it is stale.",
        _EXIT_CODES,
        "## dus",
        group.help,
        _options(group),
    ]
    for name, command in group.commands.items():
        usage = " ".join(["dus", name, "[OPTIONS]", *(p.metavar for p in command.params if _is_argument(p))])
        parts += [f"## dus {name}", f"```\n{usage}\n```", command.help.strip(), _options(command)]
    return "\n\n".join(parts) + "\n"


def _is_argument(parameter: Any) -> bool:
    return not parameter.opts[0].startswith("-")


def _options(command: Any) -> str:
    rows = ["| option | meaning | default |", "|---|---|---|"]
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
        rows.append(f"| `{shown}` | {parameter.help or ''} | {default} |")
    return "\n".join(rows)


def layer_map_svg(theme: str) -> str:
    """SOLAR's map, 32 layers to 48: a square for each layer, the seam marked."""
    colour, pitch, left, size = COLOURS[theme], 15, 96, 13
    rows = [
        ("base", [(k, colour["base"]) for k in range(32)], "32 layers"),
        ("copy 1", [(k, colour["first"]) for k in range(24)], "layers 0–23"),
        ("copy 2", [(k, colour["second"]) for k in range(8, 32)], "layers 8–31"),
    ]
    parts = []
    for row, (label, cells, note) in enumerate(rows):
        y = 20 + row * 34
        parts.append(f'<text x="8" y="{y + 11}">{label}</text>')
        parts += [f'<rect x="{left + k * pitch}" y="{y}" width="{size}" height="{size}" fill="{c}"/>' for k, c in cells]
        parts.append(f'<text x="{left + 32 * pitch + 12}" y="{y + 11}">{note}</text>')
    y = 20 + 3 * 34 + 10
    for output in range(48):
        fill = colour["first"] if output < 24 else colour["second"]
        parts.append(f'<rect x="{left + output * 10}" y="{y}" width="8.5" height="{size}" fill="{fill}"/>')
    parts.append(f'<text x="8" y="{y + 11}">output</text>')
    parts.append(f'<text x="{left + 32 * pitch + 12}" y="{y + 11}">48 layers</text>')
    seam = left + 24 * 10 - 0.75
    parts.append(f'<path d="M{seam} {y - 5}v24" stroke="{colour["seam"]}" stroke-width="2"/>')
    text = "the seam: layer 23 feeds layer 8"
    parts.append(f'<text x="{seam}" y="{y + 36}" text-anchor="middle" fill="{colour["seam"]}">{text}</text>')
    return (
        '<svg xmlns="http://www.w3.org/2000/svg" width="690" height="180" viewBox="0 0 690 180" role="img">'
        "<title>Depthwise scaling: base layers 0 to 23, then 8 to 31, make 48 layers</title>"
        f'<g font-family="ui-monospace, monospace" font-size="13" fill="{colour["text"]}">{"".join(parts)}</g></svg>\n'
    )


def main() -> None:
    pages = {"cli.md": cli_reference()} | {f"layer-map-{theme}.svg": layer_map_svg(theme) for theme in COLOURS}
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
