"""Models from the Hub: the real command against a stand-in on the loopback interface
(hub_server).
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import struct
import subprocess
import termios
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from checkpoints import llama_config, llama_tensors, write_checkpoint
from conftest import DUS
from forked import dus, dus_with_torch, stop
from hub_server import HANG_UP, READER, STRANGER, StandInHub, StandInRepo, commit_of, only_hub
from pickled import Payload, write_pickled

from dus_cli.common.reference import ModelRef

SMALL_FILES = {
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "README.md",
    ".gitattributes",
}
INDEX = "model.safetensors.index.json"
SHARDS = {f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)}
OTHER_FORMATS = {
    "consolidated.safetensors",
    "pytorch_model.bin",
    "model.gguf",
    "onnx/config.json",
    "onnx/model.onnx",
    "original/consolidated.00.pth",
    "original/params.json",
}
# What the report of a dry run cannot have.
OF_A_RUN = {
    "status",
    "dry_run",
    "space",
    "bytes_cloned",
    "bytes_copied",
    "verified",
    "published",
    "seconds",
}
AT_ONCE = "import dus_cli.hub.remote as r; r.FIRST_WAIT = 0"  # no waits before another try
CLOSED_PORT = "http://127.0.0.1:1"


def write_repo(folder: Path, num_layers: int, *, num_shards: int = 3) -> Path:
    """What a repo holds: the weights, the same for other programs, a tokenizer, a card."""
    write_checkpoint(
        folder, llama_tensors(num_layers), llama_config(num_layers), num_shards=num_shards
    )
    for name in OTHER_FORMATS | SMALL_FILES - {"config.json"}:
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(json.dumps({"a file": name}))  # the cache keeps equal files once
    return folder


def one_commit(folder: Path) -> StandInRepo:
    commit = commit_of(folder.name)
    return StandInRepo({commit: folder}, {"main": commit})


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    yield
    stop()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The content of the repos, which is only read."""
    root = tmp_path_factory.mktemp("repos")
    vocab = 65_536  # embeddings of 8 MB
    return {
        "llama": write_repo(root / "llama", 8),
        "earlier": write_repo(root / "earlier", 6),
        "single": write_repo(root / "single", 8, num_shards=1),
        "wide": write_checkpoint(
            root / "wide", llama_tensors(4, vocab=vocab), llama_config(4, vocab=vocab), num_shards=2
        ),
    }


@pytest.fixture
def repos(folders: dict[str, Path]) -> dict[str, StandInRepo]:
    llama = StandInRepo(
        {commit_of(name): folders[name] for name in ("llama", "earlier")},
        {
            "main": commit_of("llama"),
            "v0.1": commit_of("earlier"),
            "refs/pr/1": commit_of("earlier"),
        },
    )
    return {
        "org/llama": llama,
        "org/private": replace(llama, private=True),
        "org/gated": replace(llama, gated=True),
        "org/xet": replace(llama, xet=True),
        "org/single": one_commit(folders["single"]),
        "org/wide": one_commit(folders["wide"]),
    }


