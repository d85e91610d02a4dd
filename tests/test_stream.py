"""--stream: weights from the Hub straight into the output. The real command against a stand-in
(hub_server).
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint, write_mistral
from forked import dus, stop
from hub_server import READER, StandInHub, StandInRepo, commit_of, only_hub
from pickled import write_pickled

from dus_cli.hub.streaming import pieces
from dus_cli.planning.dtypes import Cast
from dus_cli.writing.journal import Journal, belongs
from dus_cli.writing.moves import Move

SHARDS = [f"model-0000{number}-of-00003.safetensors" for number in (1, 2, 3)]
COMMAND = ("upscale", "org/model", "--trim", "1", "-o", "out", "--stream", "--json")

# Requests of 256 KiB and no waits between two of them, so that a small model takes many and a fault
# costs no time.
SMALL = (
    "import dus_cli.hub.streaming as s, dus_cli.hub.remote as r; "
    "s.REQUEST = 1 << 18; s.SYNC_EVERY = 0.05; r.FIRST_WAIT = 0"
)

# What the Hub may send beyond the weights: each shard's header, and 100 kB to find it.
HEADERS = 3 * 120_000


@pytest.fixture(scope="module", autouse=True)
def _fork_server() -> Iterator[None]:
    yield
    stop()


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eleven megabytes in three shards. It is only read."""
    tensors, config = llama_tensors(8, 256, 512, 64, 1024), llama_config(8, 256, 512, 1024)
    return write_checkpoint(
        tmp_path_factory.mktemp("repo") / "model", tensors, config, num_shards=3, fill=fill_randomly
    )


@pytest.fixture(scope="module")
def total(folder: Path) -> int:
    return sum((folder / name).stat().st_size for name in SHARDS)


@pytest.fixture
def repos(folder: Path) -> dict[str, StandInRepo]:
    repo = StandInRepo({commit_of("model"): folder}, {"main": commit_of("model")})
    return {
        "org/model": repo,
        "org/gated": replace(repo, gated=True),
        "org/small": replace(repo, lfs=False, gated=True),
    }


@pytest.fixture(autouse=True)
def hub(
    repos: dict[str, StandInRepo], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInHub]:
    desk = tmp_path / "desk"
    desk.mkdir()
    monkeypatch.chdir(desk)
    with only_hub(repos, tmp_path / "hf", monkeypatch) as running:
        yield running


def weights(out: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in out.glob("model*")}


def cached(tmp_path: Path) -> int:
    """Bytes in the Hub's cache."""
    return sum(path.lstat().st_size for path in (tmp_path / "hf").rglob("*"))


def start(*options: str, first: str = SMALL) -> subprocess.Popen[str]:
    """The command as a process of its own, to be killed."""
    code = (
        f"{first}\nimport sys; sys.argv = {['dus', *COMMAND, *options]!r}\nfrom dus_cli.cli "
        "import main; main()"
    )
    return subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.mark.parametrize(
    "options",
    [
        ("--jobs", "1"),
        ("--jobs", "8", "--max-shard-size", "2MB", "--checksums"),
        ("--identity",),
        ("--start", "fade", "--jobs", "3"),
        ("--start", "scale:0.3", "--dtype", "float32"),
        ("--dtype", "float32"),
        ("--layers", "0:3,5:8"),
    ],
    ids=" ".join,
)
def test_a_streamed_output_is_the_one_that_the_directory_gives(
    options: tuple[str, ...], folder: Path, total: int, hub: StandInHub, tmp_path: Path
) -> None:
    trim = () if "--layers" in options else ("--trim", "1")
    command = (
        "upscale",
        "org/model",
        *trim,
        *options,
        "--stream",
        "--verify",
        "full",
        "--json",
        "-o",
        "out",
    )
    done = dus(*command, first=SMALL).report
    assert dus("upscale", folder, *trim, *options, "-o", "local", "-q").returncode == 0
    assert weights(Path("out")) == weights(Path("local"))
    whole = [name for name in SHARDS if name not in done["streamed"]["unchecked"]]
    assert done["streamed"]["checked"] == whole
    assert whole == SHARDS if trim else 0 < len(whole) < 3
    assert (
        done["streamed"]["fetched"] <= hub.num_served <= 2 * HEADERS + done["streamed"]["fetched"]
    )
    assert (
        done["streamed"]["fetched"] == total if trim else done["streamed"]["fetched"] < total * 0.8
    )
    assert cached(tmp_path) < 100_000
    assert [path.name for path in Path().iterdir() if path.name.startswith(".")] == []
    assert not list(Path("out").glob(".*"))
    assert dus(*command).report["status"] == "unchanged"


