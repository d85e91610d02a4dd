"""Pictures written to disk, each with its dark twin."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from dus_cli.common.files import writing
from dus_cli.errors import OutputError, encodable, shown
from dus_cli.pictures.svg import is_drawn

# --- files ----------------------------------------------------------------------------------------


def check_picture(path: Path) -> None:
    """Check that a picture can be written, before anything is measured.

    Raises:
        OutputError: no .svg, no place for it, or a file there that dus did not draw.
    """
    if path.suffix.lower() != ".svg":
        raise OutputError(f"--plot {shown(path)}: dus draws SVG; give a name that ends in .svg")
    if path.is_dir() or not path.resolve().parent.is_dir():
        raise OutputError(
            f"--plot {shown(path)} is no place for a file; give a name in a folder that exists"
        )
    for target in (path, dark_twin(path)):
        if os.path.lexists(target) and not is_drawn(target):
            raise OutputError(
                f"--plot: {shown(target)} exists and is no picture that dus drew; choose another "
                "name"
            )


def dark_twin(path: Path) -> Path:
    """Where the picture for a dark page goes.

    >>> dark_twin(Path("probe.svg")).name
    'probe-dark.svg'
    """
    return path.with_name(f"{path.stem}-dark{path.suffix}")


def write_pictures(path: Path, draw: Callable[[bool], str]) -> None:
    """FILE.svg for a light page and FILE-dark.svg for a dark one, each under its name once it is
    whole.

    `draw` is told whether the page is dark.

    Raises:
        OutputError: writing failed.
    """
    for target, dark in ((path, False), (dark_twin(path), True)):
        partial = target.with_name(f".{target.name}.partial")
        try:
            with writing(target.name):
                partial.write_text(encodable(draw(dark)), encoding="utf-8")
                partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
