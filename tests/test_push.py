"""Releases on the Hub: the real command against a stand-in that takes uploads (hub_uploads)."""

from __future__ import annotations

import hashlib
import json
import os
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from conftest import DUS
from forked import dus
from hub_server import HANG_UP, READER, StandInRepo, commit_of
from hub_uploads import WRITER, WritableHub
from tiny import digests

from dus_cli.common.reference import ModelRef
from dus_cli.planning.plan import MapRequest
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.request import UpscaleRequest
from dus_cli.upscaling.verb import upscale

# Retries without their waits: huggingface_hub's back-off takes half a minute.
NO_WAIT = "import time; time.sleep = lambda _: None"


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Releases that tests only read: a scaled model of five shards, the same in one file, and a
    base for a repo.
    """
    root = tmp_path_factory.mktemp("releases")
    base = write_checkpoint(
        root / "base", llama_tensors(8), llama_config(8), num_shards=2, fill=fill_randomly
    )
    (base / "tokenizer.json").write_text("{}")
    (base / "README.md").write_text("---\nlicense: mit\nlanguage: [no]\n---\n")
    ref = ModelRef(str(base), path=base)
    upscale(
        UpscaleRequest(ref, MapRequest(2), max_shard_bytes=250_000),
        root / "out",
        UpscaleOptions(checksums=True),
    )
    upscale(UpscaleRequest(ref, MapRequest(1)), root / "single")
    return {"base": base, "out": root / "out", "single": root / "single"}


@pytest.fixture
def out(folders: dict[str, Path]) -> Path:
    return folders["out"]


@pytest.fixture(autouse=True)
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WritableHub]:
    """The only Hub that dus can see, with a writer logged in."""
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    for name, value in {
        "HF_HOME": str(tmp_path / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_XET": "1",
        "HF_TOKEN": WRITER,
    }.items():
        monkeypatch.setenv(name, value)
    with WritableHub({}) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


def content(folder: Path) -> dict[str, bytes]:
    return {
        p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*") if p.is_file()
    }


def shard_sums(folder: Path) -> set[str]:
    return {hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.glob("*.safetensors")}


def test_a_push_makes_the_repo_and_holds_every_file_against_it(out: Path, hub: WritableHub) -> None:
    before = digests(out)
    pushed = dus("push", out, "org/model", "--json").report["push"]
    assert hub.files("org/model") == content(out)
    assert digests(out) == before  # nothing of the client's own stays behind, nor goes along
    assert pushed["commit"] == hub.repos["org/model"].revisions["main"]
    assert (pushed["repo_id"], pushed["branch"], pushed["url"]) == (
        "org/model",
        "main",
        f"{hub.endpoint}/org/model",
    )
    assert (pushed["status"], pushed["private"], pushed["compared"]) == ("pushed", False, True)
    assert pushed["files"] == pushed["uploaded"] == len(before)
    assert not hub.repos["org/model"].private
    layout = (Path(__file__).parent.parent / "docs/layout.md").read_text()
    assert [field for field in pushed if f"`{field}`" not in layout] == []


def test_the_same_push_again_sends_nothing(out: Path, hub: WritableHub) -> None:
    first = dus("push", out, "org/model", "--json").report["push"]
    count = len(hub.put)
    hub.log.clear()
    again = dus("push", out, "org/model", "--json").report["push"]
    assert (again["status"], again["uploaded"], again["commit"]) == (
        "unchanged",
        0,
        first["commit"],
    )
    assert len(hub.put) == count
    assert not [request for request in hub.log if request.method != "GET"]
    assert sum("/tree/" in request.path for request in hub.log) == 2  # before, and the proof


def test_a_changed_card_alone_is_one_small_commit(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    upscale(UpscaleRequest(ModelRef("b", path=folders["base"]), MapRequest(2)), out)
    assert dus("push", out, "org/model", "-q").returncode == 0
    (out / "README.md").write_text((out / "README.md").read_text() + "\nMine.\n")
    count = len(hub.put)
    assert dus("push", out, "org/model", "--json").report["push"]["uploaded"] == 1
    assert len(hub.put) == count
    assert hub.files("org/model") == content(out)


def test_upscale_pushes_what_it_verified_and_says_where(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    command = (
        "upscale",
        folders["base"],
        "--trim",
        "2",
        "-o",
        tmp_path / "out",
        "--push-to",
        "org/model",
    )
    plan = dus(*command, "--private", "--checksums", "--dry-run", "--json").report["push"]
    assert (plan["status"], plan["exists"], plan["private"], plan["can_write"]) == (
        "planned",
        False,
        True,
        True,
    )
    assert hub.repos == {}
    report = dus(*command, "--private", "--checksums", "--json").report
    assert report["status"] == "written"
    pushed = report["push"]
    assert (pushed["files"], pushed["bytes"]) == (plan["files"], plan["bytes"])
    assert pushed["commit"] == hub.repos["org/model"].revisions["main"]
    assert hub.repos["org/model"].private
    assert hub.files("org/model") == content(tmp_path / "out")
    again = dus(*command, "--private", "--checksums", "--json").report
    assert (again["status"], again["push"]["status"]) == ("unchanged", "unchanged")
    dus(*command, "--verify", "none").assert_one_line_error("--verify none", code=2)
    dus(*command[:-2], "--private").assert_one_line_error("--push-to", code=2)


def test_a_finished_output_goes_on_to_the_push_that_failed(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    command = (
        "upscale",
        folders["base"],
        "--trim",
        "2",
        "-o",
        tmp_path / "out",
        "--push-to",
        "org/model",
        "--json",
    )
    hub.failures["POST /*/batch whole"] = 503
    dus(*command, first=NO_WAIT).assert_one_line_error("503", "it continues")
    assert hub.files("org/model") == {}
    hub.failures.clear()
    report = dus(*command).report
    assert (report["status"], report["push"]["status"]) == ("unchanged", "pushed")
    assert hub.files("org/model") == content(tmp_path / "out")


def test_a_branch_is_made_from_main_and_main_stays(
    folders: dict[str, Path], hub: WritableHub
) -> None:
    main = dus("push", folders["single"], "org/model", "--json").report["push"]["commit"]
    pushed = dus("push", folders["out"], "org/model", "--branch", "v0.2", "--json").report["push"]
    assert hub.repos["org/model"].revisions == {"main": main, "v0.2": pushed["commit"]}
    assert pushed["url"].endswith("/org/model/tree/v0.2")
    assert hub.files("org/model", "v0.2") == content(folders["out"])
    count = len(hub.log)
    same = dus("push", folders["single"], "org/model", "--branch", "copy", "--json").report["push"]
    assert (same["status"], same["commit"], same["uploaded"]) == ("pushed", main, 0)
    assert [request.path for request in hub.log[count:] if request.method == "POST"] == [
        "/api/models/org/model/branch/copy"
    ]


def test_files_of_an_earlier_model_go_and_others_stay(
    folders: dict[str, Path], hub: WritableHub
) -> None:
    """Transformers would load the old model.safetensers rather than the new index."""
    dus("push", folders["single"], "org/model", "-q")
    folder = hub.new_folder(
        like=hub.repos["org/model"].commits[hub.repos["org/model"].revisions["main"]]
    )
    (folder / "notes.md").write_text("mine")
    (folder / "report.json").write_text("{}")
    (folder / "model-Q4.gguf").write_text("converted")
    hub.commit("org/model", "main", folder)
    pushed = dus("push", folders["out"], "org/model", "--json").report["push"]
    assert pushed["removed"] == ["model.safetensors", "report.json"]
    others = {"notes.md": b"mine", "model-Q4.gguf": b"converted"}
    assert hub.files("org/model") == content(folders["out"]) | others


def test_large_objects_go_in_parts(out: Path, hub: WritableHub) -> None:
    hub.part_size = 40_000
    assert dus("push", out, "org/model", "-q").returncode == 0
    assert hub.files("org/model") == content(out)


def test_a_connection_that_breaks_is_resumed_without_sending_an_object_twice(
    out: Path, hub: WritableHub
) -> None:
    hub.uploads_left = 2
    dus("push", out, "org/model", "-q", first=NO_WAIT).assert_one_line_error(
        "connection", "it continues"
    )
    sent = list(hub.put)
    assert 2 <= len(sent) < len(shard_sums(out))
    assert hub.files("org/model") == {}
    hub.uploads_left = None
    assert dus("push", out, "org/model", "--json").report["push"]["status"] == "pushed"
    assert sorted(hub.put) == sorted(shard_sums(out))  # each once
    assert hub.files("org/model") == content(out)


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_push_that_is_ended_goes_on(signum: int, out: Path, hub: WritableHub) -> None:
    hub.gate.clear()  # objects arrive and no answer comes
    process = subprocess.Popen(
        [*DUS, "push", str(out), "org/model", "-q"], stderr=subprocess.PIPE, text=True
    )
    assert hub.arrived.wait(60)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)  # at once: no answer of the Hub's is waited for
    if signum != signal.SIGKILL:
        assert process.returncode == 128 + signum
        assert said.startswith("error: ended by SIG")
        assert "the same command continues" in said
        assert said.count("\n") == 1
    hub.gate.set()
    assert hub.files("org/model") == {}
    before = digests(out)
    assert dus("push", out, "org/model", "--json").report["push"]["status"] == "pushed"
    assert digests(out) == before
    assert hub.files("org/model") == content(out)


def spoil(folder: Path, **texts: str | None) -> None:
    """Other contents of JSON files; None removes one."""
    for name, text in texts.items():
        path = folder / f"{name}.json"
        path.write_text(text) if text is not None else path.unlink()


def link(path: Path, target: Path) -> None:
    """In the place of a file, a link to another."""
    path.unlink()
    path.symlink_to(target)


UNSOUND: dict[str, tuple[Callable[[Path], object], str]] = {
    "a shard is gone": (lambda o: min(o.glob("*.safetensors")).unlink(), "does not verify"),
    "a shard is cut": (
        lambda o: os.truncate(min(o.glob("*.safetensors")), 50_000),
        "does not verify",
    ),
    "a byte is another": (lambda o: spoil(o, tokenizer="[]"), "does not match its sum"),
    "no config": (lambda o: spoil(o, config=None), "does not verify"),
    "a run of dus heal": (lambda o: spoil(o, config=None, run="{}"), "unfinished run of dus heal"),
    "a link to elsewhere": (
        lambda o: link(o / "tokenizer.json", Path("/etc/hostname")),
        "leaves the model's folder",
    ),
}


@pytest.mark.parametrize("what", UNSOUND)
def test_what_does_not_verify_is_not_pushed(
    what: str, folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    ref = ModelRef("b", path=folders["base"])
    upscale(
        UpscaleRequest(ref, MapRequest(2), max_shard_bytes=250_000),
        out,
        UpscaleOptions(checksums=True),
    )
    change, message = UNSOUND[what]
    change(out)
    dus("push", out, "org/model", "-q").assert_one_line_error(message)
    assert hub.repos == {}


@pytest.mark.parametrize(
    "is_named", [True, False], ids=["dus.json names it", "an older dus.json names no files"]
)
def test_a_healed_model_goes_with_its_proof(
    is_named: bool, folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    out = tmp_path / "healed"
    upscale(UpscaleRequest(ModelRef("b", path=folders["base"]), MapRequest(2)), out)
    proof = (
        "run.json",
        "report.json",
        "metrics.jsonl",
        "healing-light.svg",
        "tensorboard/events.out.tfevents.1.host.2",
    )
    for name in proof:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("{}")
    record = json.loads((out / "dus.json").read_text()) | {"healing": [{"steps": 1}]}
    record["files"] = [*record["files"], *proof]
    if not is_named:
        del record["files"]
    spoil(out, dus=json.dumps(record))
    expected = content(out)
    # of the run, and before it
    for name in ("checkpoints/step-00000001/state.json", "logs/0.log", "README.md.before"):
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("{}")
    assert dus("push", out, "org/healed", "-q").returncode == 0
    assert hub.files("org/healed") == expected


def test_what_is_no_directory_is_refused(tmp_path: Path, hub: WritableHub) -> None:
    dus("push", tmp_path / "nowhere", "org/model").assert_one_line_error("not a directory")
    dus("push", tmp_path, "org/model").assert_one_line_error("no config.json")
    assert hub.repos == {}


def test_what_is_not_the_models_stays_here_and_is_named(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    upscale(UpscaleRequest(ModelRef("b", path=folders["base"]), MapRequest(2)), out)
    expected = content(out)
    strangers = (
        ".cache/huggingface/download/x.metadata", ".env", ".git/config", ".gitignore", "__pycache__/x", "a [note].txt",
        "checkpoint-500/model.safetensors", "id_rsa", "wandb/run/a.log",
    )  # fmt: skip
    for name in strangers:
        (out / name).parent.mkdir(parents=True, exist_ok=True)
        (out / name).write_text("*" if name == ".gitignore" else "x")
    (out / "notes").symlink_to("/etc/hostname")
    before = digests(out)
    left = {
        ".cache/", ".env", ".git/", ".gitignore", "__pycache__/", "a [note].txt", "checkpoint-500/", "id_rsa", "wandb/",
        "notes",
    }  # fmt: skip
    planned = dus("push", out, "org/model", "--dry-run", "--json").report["push"]
    done = dus("push", out, "org/model", "--json").report["push"]
    assert hub.files("org/model") == expected
    assert (set(planned["left_out"]), planned["files"]) == (left, len(expected))
    assert (set(done["left_out"]), done["files"]) == (left, len(expected))
    assert digests(out) == before
    assert "not pushed, not dus's: .cache/, .env, " in dus("push", out, "org/model").stdout


@pytest.mark.parametrize(
    ("arguments", "environment", "parts"),
    [
        (("org/model",), {"HF_TOKEN": ""}, ("no token", "--token")),
        (("org/model", "--token", "hf_nobody"), {}, ("does not know this token",)),
        (("org/model", "--token", READER), {}, ("may not write to org/model",)),
        (("elsewhere/model",), {}, ("may not write to elsewhere/model", "organisation")),
        (("readonly/model",), {}, ("may not write to readonly/model",)),
        (("org/theirs", "--token", READER), {}, ("may not write to org/theirs",)),
        (("org/public", "--private"), {}, ("exists and is public",)),
        (("org/model",), {"HF_HUB_OFFLINE": "1"}, ("HF_HUB_OFFLINE",)),
        (
            ("org/model",),
            {"HF_ENDPOINT": "http://127.0.0.1:1"},
            ("connection to the Hub failed", "HF_ENDPOINT"),
        ),
    ],
)
def test_what_is_in_the_way_is_said_before_anything_is_read_or_sent(
    arguments: tuple[str, ...],
    environment: dict[str, str],
    parts: tuple[str, ...],
    out: Path,
    hub: WritableHub,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    hub.create("org/public")
    hub.create("org/theirs")
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    dus("push", out, *arguments, first=NO_WAIT).assert_one_line_error(*parts)
    assert set(hub.repos) == {"org/public", "org/theirs"}
    assert not [request for request in hub.log if request.method != "GET"]


def test_upscale_asks_before_it_writes(folders: dict[str, Path], tmp_path: Path) -> None:
    command = (
        "upscale",
        folders["base"],
        "-o",
        tmp_path / "out",
        "--push-to",
        "org/model",
        "--token",
        READER,
    )
    dus(*command).assert_one_line_error("may not write")
    dus(*command, "--dry-run").assert_one_line_error("may not write")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "repo",
    ["model", "./org/model", "org/a--b", "org/model.git", "org/model.", "a/b/c", "org/" + "x" * 96],
)
def test_an_id_that_no_repo_can_have_is_a_usage_error(repo: str, out: Path) -> None:
    dus("push", out, repo).assert_one_line_error("is not a valid id of a repo", code=2)


def test_a_branch_that_git_does_not_allow_is_a_usage_error(out: Path) -> None:
    dus("push", out, "org/model", "--branch", "a b").assert_one_line_error("a branch", code=2)
    dus("push", out, "org/model@dev", "--branch", "main").assert_one_line_error("--branch", code=2)


@pytest.mark.parametrize(
    ("request_pattern", "status", "parts"),
    [
        ("GET /api/whoami-v2 *", 500, ("500", "it continues")),
        ("POST /api/repos/create *", 403, ("may not write to org/model",)),
        ("POST /api/repos/create *", 404, ("owner is not on the Hub",)),
        ("POST */preupload/* *", 503, ("503", "it continues")),
        ("PUT /lfs/* *", 500, ("500", "it continues")),
        ("POST */commit/* *", 500, ("500", "it continues")),
        ("POST */commit/* *", HANG_UP, ("connection to the Hub failed",)),
    ],
)
def test_each_refusal_of_the_hub_is_one_line(
    request_pattern: str, status: int, parts: tuple[str, ...], out: Path, hub: WritableHub
) -> None:
    hub.failures[request_pattern] = status
    dus("push", out, "org/model", "-q", first=NO_WAIT).assert_one_line_error(*parts)
    assert "org/model" not in hub.repos or hub.files("org/model") == {}


def test_what_the_hub_refuses_for_a_moment_is_tried_again(out: Path, hub: WritableHub) -> None:
    hub.refusals.update(
        {"GET /api/models/org/model *": 1, "POST /api/repos/create *": 1, "POST */commit/* *": 2}
    )
    hub.failures["GET /api/whoami-v2 *"] = 429  # asked too often by others: it is not needed
    assert (
        dus("push", out, "org/model", "--json", first=NO_WAIT).report["push"]["status"] == "pushed"
    )
    assert hub.refusals == {
        "GET /api/models/org/model *": 0,
        "POST /api/repos/create *": 0,
        "POST */commit/* *": 0,
    }
    assert hub.files("org/model") == content(out)


def test_a_card_that_the_hub_refuses_is_told(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    upscale(UpscaleRequest(ModelRef("b", path=folders["base"]), MapRequest(2)), out)
    (out / "README.md").write_text("---\nlicense: [mit\n---\n")
    dus("push", out, "org/model", "-q").assert_one_line_error("README.md", "metadata")
    assert hub.files("org/model") == {}


def test_a_hub_that_holds_something_else_afterwards_is_told(out: Path, hub: WritableHub) -> None:
    hub.corrupts = "tokenizer.json"
    dus("push", out, "org/model", "-q").assert_one_line_error("holds other bytes of tokenizer.json")


def test_a_folder_that_changes_while_it_is_pushed_is_told(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    upscale(UpscaleRequest(ModelRef("b", path=folders["base"]), MapRequest(2)), out)
    change = f"""