def test_connections_that_break_go_on_from_where_they_broke(total: int, hub: StandInHub) -> None:
    hub.faults.broken_after = 200_000
    done = dus(*COMMAND, first=SMALL).report
    assert done["streamed"]["checked"] == SHARDS
    assert total <= hub.num_served <= total + HEADERS


def test_an_address_whose_signature_expired_is_asked_for_again(hub: StandInHub) -> None:
    hub.faults.signed_for = 5
    assert dus(*COMMAND, first=SMALL).report["streamed"]["checked"] == SHARDS
    assert len(hub.faults.signatures) > 8


def waits_of(command: tuple[str, ...]) -> tuple[list[float], str]:
    """How long a command waited for another try, each time, and what it said in the end. It took
    no time.
    """
    first = (
        "import dus_cli.hub.remote as r, time, json, atexit\nwaited, real = [], time.monotonic\n"
    )
    first += "r.pause = lambda seconds, stop: waited.append(seconds)\n"
    first += "time.monotonic = lambda: real() + sum(waited)\n"
    first += "atexit.register(lambda: print('\\n' + json.dumps(waited)))"
    run = dus(*command, "--jobs", "1", first=first)
    return json.loads(run.stdout.splitlines()[-1]), run.stderr


def test_a_busy_server_is_asked_again_after_as_long_as_it_says(hub: StandInHub) -> None:
    hub.faults.busy, hub.faults.retry_after = [429, 503], "7"
    assert waits_of(COMMAND) == ([7.0, 7.0], "")
    assert Path("out").is_dir()


def test_a_server_in_trouble_is_given_up_in_one_line_that_says_how_long(hub: StandInHub) -> None:
    hub.faults.busy = [503] * 1000
    waits, said = waits_of(COMMAND)
    assert len(waits) == 7 * 3  # of each header, read at once
    assert all(min(60, 2**k) / 2 <= seconds <= 2**k for k, seconds in enumerate(sorted(waits)[::3]))
    assert said.startswith("error: the Hub answered 503 for org/model (tried for ")
    hub.faults.busy, hub.faults.retry_after = [429] * 1000, "7000"
    waits, said = waits_of(COMMAND)
    assert waits == []
    assert said.startswith("error: the Hub answered 429 for org/model")


def test_a_bit_lost_on_the_way_is_noticed_and_that_file_alone_fetched_again(
    folder: Path, total: int, hub: StandInHub
) -> None:
    hub.faults.flipped = {SHARDS[1]: 1_000_000}
    run = dus(*COMMAND, first=SMALL)
    run.assert_one_line_error(
        SHARDS[1], "another sha256 than the Hub gives", "the same command continues"
    )
    assert not Path("out").exists()
    hub.faults.flipped = {}
    done = dus(*COMMAND, first=SMALL).report["streamed"]
    assert done["checked"] == SHARDS
    first, second, third = ((folder / name).stat().st_size for name in SHARDS)
    assert done["fetched"] - second - third < 20_000  # and the first one's header, for its sum
    assert done["fetched"] + done["resumed"] == total
    assert first - done["resumed"] < 20_000