@pytest.fixture(autouse=True)
def hub(
    repos: dict[str, StandInRepo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInHub]:
    with only_hub(repos, tmp_path / "hf", monkeypatch) as running:
        yield running


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory; what is in it afterwards, dus put there."""
    folder = tmp_path / "desk"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def fetched_whole(hub: StandInHub) -> list[str]:
    """Weight files that were asked for otherwise than by range."""
    asked = (r for r in hub.log if r.method == "GET" and r.byte_range is None)
    return [r.path for r in asked if r.path.endswith(".safetensors")]


def test_hub_model_and_its_directory_give_the_same_output(
    folders: dict[str, Path], desk: Path
) -> None:
    options = ("--trim", "1", "--max-shard-size", "200KB", "--json")
    remote = dus("upscale", "org/llama", *options, "-o", "remote").report
    local = dus("upscale", folders["llama"], *options, "-o", "local").report
    assert remote["layer_map"] == [0, 1, 2, 3, 4, 5, 6, 1, 2, 3, 4, 5, 6, 7]
    assert (remote["commit"], local["commit"]) == (commit_of("llama"), None)
    names = {path.name for path in (desk / "local").iterdir()}
    assert names == {path.name for path in (desk / "remote").iterdir()}
    assert "tokenizer.json" in names
    for name in names - {"README.md", "dus.json"}:
        assert (desk / "remote" / name).read_bytes() == (desk / "local" / name).read_bytes()


@pytest.mark.parametrize("revision", [None, "v0.1"])
def test_lineage_and_card_name_the_repo_and_its_commit(revision: str | None, desk: Path) -> None:
    commit = commit_of("earlier" if revision else "llama")
    model = f"org/llama@{revision}" if revision else "org/llama"
    assert dus("upscale", model, "--trim", "1", "-o", "out").returncode == 0
    base = json.loads((desk / "out" / "dus.json").read_text())["base"]
    assert (base["repo_id"], base["revision"], base["commit"]) == ("org/llama", revision, commit)
    _, front_matter, text = (desk / "out" / "README.md").read_text().split("---\n", 2)
    assert 'base_model: "org/llama"' in front_matter.splitlines()
    assert f"dus upscale org/llama@{commit} --trim 1 -o OUT" in text


@pytest.mark.parametrize(
    ("revision", "commit", "num_layers"),
    [
        ("main", commit_of("llama"), 8),
        ("v0.1", commit_of("earlier"), 6),
        ("refs/pr/1", commit_of("earlier"), 6),
        (commit_of("earlier"), commit_of("earlier"), 6),
    ],
)
def test_revision_is_a_branch_a_tag_or_a_commit(
    revision: str, commit: str, num_layers: int, desk: Path
) -> None:
    report = dus("upscale", f"org/llama@{revision}", "--trim", "1", "-o", "out", "--json").report
    assert report["commit"] == commit
    assert report["num_layers"]["base"] == num_layers


def test_model_in_one_file_is_fetched_and_deepened(hub: StandInHub, desk: Path) -> None:
    assert (
        dus("upscale", "org/single", "--trim", "1", "-o", "out", "--json").report["num_layers"][
            "output"
        ]
        == 14
    )
    assert hub.files_asked_for == SMALL_FILES | {"model.safetensors"}


def test_only_small_files_and_what_the_index_names_are_asked_for(
    hub: StandInHub, desk: Path
) -> None:
    report = dus("upscale", "org/llama", "--trim", "1", "-o", "out", "--json").report
    assert hub.files_asked_for == SMALL_FILES | {INDEX} | SHARDS
    assert report["files"] == ["generation_config.json", "tokenizer.json"]


def test_second_run_takes_the_weights_from_the_cache(hub: StandInHub, desk: Path) -> None:
    assert dus("upscale", "org/llama", "--trim", "1", "-o", "one").returncode == 0
    assert hub.num_sent("*.safetensors") > 0
    hub.log.clear()
    assert dus("upscale", "org/llama", "--trim", "2", "-o", "two").returncode == 0
    assert hub.files_asked_for == set()
    assert hub.num_sent("*.safetensors") == 0


@pytest.mark.parametrize(
    "environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["unreachable", "offline"]
)
def test_cached_model_needs_no_hub(
    environment: dict[str, str], hub: StandInHub, desk: Path
) -> None:
    assert dus("upscale", "org/llama", "--trim", "1", "-o", "one").returncode == 0
    hub.stop()
    command = ("upscale", "org/llama", "--trim", "1", "-o", "two", "--json")
    assert dus(*command, "--dry-run", cwd=desk, **environment).report["commit"] == commit_of(
        "llama"
    )
    assert dus(*command, cwd=desk, **environment).report["commit"] == commit_of("llama")


def test_cache_whose_blobs_are_shared_between_repos_is_read(tmp_path: Path, desk: Path) -> None:
    """huggingface_hub 2 keeps Xet files in one store for all repos, with links to it from each
    repo's blobs.
    """
    assert dus("upscale", "org/llama", "--trim", "1", "-o", "one").returncode == 0
    cache = tmp_path / "hf" / "hub"
    # sha256: under LFS
    blobs = [path for path in cache.glob("models--*/blobs/*") if len(path.name) == 64]
    assert len(blobs) == len(SHARDS)
    for blob in blobs:
        stored = cache / "blobs" / blob.name[:2] / blob.name
        stored.parent.mkdir(parents=True)
        blob.rename(stored)
        blob.symlink_to(os.path.relpath(stored, blob.parent))
    assert dus("upscale", "org/llama", "--trim", "1", "-o", "two", "--json").report[
        "commit"
    ] == commit_of("llama")


def test_verify_holds_the_output_against_its_base_on_the_hub(desk: Path) -> None:
    assert dus("upscale", "org/llama", "--trim", "1", "-o", "out").returncode == 0
    found = dus("verify", "out", "--base", "org/llama", "--json").report
    assert found["sound"]
    assert found["bytes_compared"] > 0
    assert not json.loads(dus("verify", "out", "--base", "org/llama@v0.1", "--json").stdout)[
        "sound"
    ]


def test_dry_run_fetches_headers_only_and_plans_what_the_run_does(
    hub: StandInHub, desk: Path
) -> None:
    command = (
        "upscale",
        "org/wide",
        "--trim",
        "1",
        "-o",
        "out",
        "--max-shard-size",
        "5MB",
        "--json",
    )
    planned = dus(*command, "--dry-run").report
    assert list(desk.iterdir()) == []
    assert fetched_whole(hub) == []
    assert 0 < hub.num_sent("*.safetensors") <= 2 * 100_000  # of 17 MB
    done = dus(*command).report
    for field in done.keys() - OF_A_RUN:
        assert planned[field] == done[field], field
    assert len(done["shards"]) > 2


def test_header_longer_than_the_first_request_takes_a_second(
    hub: StandInHub, repos: dict[str, StandInRepo], tmp_path: Path, desk: Path
) -> None:
    tensors, config = llama_tensors(220, 8, 8, 8, 8), llama_config(220, 8, 8, 8)
    repos["org/deep"] = one_commit(
        write_checkpoint(tmp_path / "deep", tensors, config, num_shards=2)
    )
    report = dus("upscale", "org/deep", "--trim", "1", "-o", "out", "--dry-run", "--json").report
    assert report["num_layers"]["output"] == 438
    # Two headers are read at a time, each in its order.
    ranges: dict[str, list[str]] = {}
    for request in hub.log:
        if request.path.startswith("/cdn/"):
            ranges.setdefault(request.path, []).append((request.byte_range or "").split("-")[0])
    assert list(ranges.values()) == [["bytes=0", "bytes=100000"]] * 2


@pytest.mark.parametrize("value", [None, "0", "1"])
def test_json_is_all_there_is_on_stdout(value: str | None, desk: Path) -> None:
    environment = {} if value is None else {"HF_HUB_DISABLE_PROGRESS_BARS": value}
    run = dus("upscale", "org/llama", "--trim", "1", "-o", "out", "--json", cwd=desk, **environment)
    assert isinstance(run.report, dict)
    assert run.stdout.count("\n") == 1


def test_without_a_terminal_the_hub_adds_nothing_to_the_output(
    folders: dict[str, Path], desk: Path
) -> None:
    assert dus("upscale", "org/llama", "--trim", "1", "-o", "out", "--json").stderr == ""
    remote = dus("upscale", "org/llama@v0.1", "--trim", "1", "-o", "remote")
    local = dus("upscale", folders["earlier"], "--trim", "1", "-o", "local")
    assert (remote.returncode, local.returncode) == (0, 0)
    assert len(remote.stdout.splitlines()) == len(local.stdout.splitlines())
    fetching, *others = remote.stderr.splitlines()  # dus' own line for the stage
    assert fetching.startswith("fetching ")
    assert len(others) == len(local.stderr.splitlines())


@pytest.mark.parametrize("model", ["org/private", "org/gated"])
def test_token_opens_private_and_gated_models(model: str, desk: Path) -> None:
    report = dus("upscale", model, "--trim", "1", "-o", "out", "--json", HF_TOKEN=READER).report
    assert report["commit"] == commit_of("llama")


@pytest.mark.parametrize(
    ("model", "environment", "parts"),
    [
        ("org/none", {}, ("org/none is not on the Hub, or is private", "HF_TOKEN")),
        ("org/none", {"HF_TOKEN": READER}, ("org/none is not on the Hub",)),
        ("org/private", {}, ("org/private is not on the Hub, or is private", "HF_TOKEN")),
        ("org/private", {"HF_TOKEN": STRANGER}, ("org/private is not on the Hub, or is private",)),
        (
            "org/gated",
            {},
            (
                "org/gated is gated: ask for access at http://127.0.0.1:",
                "/org/gated, then",
                "--token",
            ),
        ),
        ("org/gated", {"HF_TOKEN": STRANGER}, ("org/gated is gated: ask for access",)),
        (
            "org/llama",
            {"HF_TOKEN": "hf_expired"},
            ("answered 401 for org/llama", "renew the token"),
        ),
        ("org/llama@v9", {}, ("org/llama has no revision v9",)),
        (f"org/llama@{'0' * 40}", {}, (f"org/llama has no revision {'0' * 40}",)),
        ("org/llama--x", {}, ("org/llama--x is not a valid Hub id",)),
        (
            "org/llama",
            {"HF_HUB_OFFLINE": "1"},
            ("org/llama is not (wholly) in the cache", "HF_HUB_OFFLINE"),
        ),
        ("org/llama", {"HF_ENDPOINT": CLOSED_PORT}, ("the Hub cannot be reached", "HF_ENDPOINT")),
        (
            "org/llama",
            {"HF_ENDPOINT": "localhost"},
            ("HF_ENDPOINT is 'localhost'", "must begin with https://"),
        ),
        # hf_xet's own errors
        ("org/xet", {"HF_XET_CLIENT_RETRY_MAX_ATTEMPTS": "1"}, ("org/xet", "the Hub")),
    ],
)
def test_what_the_hub_cannot_serve_is_a_one_line_error(
    model: str, environment: dict[str, str], parts: tuple[str, ...], desk: Path
) -> None:
    dus(
        "upscale", model, "--trim", "1", "-q", "-o", "out", cwd=desk, **environment
    ).assert_one_line_error(*parts)
    assert list(desk.iterdir()) == []


@pytest.mark.parametrize(
    ("request_pattern", "status", "part"),
    [
        ("GET /api/models/*", 429, "the Hub answered 429 for org/llama"),
        ("GET /api/models/*", 500, "the Hub answered 500 for org/llama"),
        ("GET /api/models/*", HANG_UP, "the connection to the Hub failed for org/llama"),
        ("GET */tokenizer.json whole", 500, "the Hub answered 500 for org/llama"),
        ("GET /cdn/* bytes=*", 403, "the Hub answered 403 for org/llama"),  # the headers
        ("GET /cdn/* whole", 500, "the Hub answered 500 for org/llama"),  # the weights
    ],
)
def test_failing_hub_is_a_one_line_error(
    request_pattern: str, status: int, part: str, hub: StandInHub, desk: Path
) -> None:
    hub.failures[request_pattern] = status
    dus(
        "upscale", "org/llama", "--trim", "1", "-q", "-o", "out", first=AT_ONCE
    ).assert_one_line_error(part)
    assert list(desk.iterdir()) == []


def test_run_after_a_failed_download_succeeds(hub: StandInHub, desk: Path) -> None:
    hub.failures[f"GET /cdn/*/{max(SHARDS)} whole"] = 500
    dus(
        "upscale", "org/llama", "--trim", "1", "-q", "-o", "out", first=AT_ONCE
    ).assert_one_line_error("the Hub answered 500")
    hub.failures.clear()
    assert (
        dus("upscale", "org/llama", "--trim", "1", "-o", "out", "--verify", "full").returncode == 0
    )


def test_partly_cached_model_offline_is_a_one_line_error(desk: Path) -> None:
    assert dus("upscale", "org/llama", "--trim", "1", "-o", "out", "--dry-run").returncode == 0
    run = dus("upscale", "org/llama", "--trim", "1", "-o", "out", HF_HUB_OFFLINE="1")
    run.assert_one_line_error("org/llama is not (wholly) in the cache")
    assert list(desk.iterdir()) == []


def test_invalid_trim_is_refused_before_weights_are_fetched(hub: StandInHub, desk: Path) -> None:
    dus("upscale", "org/llama", "--trim", "4", "-q", "-o", "out").assert_one_line_error(
        "--trim 4", "use 0 to 3"
    )
    assert fetched_whole(hub) == []
    assert list(desk.iterdir()) == []


def test_encoder_is_refused_before_weights_are_fetched(
    hub: StandInHub,
    repos: dict[str, StandInRepo],
    folders: dict[str, Path],
    tmp_path: Path,
    desk: Path,
) -> None:
    folder = shutil.copytree(folders["llama"], tmp_path / "encoder")
    (folder / "config.json").write_text(json.dumps(llama_config(8) | {"is_encoder_decoder": True}))
    repos["org/encoder"] = one_commit(folder)
    dus("upscale", "org/encoder", "--trim", "1", "-q", "-o", "out").assert_one_line_error(
        "decoder-only language models"
    )
    dus("verify", folders["llama"], "--base", "org/encoder").assert_one_line_error(
        "decoder-only language models"
    )
    assert hub.num_sent("*.safetensors") == 0


def write_pickled_repo(
    folder: Path, num_layers: int, *, num_shards: int = 1, as_zip: bool = True
) -> Path:
    """A repo of before safetensors, with the pickles of a training run beside the weights."""
    write_pickled(
        folder,
        llama_tensors(num_layers),
        llama_config(num_layers),
        num_shards=num_shards,
        as_zip=as_zip,
    )
    for name in ("training_args.bin", "optimizer.pt", "tokenizer.json"):
        (folder / name).write_text(f"a file named {name}")
    return folder


@pytest.mark.parametrize(("num_shards", "as_zip"), [(1, True), (3, True), (1, False)])
def test_pickled_repo_is_planned_from_headers_and_gives_what_its_directory_gives(
    num_shards: int,
    as_zip: bool,
    hub: StandInHub,
    repos: dict[str, StandInRepo],
    tmp_path: Path,
    desk: Path,
) -> None:
    folder = write_pickled_repo(tmp_path / "pickled", 8, num_shards=num_shards, as_zip=as_zip)
    names = {path.name for path in folder.glob("pytorch_model*")}
    repos["org/pickled"] = one_commit(folder)
    command = (
        "upscale",
        "org/pickled",
        "--trim",
        "1",
        "--json",
        "--max-shard-size",
        "200KB",
        "-o",
        "out",
    )
    planned = dus_with_torch(*command, "--dry-run").report
    assert [r.path for r in hub.log if r.path.startswith("/cdn/") and r.byte_range is None] == []
    done = dus_with_torch(*command, "--verify", "full").report
    for field in done.keys() - OF_A_RUN:
        assert planned[field] == done[field], field
    # The pickles of the training run are left alone.
    assert hub.files_asked_for == {"config.json", "tokenizer.json"} | names
    dus_with_torch(
        "upscale", folder, "--trim", "1", "--max-shard-size", "200KB", "-o", "local", "-q"
    )
    for path in (desk / "local").glob("model*"):
        assert path.read_bytes() == (desk / "out" / path.name).read_bytes()
    hub.stop()
    assert dus_with_torch(*command[:-1], "again", HF_HUB_OFFLINE="1").returncode == 0


def test_safetensors_are_fetched_where_a_repo_has_both(
    hub: StandInHub,
    repos: dict[str, StandInRepo],
    folders: dict[str, Path],
    tmp_path: Path,
    desk: Path,
) -> None:
    folder = write_pickled_repo(tmp_path / "both", 8, num_shards=3)
    shutil.copy(folders["single"] / "model.safetensors", folder)
    repos["org/both"] = one_commit(folder)
    assert (
        dus("upscale", "org/both", "--trim", "1", "-o", "out", "--json").report["base_format"]
        == "safetensors"
    )
    assert not any(name.endswith(".bin") for name in hub.files_asked_for)


def test_malicious_pickle_is_refused_before_weights_are_fetched(
    hub: StandInHub, repos: dict[str, StandInRepo], tmp_path: Path, desk: Path
) -> None:
    folder = write_pickled_repo(tmp_path / "malicious", 4)
    torch.save({"lm_head.weight": Payload(desk / "ran")}, folder / "pytorch_model.bin")
    repos["org/malicious"] = one_commit(folder)
    for option in ((), ("--dry-run",)):
        run = dus("upscale", "org/malicious", "--trim", "1", "-q", "-o", "out", *option)
        run.assert_one_line_error("pytorch_model.bin", "posix.system", "none of it was run")
    assert list(desk.iterdir()) == []
    assert [r.path for r in hub.log if r.path.startswith("/cdn/") and r.byte_range is None] == []


def test_repo_without_weights_that_dus_reads_is_told_so(
    repos: dict[str, StandInRepo], folders: dict[str, Path], tmp_path: Path, desk: Path
) -> None:
    ignored = shutil.ignore_patterns("*.safetensors*", "*.bin")
    repos["org/other"] = one_commit(
        shutil.copytree(folders["llama"], tmp_path / "other", ignore=ignored)
    )
    for option in ((), ("--dry-run",)):
        run = dus("upscale", "org/other", "--trim", "1", "-q", "-o", "out", *option)
        run.assert_one_line_error("org/other has neither model.safetensors nor pytorch_model.bin")
    assert list(desk.iterdir()) == []


def test_shard_that_the_hub_lacks_is_named(
    hub: StandInHub,
    repos: dict[str, StandInRepo],
    folders: dict[str, Path],
    tmp_path: Path,
    desk: Path,
) -> None:
    missing = max(SHARDS)
    folder = shutil.copytree(
        folders["llama"], tmp_path / "partial", ignore=shutil.ignore_patterns(missing)
    )
    repos["org/partial"] = one_commit(folder)
    dus("upscale", "org/partial", "--trim", "1", "-q", "-o", "out").assert_one_line_error(
        "org/partial has no", missing
    )
    assert fetched_whole(hub) == []


@pytest.mark.parametrize("size", [4, 20])
def test_damaged_header_on_the_hub_is_refused_before_weights_are_fetched(
    size: int,
    hub: StandInHub,
    repos: dict[str, StandInRepo],
    folders: dict[str, Path],
    tmp_path: Path,
    desk: Path,
) -> None:
    damaged = min(SHARDS)
    folder = shutil.copytree(folders["llama"], tmp_path / "damaged")
    os.truncate(folder / damaged, size)
    repos["org/damaged"] = one_commit(folder)
    dus("upscale", "org/damaged", "--trim", "1", "-q", "-o", "out").assert_one_line_error(damaged)
    assert fetched_whole(hub) == []
    assert list(desk.iterdir()) == []


@pytest.mark.parametrize(
    ("typed", "revision"),
    [
        ("org/llama", None),
        ("org/llama@v0.1", "v0.1"),
        ("hf://org/llama", None),
        ("hf://models/org/llama", None),
        ("hf://org/llama@refs/pr/1", "refs/pr/1"),
        ("hf://org/llama@refs%2Fpr%2F1", "refs/pr/1"),
    ],
)
def test_a_hub_id_is_told_by_its_form(typed: str, revision: str | None) -> None:
    ref = ModelRef.parse(typed)
    assert (ref.path, ref.repo_id, ref.revision, ref.name) == (None, "org/llama", revision, "llama")
    if revision is None:
        assert ModelRef.parse(typed, revision="x+y").revision == "x+y"


def test_an_address_with_a_revision_option_is_resolved_and_written_down(desk: Path) -> None:
    done = dus(
        "upscale", "hf://org/llama", "--revision", "v0.1", "--trim", "1", "-o", "out", "--json"
    ).report
    assert (done["model"], done["commit"]) == ("hf://org/llama", commit_of("earlier"))
    base = json.loads((desk / "out/dus.json").read_text())["base"]
    assert (base["repo_id"], base["revision"], base["commit"]) == (
        "org/llama",
        "v0.1",
        commit_of("earlier"),
    )
    assert f"dus upscale org/llama@{commit_of('earlier')} " in (desk / "out/README.md").read_text()


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (("org/llama@v0.1", "--revision", "main"), "names a revision already"),
        (("./org/llama", "--revision", "main"), "is a directory"),
        (("llama", "--revision", "main"), "is a directory"),
        (("org/llama", "--revision", ""), "cannot be a revision"),
        (("org/llama", "--revision", "../../escape"), "cannot be a revision"),
        (("org/llama", "--token", ""), "--token is empty"),
        (("org/llama", "--token", "hf_sec ret"), "--token is empty or holds characters"),
    ],
)
def test_what_contradicts_itself_is_a_usage_error(
    arguments: tuple[str, ...], part: str, hub: StandInHub
) -> None:
    run = dus("upscale", *arguments, "-o", "out")
    run.assert_one_line_error(part, code=2)
    assert "hf_sec" not in run.stderr
    assert hub.log == []


@pytest.mark.parametrize(
    "text", ["hf://datasets/org/data", "hf://org", "https://huggingface.co/org/llama", ""]
)
def test_an_address_of_something_else_is_a_one_line_error(text: str, hub: StandInHub) -> None:
    dus("upscale", text, "-q", "-o", "out").assert_one_line_error("org/name")
    assert hub.log == []


def test_the_tokens_option_comes_before_the_environment_and_that_before_the_login(
    tmp_path: Path, desk: Path
) -> None:
    command = ("upscale", "org/gated", "--trim", "1", "--dry-run", "-q", "-o", "out")
    (tmp_path / "hf").mkdir()
    (tmp_path / "hf/token").write_text(READER)
    assert dus(*command).returncode == 0
    dus(*command, HF_TOKEN=STRANGER).assert_one_line_error("org/gated is gated")
    assert dus(*command, "--token", READER, HF_TOKEN=STRANGER).returncode == 0
    assert (
        dus("upscale", "org/gated", "--trim", "1", "-q", "-o", "out", "--token", READER).returncode
        == 0
    )
    (tmp_path / "hf/token").unlink()
    shutil.rmtree(tmp_path / "hf/hub")
    dus("verify", "out", "--base", "org/gated").assert_one_line_error("org/gated is gated")
    assert dus("verify", "out", "--base", "org/gated", "--token", READER).returncode == 0


def test_a_token_is_nowhere_in_what_is_said_or_written(hub: StandInHub, desk: Path) -> None:
    done = dus("upscale", "org/gated", "--trim", "1", "-o", "out", "--json", "--token", READER)
    said = (
        done.stdout
        + done.stderr
        + "".join(path.read_text("latin-1") for path in (desk / "out").rglob("*.*"))
    )
    hub.failures["GET /api/models/*"] = 500
    for options in (("--token", READER), ("--token", STRANGER), ("--token", "hf_unknown")):
        command = ("upscale", "org/private", "--trim", "1", "-o", "other")
        run = dus(*command, *options, first=AT_ONCE, DUS_DEBUG="1", HF_DEBUG="0")
        assert "Traceback" in run.stderr
        said += run.stderr
    said += repr(ModelRef.parse("org/private", token=READER))
    assert not any(token in said for token in (READER, STRANGER, "hf_unknown"))


def test_a_damaged_token_of_the_environment_is_told_without_it(hub: StandInHub, desk: Path) -> None:
    run = dus("upscale", "org/llama", "--trim", "1", "-o", "out", HF_TOKEN="hf_\x01damaged")
    run.assert_one_line_error("the Hub's token has characters")
    assert "damaged" not in run.stderr
    assert hub.log == []


@pytest.mark.parametrize("name", ["HF_HUB_CACHE", "HF_HOME"])
def test_the_cache_is_where_the_environment_says(name: str, tmp_path: Path, desk: Path) -> None:
    place = tmp_path / "elsewhere"
    environment: dict[str, Any] = {name: str(place)}
    assert (
        dus("upscale", "org/single", "--trim", "1", "-o", "out", "-q", **environment).returncode
        == 0
    )
    cache = place if name == "HF_HUB_CACHE" else place / "hub"
    assert [path.name for path in cache.glob("models--*")] == ["models--org--single"]
    assert (tmp_path / "hf/hub").exists() is False


@pytest.mark.parametrize("disabled", ["0", "1"])
def test_on_a_terminal_bars_and_colours_are_as_the_environment_says(
    disabled: str, desk: Path
) -> None:
    settings = {"HF_HUB_DISABLE_PROGRESS_BARS": disabled, "TERM": "xterm-256color"} | (
        {"NO_COLOR": "1"} if disabled == "1" else {}
    )
    terminal, theirs = os.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    command = [*DUS, "upscale", "org/single", "--trim", "1", "-o", "out"]
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=theirs, env={**os.environ, **settings}
    ) as process:
        os.close(theirs)
        said = b""
        with contextlib.suppress(OSError):  # how the end of a terminal reads
            while piece := os.read(terminal, 4096):
                said += piece
        os.close(terminal)
    assert process.returncode == 0, said
    assert (b"Fetching" in said) is (disabled == "0")
    assert (re.search(rb"\x1b\[[\d;]*3[0-8]", said) is not None) is (disabled == "0")


def test_a_full_disk_of_the_cache_is_one_line_and_the_next_run_goes_on(
    tmp_path: Path, desk: Path
) -> None:
    cache = tmp_path / "cache"
    cache.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", cache], check=False
    ).returncode:
        pytest.skip("mounting needs root")
    try:  # 17 MB of weights
        command = ("upscale", "org/wide", "--trim", "1", "-o", "out", "-q")
        dus(*command, HF_HOME=str(cache)).assert_one_line_error(
            "the disk of the Hub's cache is full", "HF_HOME"
        )
        assert list(desk.iterdir()) == []
        assert dus(*command, "--stream", HF_HOME=str(cache)).returncode == 0
    finally:
        subprocess.run(["umount", cache], check=True)


def test_a_server_that_never_answers_is_given_up(desk: Path) -> None:
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        endpoint = f"http://127.0.0.1:{silent.getsockname()[1]}"
        run = dus(
            "upscale", "org/llama", "-o", "out", HF_ENDPOINT=endpoint, HF_HUB_ETAG_TIMEOUT="1"
        )
    run.assert_one_line_error(
        "org/llama is not (wholly) in the cache: nothing of it", "the Hub cannot be reached"
    )


@pytest.mark.parametrize("status", [503, 429])
def test_the_clients_own_back_off_ends_in_one_line_that_says_how_long(
    status: int, hub: StandInHub, desk: Path
) -> None:
    """The list of files is asked for with back-off by huggingface_hub, and that five times by
    dus.
    """
    hub.failures["GET /api/models/*/tree/*"] = status
    first = "import time, dus_cli.hub.remote as r; real = time.monotonic; waited = []\n"
    first += "time.sleep = waited.append; r.FIRST_WAIT = 0\n"
    first += (
        "time.monotonic = lambda: real() + sum(waited)\nimport atexit; atexit.register(lambda: "
        "print(waited))"
    )
    run = dus("upscale", "org/llama", "-o", "out", first=first)
    assert json.loads(run.stdout) == [1, 2, 4, 8, 8] * 5
    assert (
        run.stderr
        == f"error: the Hub answered {status} for org/llama (tried for 115 s); try again later\n"
    )


def test_a_hub_that_is_busy_for_a_moment_is_asked_again(hub: StandInHub, desk: Path) -> None:
    """For the commit, which huggingface_hub asks for once."""
    hub.busy = [503, 429, 502]
    assert (
        dus("upscale", "org/single", "--trim", "1", "-o", "out", "-q", first=AT_ONCE).returncode
        == 0
    )
    assert hub.busy == []


def test_hub_id_means_the_hub_where_a_directory_has_that_name(desk: Path) -> None:
    write_checkpoint(desk / "org" / "llama", llama_tensors(4), llama_config(4))
    report = dus("upscale", "org/llama", "--trim", "1", "-o", "out", "--json").report
    assert (report["commit"], report["num_layers"]["base"]) == (commit_of("llama"), 8)
    report = dus("upscale", "./org/llama", "--trim", "1", "-o", "other", "--json").report
    assert (report["commit"], report["num_layers"]["base"]) == (None, 4)


@pytest.mark.parametrize("environment", [{}, {"HF_HUB_OFFLINE": "1"}], ids=["online", "offline"])
def test_missing_hub_model_with_a_directory_of_its_name_tells_how_to_write_it(
    environment: dict[str, str], desk: Path
) -> None:
    (desk / "org" / "none").mkdir(parents=True)
    dus("upscale", "org/none", "-q", "-o", "out", cwd=desk, **environment).assert_one_line_error(
        "write ./org/none"
    )


@pytest.mark.parametrize("stream", [False, True])
def test_one_file_of_a_repo_is_read_before_its_index(
    stream: bool, hub: StandInHub, repos: dict[str, StandInRepo], tmp_path: Path, desk: Path
) -> None:
    """As transformers does; the index's shards are not even fetched."""
    folder = write_repo(tmp_path / "both", 8)
    single = write_repo(tmp_path / "one", 6, num_shards=1)
    shutil.copyfile(single / "model.safetensors", folder / "model.safetensors")
    shutil.copyfile(single / "config.json", folder / "config.json")
    repos["org/both"] = one_commit(folder)
    command = (
        "upscale",
        "org/both",
        "--trim",
        "1",
        "-o",
        "out",
        "--json",
        *(["--stream"] if stream else []),
    )
    report = dus(*command).report
    assert report["base_weights"]["read"] == ["model.safetensors"]
    assert set(report["base_weights"]["not_read"]) >= SHARDS | {
        INDEX,
        "pytorch_model.bin",
        "original/consolidated.00.pth",
    }
    assert report["num_layers"] == {"base": 6, "output": 10}
    assert not hub.files_asked_for & SHARDS
