"""Completion as each shell asks for it: the script that dus hands out, sourced, and TAB."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from imports import HEAVY, imported_by

from dus_cli.maps.recipes import RECIPES

# What stands on the line, and what TAB may put there.
LINES = [
    ("dus up", {"upscale"}),
    ("dus upscale --rec", {"--recipe"}),
    ("dus upscale --recipe ", set(RECIPES)),
    ("dus upscale --dtype b", {"bfloat16"}),
    ("dus verify --progress ", {"auto", "plain", "json", "none"}),
    ("dus heal --schedule co", {"constant"}),
]

# Sources the script and prints a candidate a line, by means of the shell itself.
ASK = {
    "bash": """source "$SCRIPT"; read -ra COMP_WORDS <<<"$LINE"; [[ $LINE == *" " ]] && COMP_WORDS+=("")
        COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _dus_completion dus; printf '%s\\n' "${COMPREPLY[@]}" """,
    # Without the line editor: _arguments is what the candidates are handed to, as ((a:help
    # b:help)).
    "zsh": """compdef() { : }; _arguments() { print -r -- "$@" }; source "$SCRIPT"
        words=(${=LINE}); [[ $LINE == *" " ]] && words+=(""); CURRENT=$#words; _dus_completion""",
    "fish": """source $SCRIPT; complete -C "$LINE" """,
}


@pytest.fixture(scope="module")
def commands(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with `dus`, so that shells find it by name."""
    folder = tmp_path_factory.mktemp("bin")
    (folder / "dus").write_text(f'#!/bin/sh\nexec {sys.executable} -m dus_cli "$@"\n')
    (folder / "dus").chmod(0o755)
    return folder


def answer(shell: str, line: str, commands: Path, folder: Path) -> set[str]:
    if shutil.which(shell) is None:
        pytest.skip(f"there is no {shell} here")
    environment = os.environ | {
        "PATH": f"{commands}:{os.environ['PATH']}",
        "LINE": line,
        "HOME": str(folder),
    }
    script = folder / "script"
    asked = subprocess.run(
        ["dus"],
        env=environment | {"_DUS_COMPLETE": f"source_{shell}"},
        capture_output=True,
        check=True,
    )
    script.write_bytes(asked.stdout)
    environment["SCRIPT"] = str(script)
    done = subprocess.run(
        [shell, "-c", ASK[shell]], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stderr == ""
    if shell == "zsh":
        return set(re.findall(r'"([^"]*)"(?::"[^"]*")?', done.stdout))
    return {candidate.split("\t")[0] for candidate in done.stdout.splitlines()}


@pytest.mark.parametrize(
    ("shell", "line", "expected"),
    [
        *(("bash", *line) for line in LINES),
        *((shell, *line) for shell in ("zsh", "fish") for line in LINES[:3]),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_tab_gives(
    shell: str, line: str, expected: set[str], commands: Path, tmp_path: Path
) -> None:
    assert answer(shell, line, commands, tmp_path) == expected


def test_completing_imports_nothing_heavy_and_no_command_it_does_not_need(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for variable, value in (
        ("COMP_WORDS", "dus upscale --recipe "),
        ("COMP_CWORD", "3"),
        ("_DUS_COMPLETE", "complete_bash"),
    ):
        monkeypatch.setenv(variable, value)
    modules = imported_by()
    assert not modules & (HEAVY | {"rich"})