def test_kill_9_loses_what_came_in_the_last_moment_only(
    folder: Path, total: int, hub: StandInHub
) -> None:
    hub.faults.bytes_per_second = 4e6
    process = start()
    while hub.num_served < total / 2:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.kill()
    process.communicate()
    assert not Path("out").exists()
    hub.faults.bytes_per_second, served, hub.num_served = None, hub.num_served, 0
    done = dus(*COMMAND, "--verify", "full", first=SMALL).report["streamed"]
    assert done["checked"] == SHARDS
    assert done["fetched"] + done["resumed"] == total
    # Half a second of it, a request for each job, and the headers.
    assert served + hub.num_served < total + 2e6 + 4 * (1 << 18) + 2 * HEADERS
    assert dus("verify", "out", "--base", folder, "-q").returncode == 0


@pytest.mark.parametrize(("signum", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=str)
def test_a_signal_keeps_all_that_was_written_and_says_so(
    signum: int, code: int, total: int, hub: StandInHub
) -> None:
    hub.faults.bytes_per_second = 4e6
    process = start("--overwrite")
    while hub.num_served < total / 2:
        time.sleep(0.01)
        assert process.poll() is None, process.communicate()
    process.send_signal(signum)
    stdout, stderr = process.communicate()
    assert (process.returncode, stdout) == (code, "")
    assert stderr.count("\n") == 1
    assert (
        f"ended by {signal.Signals(signum).name}; what was fetched is kept, and the same command "
        "continues" in stderr
    )
    hub.faults.bytes_per_second, served, hub.num_served = None, hub.num_served, 0
    done = dus(*COMMAND, "--overwrite", first=SMALL).report["streamed"]
    assert done["checked"] == SHARDS
    assert served + hub.num_served < total + 4 * (1 << 18) + 2 * HEADERS
    assert [path.name for path in Path().iterdir()] == ["out"]


def test_what_a_run_of_another_plan_left_is_cleared(total: int, hub: StandInHub) -> None:
    hub.faults.flipped = {SHARDS[2]: 1_000_000}
    dus(*COMMAND, first=SMALL).assert_one_line_error("another sha256")
    assert Path(".out.partial/.dus-journal").stat().st_size > 1000
    hub.faults.flipped = {}
    done = dus(*COMMAND, "--max-shard-size", "3MB", first=SMALL).report["streamed"]
    assert (done["resumed"], done["fetched"]) == (0, total)


def test_a_run_with_a_cast_goes_on_too_and_says_what_was_not_checked(
    folder: Path, hub: StandInHub
) -> None:
    command = (*COMMAND, "--dtype", "float32")
    hub.faults.flipped = {SHARDS[2]: 1_000_000}
    dus(*command, first=SMALL).assert_one_line_error("another sha256")
    hub.faults.flipped = {}
    done = dus(*command, first=SMALL).report["streamed"]
    assert done["checked"] == [SHARDS[2]]
    assert (
        list(done["unchecked"].values())
        == ["parts of it were fetched by an earlier run and changed on the way"] * 2
    )
    assert (
        dus("upscale", folder, "--trim", "1", "--dtype", "float32", "-o", "local", "-q").returncode
        == 0
    )
    assert weights(Path("out")) == weights(Path("local"))


def test_a_disk_with_room_for_the_rest_takes_a_run_that_goes_on(
    total: int, hub: StandInHub
) -> None:
    """19 MB of output on 24 MB: once half of it is there, a whole one would not fit beside it."""
    Path("disk").mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", "disk"], check=False
    ).returncode:
        pytest.skip("mounting needs root")
    try:
        command = [argument if argument != "out" else "disk/out" for argument in COMMAND]
        hub.faults.flipped = {SHARDS[2]: 1_000_000}
        dus(*command, first=SMALL).assert_one_line_error("another sha256")
        hub.faults.flipped = {}
        assert dus(*command, first=SMALL).report["streamed"]["resumed"] > total / 2
        shutil.rmtree("disk/out")
        Path("disk/other").write_bytes(bytes(10_000_000))
        dus(*command).assert_one_line_error("needs", "free")
        assert not Path("disk/.out.partial").exists()
        blind = f"{SMALL}\nimport dus_cli.upscaling.space as u; u.free_bytes = lambda _: 10**12"
        run = dus(*command, first=blind)
        run.assert_one_line_error(
            "No space left on device", "free some space", "what was fetched is kept"
        )
        os.truncate("disk/other", 9_000_000)
        dus(*command, first=SMALL).assert_one_line_error("needs", "free")  # and what was kept stays
        Path("disk/other").unlink()
        assert dus(*command, first=SMALL).report["streamed"]["resumed"] > total / 2
    finally:
        subprocess.run(["umount", "disk"], check=True)


