"""`dus heal --push-every`: exports on a branch of the Hub, while the run goes on; against a stand-in
that takes uploads (hub_uploads).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import dus

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

import tiny  # noqa: E402
from hub_server import READER  # noqa: E402
from hub_uploads import WRITER, WritableHub  # noqa: E402

from dus_cli.source.belonging import model_files, read_record  # noqa: E402

RECIPE = "--steps 20 --seq-length 64 --batch-tokens 128 --holdout 10%".split()


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return tiny.write_home(tmp_path_factory.mktemp("pushing"))


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    settings = {"HF_HOME": str(tmp_path / "hf"), "HF_HUB_DISABLE_XET": "1", "HF_TOKEN": WRITER}
    with WritableHub({}) as running:
        for name, value in (settings | {"HF_ENDPOINT": running.endpoint}).items():
            monkeypatch.setenv(name, value)
        yield running


def test_a_failed_push_ends_nothing_and_the_next_export_is_on_the_branch(
    home: Path, hub: WritableHub
) -> None:
    hub.refusals["POST */commit/healing *"] = 4  # as often as one push tries
    push = ("--push-every", "8", "--push-to", "org/deeper")
    out = home / "healed"
    data = ("--data", home / "corpus.jsonl")
    done = dus("heal", home / "scaled", "-o", out, *data, *RECIPE, *push, OMP_NUM_THREADS="1")
    assert done.returncode == 0, done.stderr
    failed, pushed = json.loads((out / "report.json").read_text())["pushes"]
    assert failed["step"] == 8
    assert "503" in failed["error"]
    summary = " ".join(done.stdout.split())  # without its line breaks
    assert f"warning: the export of step 8 was not pushed: {failed['error']}" in summary
    repo = hub.repos["org/deeper"]
    assert pushed == {"step": 16, "commit": repo.revisions["healing"]}
    assert repo.private
    export = home / "healed-step-16"
    files = {name: export / name for name in model_files(export, read_record(export))}
    exported = {name: file.read_bytes() for name, file in files.items() if file.is_file()}
    assert hub.files("org/deeper", "healing") == exported
    assert "config.json" not in hub.files("org/deeper")


def test_what_cannot_be_pushed_is_refused_before_the_data_is_read(
    home: Path, hub: WritableHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = (home / "scaled", "-o", home / "refused", "--data", home / "corpus.jsonl")
    command: tuple[str | Path, ...] = ("heal", *files, *RECIPE, "-q")
    dus(*command, "--push-every", "8").assert_one_line_error("--push-to ORG/NAME need each other")
    to = (*command, "--push-every", "8", "--push-to")
    dus(*to, "a/b/c").assert_one_line_error("a/b/c is not a valid id of a repo", code=2)
    monkeypatch.setenv("HF_TOKEN", READER)
    dus(*to, "org/deeper").assert_one_line_error("the token may not write to org/deeper")
    assert not list((home / "refused").glob("tokens/*/*"))