import time; time.sleep = lambda _: None
from dus_cli.push import verb
upload = verb.Push._upload
def changed(self):
    with open({str(out / "config.json")!r}, "a") as file: file.write(" ")
    return upload(self)
verb.Push._upload = changed
"""
    dus("push", out, "org/model", "-q", first=change).assert_one_line_error(
        "config.json changed during the push"
    )


def test_a_file_too_large_for_the_hub_is_refused_with_the_cure(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    upscale(UpscaleRequest(ModelRef("b", path=folders["base"]), MapRequest(2)), out)
    os.truncate(out / "tokenizer.json", 50_000_000_001)  # a hole
    dus("push", out, "org/model").assert_one_line_error("50.00 GB", "--max-shard-size")
    assert hub.repos == {}


def test_without_quiet_a_log_gets_lines_and_stdout_the_result(out: Path, hub: WritableHub) -> None:
    done = dus("push", out, "org/model")
    assert done.returncode == 0
    assert "\r" not in done.stderr + done.stdout
    assert "\x1b" not in done.stderr + done.stdout
    assert [line.split()[0] for line in done.stderr.splitlines()] == ["summing", "uploading"]
    assert done.stdout.startswith(f"{hub.endpoint}/org/model holds ")
    assert done.stdout.count("\n") == 1
    again = dus("push", out, "org/model")
    assert [line.split()[0] for line in again.stderr.splitlines()] == ["summing"]
    assert "already holds these" in again.stdout
    dry = dus("push", out, "org/model", "--dry-run")
    assert "the repo exists" in dry.stdout


def test_a_base_that_was_pushed_is_remade_from_its_commit_when_main_has_moved_on(
    folders: dict[str, Path], hub: WritableHub, tmp_path: Path
) -> None:
    """The whole round: a base from the Hub, a release, another commit of the base, the release
    again.
    """
    first, second = commit_of("first"), commit_of("second")
    moved = hub.new_folder(like=folders["base"])
    (moved / "config.json").write_text(json.dumps(llama_config(8)))
    hub.repos["org/base"] = StandInRepo({first: folders["base"], second: moved}, {"main": first})
    done = dus(
        "upscale", "org/base", "--trim", "2", "-o", tmp_path / "out", "--checksums", "--json"
    ).report
    assert done["commit"] == first
    hub.repos["org/base"] = StandInRepo({first: folders["base"], second: moved}, {"main": second})
    report = dus("upscale", "--from", tmp_path / "out", "-o", tmp_path / "again", "--json").report
    assert (report["reproduced"], report["commit"]) == (True, first)
    assert digests(tmp_path / "again") == digests(tmp_path / "out")
    streamed = dus(
        "upscale", "--from", tmp_path / "out", "-o", tmp_path / "streamed", "--stream", "--json"
    ).report
    assert (streamed["reproduced"], digests(tmp_path / "streamed")) == (
        True,
        digests(tmp_path / "out"),
    )
    moved_again = dus("upscale", "org/base", "--from", tmp_path / "out", "-o", tmp_path / "third")
    moved_again.assert_one_line_error("is not the base that", "another config.json")
    card = (tmp_path / "out/README.md").read_text()
    assert 'base_model: "org/base"\nbase_model_relation: merge\n' in card