def test_the_disks_faults_are_found_by_the_hubs_sums(hub: StandInHub) -> None:
    """What is written is lost, in every copy alike; only --verify full reads it back."""
    lossy = (
        SMALL
        + "\nimport os; real = os.pwrite; os.pwrite = lambda file, data, at: real(file, bytes(len(data)), at)"
    )
    dus(*COMMAND, "--verify", "full", first=lossy).assert_one_line_error(
        "the output holds", "another sha256"
    )
    assert list(Path().iterdir()) == []


def test_the_token_goes_to_the_hub_alone(hub: StandInHub) -> None:
    command = ("upscale", "org/gated", "--trim", "1", "--stream", "--json")
    dus(*command, "-o", "out").assert_one_line_error("org/gated is gated")
    # Signed addresses answer 400 where a token comes along.
    assert dus(*command, "-o", "out", "--token", READER).report["streamed"]["checked"] == SHARDS
    served_by_the_hub = dus(
        *command[:1], "org/small", *command[2:], "-o", "small", "--token", READER
    ).report
    assert set(served_by_the_hub["streamed"]["unchecked"].values()) == {
        "the Hub has no sha256 of it"
    }
    assert weights(Path("small")) == weights(Path("out"))


def test_a_server_that_falls_silent_is_asked_for_the_rest(total: int, hub: StandInHub) -> None:
    assert dus(*COMMAND, "--dry-run").returncode == 0  # the headers are not what falls silent
    first = (
        f"{SMALL}; import dus_cli.hub.fetching as h, dus_cli.hub.streaming as s; s.REQUEST = 1 << "
        "20"
    )
    hub.faults.stalls, hub.num_served = 2, 0
    done = dus(*COMMAND, first=first, HF_HUB_DOWNLOAD_TIMEOUT="1").report
    assert done["streamed"]["checked"] == SHARDS
    assert hub.faults.stalls == 0
    assert hub.num_served <= total + HEADERS + 2 * 100_000


def test_weights_come_through_the_proxy_that_the_environment_names(hub: StandInHub) -> None:
    """Nothing else knows the host that serves them; the stand-in answers as a proxy, too."""
    hub.cdn = "http://cdn.invalid"
    done = dus(*COMMAND, first=SMALL, http_proxy=hub.endpoint, no_proxy="127.0.0.1").report
    assert done["streamed"]["checked"] == SHARDS


def test_most_weights_come_on_connections_that_are_kept(hub: StandInHub) -> None:
    hub.log.clear()
    assert dus(*COMMAND, "--jobs", "2", first=SMALL).report["streamed"]["checked"] == SHARDS
    parts = [one for one in hub.log if one.path.startswith("/cdn/") and one.num_sent > 200_000]
    assert len(parts) > 30
    assert len({one.client for one in parts}) <= 2 * len(SHARDS)


def test_a_repo_on_xet_is_streamed_from_its_ordinary_address(
    hub: StandInHub, repos: dict[str, StandInRepo]
) -> None:
    """The service that hf_xet would ask is announced and not there."""
    repos["org/xet"] = replace(repos["org/model"], xet=True)
    assert (
        dus("upscale", "org/xet", *COMMAND[2:], first=SMALL).report["streamed"]["checked"] == SHARDS
    )


