"""What the Hub's cache lacks is named, where the Hub cannot be asked."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from huggingface_hub import constants

from dus_cli.common.reference import ModelRef
from dus_cli.errors import DusError
from dus_cli.planning.plan import MapRequest
from dus_cli.upscaling.request import UpscaleRequest, plan_for

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def repo(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model in the cache as another program left it, without a list of its files, and no way
    to the Hub.
    """
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "hub/models--org--tiny"
    write_checkpoint(folder / "snapshots" / COMMIT, llama_tensors(4), llama_config(4), num_shards=2)
    (folder / "refs").mkdir()
    (folder / "refs/main").write_text(COMMIT)
    (folder / "blobs").mkdir()
    return folder


def refused(model: str = "org/tiny") -> str:
    with pytest.raises(DusError) as caught:
        plan_for(UpscaleRequest(ModelRef.parse(model), MapRequest(1)))
    message = str(caught.value)
    assert message.startswith(f"{model} is not (wholly) in the cache: ")
    assert "HF_HUB_OFFLINE is set" in message
    return message


def test_a_cached_model_needs_no_list_of_its_files(repo: Path) -> None:
    assert (
        plan_for(UpscaleRequest(ModelRef.parse("org/tiny"), MapRequest(1))).checkpoint.folder.name
        == COMMIT
    )


def test_a_model_that_was_never_fetched(repo: Path) -> None:
    shutil.rmtree(repo)
    assert f"nothing of it is in {repo.parent}" in refused()


def test_a_ref_that_is_missing_is_named_and_so_is_a_commit_that_is_there(repo: Path) -> None:
    assert "there is no refs/v2" in refused("org/tiny@v2")
    (repo / "refs/main").unlink()
    assert (
        f"there is no refs/main, which names the commit; give a commit instead: org/tiny@{COMMIT}"
        in refused()
    )


def test_a_ref_with_a_newline_or_without_a_commit(repo: Path) -> None:
    (repo / "refs/main").write_text(f"{COMMIT}\n")
    assert "refs/main has white space around the commit" in refused()
    (repo / "refs/main").write_text("")
    assert "refs/main holds '', which is not a commit" in refused()


def test_a_snapshot_that_is_missing(repo: Path) -> None:
    (repo / "refs/main").write_text("f" * 40)
    assert f"there is no snapshots/{'f' * 40}, the commit of revision main" in refused()


def test_weights_that_are_missing(repo: Path) -> None:
    snapshot = repo / "snapshots" / COMMIT
    (snapshot / "model-00002-of-00002.safetensors").unlink()
    assert "it lacks model-00002-of-00002.safetensors;" in refused()
    for path in snapshot.glob("model*"):
        path.unlink()
    (repo / "blobs/abc.incomplete").write_bytes(bytes(1234))
    assert (
        "it lacks model.safetensors (1,234 bytes of an interrupted download are there)" in refused()
    )


def test_a_blob_behind_a_link_that_is_gone(repo: Path) -> None:
    shard = repo / "snapshots" / COMMIT / "model-00001-of-00002.safetensors"
    shard.unlink()
    shard.symlink_to("../../blobs/abc")
    assert "the blob of model-00001-of-00002.safetensors is missing (blobs/abc)" in refused()
