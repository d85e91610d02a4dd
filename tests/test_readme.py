"""The commands of the README and of docs/healing.md, run in order in an empty folder, as a
reader would.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import dus
from hub_server import StandInHub, StandInRepo, commit_of, only_hub

pytest.importorskip("torch")
pytest.importorskip("transformers")

from tiny import write_base

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", "docs/healing.md"]

# What an environment of its own is for: the extras' tests install them, and CI runs make.
ELSEWHERE = ("pip install", "make ")


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[StandInHub]:
    """A Hub with a small model under the name that the pages use, of the depth that it has
    there.
    """
    name = "HuggingFaceTB/SmolLM2-135M-Instruct"
    folder = write_base(tmp_path / "repo", 30, max_position_embeddings=512)
    repos = {name: StandInRepo({commit_of(name): folder}, {"main": commit_of(name)})}
    with only_hub(repos, tmp_path / "home", monkeypatch) as running:
        yield running


def shell_blocks(page: str) -> list[str]:
    return re.findall(r"^```sh\n(.*?)^```", (ROOT / page).read_text(), re.MULTILINE | re.DOTALL)


@pytest.mark.parametrize("page", PAGES)
def test_every_command_runs_in_order_in_an_empty_folder(
    page: str, hub: StandInHub, tmp_path: Path
) -> None:
    folder = tmp_path / "empty"
    folder.mkdir()
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    blocks = [block for block in shell_blocks(page) if not block.startswith(ELSEWHERE)]
    assert blocks
    for block in blocks:
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", block],
            cwd=folder,
            env={**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "80"},
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{block}{done.stdout}{done.stderr}"
        too_wide = [line for line in done.stdout.splitlines() if len(line) > 80 and " " in line]
        assert too_wide == []


@pytest.mark.parametrize("page", PAGES)
def test_every_block_says_what_it_is(page: str) -> None:
    """A block without a language would be one that nothing runs."""
    fences = re.findall(r"^```(\w*)$", (ROOT / page).read_text(), re.MULTILINE)
    opening = fences[::2]
    assert set(opening) <= {"sh", "json", "text", "toml"}, opening


def test_the_options_in_a_file_are_ones_that_heal_takes(tmp_path: Path) -> None:
    pytest.importorskip("tomllib", reason="Python 3.10 has none")
    (block,) = re.findall(
        r"^```toml\n(.*?)^```$", (ROOT / "docs/healing.md").read_text(), re.MULTILINE | re.DOTALL
    )
    (tmp_path / "heal.toml").write_text(block)
    printed = dus("heal", "--config", tmp_path / "heal.toml", "--print-config").stdout
    assert 'until = "base"' in printed
    assert "seq-length = 1024" in printed


def test_the_readme_shows_a_line_of_the_corpus() -> None:
    assert '```json\n{"text": ' in (ROOT / "README.md").read_text()


def test_the_readme_fits_on_two_screens() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120