def test_a_repo_that_changes_midway_changes_nothing(
    folder: Path, repos: dict[str, StandInRepo], hub: StandInHub, tmp_path: Path
) -> None:
    """After the first question main is another commit, of a model of other depth."""

    class Moving(dict[str, str]):
        def get(self, key: str, _default: Any = None) -> Any:
            return self.pop(key) if key in self else commit_of("later") if key == "main" else key

    later = write_checkpoint(tmp_path / "later", llama_tensors(4), llama_config(4))
    commits = {commit_of("model"): folder, commit_of("later"): later}
    for options in (("--stream",), ()):
        repos["org/moving"] = StandInRepo(commits, Moving(main=commit_of("model")))
        shutil.rmtree(os.environ["HF_HOME"], ignore_errors=True)
        command = (
            "upscale",
            "org/moving",
            "--trim",
            "1",
            "--json",
            *options,
            "--overwrite",
            "-o",
            "out",
        )
        done = dus(*command).report
        assert (done["commit"], done["num_layers"]["base"]) == (commit_of("model"), 8)
        assert json.loads(Path("out/dus.json").read_text())["base"]["commit"] == commit_of("model")
        assert dus("verify", "out", "--base", folder, "-q").returncode == 0


def test_a_release_is_made_again_by_streaming(hub: StandInHub) -> None:
    assert dus(*COMMAND, "--checksums", "--dtype", "float32", first=SMALL).returncode == 0
    done = dus(
        "upscale", "--from", "out/dus.json", "--stream", "-o", "again", "--json", first=SMALL
    ).report
    assert (done["reproduced"], done["streamed"]["checked"]) == (True, SHARDS)


def test_two_runs_at_once_do_not_disturb_each_other(total: int, hub: StandInHub) -> None:
    hub.faults.bytes_per_second = 4e6
    process = start()
    while hub.num_served < total / 3:
        time.sleep(0.01)
    process.send_signal(signal.SIGSTOP)
    dus(*COMMAND, first=SMALL).assert_one_line_error("another run is writing")
    process.send_signal(signal.SIGCONT)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    assert json.loads(stdout)["streamed"]["checked"] == SHARDS


def test_a_server_without_ranges_is_told_so(hub: StandInHub) -> None:
    hub.faults.ranges = False
    dus(*COMMAND).assert_one_line_error("does not support range requests", "hf download")


def test_what_is_in_the_cache_is_taken_from_there(total: int, hub: StandInHub) -> None:
    assert dus("upscale", "org/model", "--trim", "1", "-o", "cached", "-q").returncode == 0
    hub.num_served = 0
    assert dus(*COMMAND).report["streamed"] is None
    assert hub.num_served == 0
    blob = next(Path(os.environ["HF_HOME"]).glob(f"hub/models--*/snapshots/*/{SHARDS[1]}"))
    blob.unlink()
    done = dus(*COMMAND[:5], "mixed", *COMMAND[6:]).report
    assert done["streamed"]["checked"] == [SHARDS[1]]
    assert weights(Path("mixed")) == weights(Path("cached")) == weights(Path("out"))
    hub.stop()
    assert dus(*COMMAND, "--dry-run", HF_HUB_OFFLINE="1").returncode == 1


def test_streaming_has_its_usage_errors(folder: Path, hub: StandInHub) -> None:
    dus("upscale", folder, "-o", "out", "--stream").assert_one_line_error("is a directory", code=2)
    dus(*COMMAND, "--copy-mode", "clone").assert_one_line_error("--copy-mode clone", code=2)
    dus(*COMMAND, "--verify", "forward").assert_one_line_error(
        "--verify forward runs the base too, and --stream keeps no copy of it", code=2
    )
    assert hub.log == []


def test_pickled_weights_are_not_streamed(
    repos: dict[str, StandInRepo], hub: StandInHub, tmp_path: Path
) -> None:
    write_pickled(tmp_path / "pickled", llama_tensors(4), llama_config(4))
    repos["org/pickled"] = StandInRepo(
        {commit_of("p"): tmp_path / "pickled"}, {"main": commit_of("p")}
    )
    dus("upscale", "org/pickled", "--stream", "-o", "out").assert_one_line_error(
        "--stream", "pickled", "refs/pr"
    )
    assert list(Path().iterdir()) == []


def test_a_number_beyond_the_dtype_leaves_nothing(
    repos: dict[str, StandInRepo], hub: StandInHub, tmp_path: Path
) -> None:
    tensors = llama_tensors(4, dtype="F32")
    largest = b"\xff\xff\x7f\x7f"
    write_checkpoint(
        tmp_path / "large", tensors, llama_config(4), fill=lambda _name, size: largest * (size // 4)
    )
    repos["org/large"] = StandInRepo({commit_of("l"): tmp_path / "large"}, {"main": commit_of("l")})
    run = dus("upscale", "org/large", "--stream", "--dtype", "float16", "-o", "out", "-q")
    run.assert_one_line_error("finite F32 numbers beyond float16's range")
    assert list(Path().iterdir()) == []


def test_a_dry_run_of_a_7b_model_moves_less_than_two_megabytes(
    repos: dict[str, StandInRepo], hub: StandInHub, tmp_path: Path
) -> None:
    """Mistral's shapes, and its tokenizer's files, which alone have more."""
    folder = write_mistral(tmp_path / "mistral", fill=None)
    (folder / "tokenizer.json").write_text(" " * 1_795_303)
    (folder / "tokenizer.model").write_text(" " * 493_443)
    repos["org/mistral"] = StandInRepo({commit_of("m"): folder}, {"main": commit_of("m")})
    command = ("upscale", "org/mistral", "--trim", "8", "-o", "out", "--dry-run", "--json")
    done = dus(*command).report
    assert (done["bytes"], done["tensors"]) == (21_463_048_192, 435)
    assert done["files"] == ["tokenizer.json", "tokenizer.model"]
    assert done["space"]["needed"] > 21_463_048_192 + 1_795_303 + 493_443
    assert sum(request.num_sent for request in hub.log) < 2_000_000
    assert not any(
        r.path.endswith(".safetensors") and r.byte_range is None and r.num_sent for r in hub.log
    )


def test_pieces_are_whole_numbers_and_end_where_the_source_has_a_gap() -> None:
    cast = Cast("F32", "BF16")
    moves = [Move(8, 10, (("a", 0),)), Move(18, 12, (("a", 10),), cast), Move(40, 5, (("b", 3),))]
    found = list(pieces(moves, 13))
    assert [(piece.start, piece.end) for piece in found] == [(8, 18), (18, 30), (40, 45)]
    assert [move.targets for piece in found for move in piece.parts] == [
        (("a", 0),),
        (("a", 10),),
        (("b", 3),),
    ]
    halves = [part for piece in pieces(moves[1:2], 9) for part in piece.parts]
    assert [(part.source_start, part.length, part.targets) for part in halves] == [
        (18, 8, (("a", 10),)),
        (26, 4, (("a", 14),)),
    ]


def test_a_journal_is_believed_up_to_the_line_in_which_it_was_killed(tmp_path: Path) -> None:
    with Journal(tmp_path, "key") as journal:
        journal.add("a", [(0, 4), (8, 12)])
        journal.add("b", [(0, 4)])
        journal.forget("b")
    path = tmp_path / ".dus-journal"
    path.write_text(path.read_text() + '{"shard": "a", "ranges": [[4, ')
    with Journal(tmp_path, "key") as journal:
        assert [journal.holds("a", *ends) for ends in ((0, 4), (9, 11), (0, 5), (4, 8), (3, 9))] == [
            True, True, False, False, False,
        ]  # fmt: skip
        assert not journal.holds("b", 0, 1)
        assert journal.num_bytes == 8
    assert (belongs(tmp_path, "key"), belongs(tmp_path, "other")) == (True, False)
