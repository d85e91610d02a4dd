"""Mounted object stores: a real FUSE mount that refuses what they refuse, and the real command
on it.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from checkpoints import fill_randomly, llama_config, llama_tensors, write_checkpoint
from conftest import DUS
from forked import dus
from object_store import Mount, Refusals

from dus_cli.common import storage
from dus_cli.common.reference import ModelRef
from dus_cli.errors import CheckpointError, OutputError
from dus_cli.heal.launch import verb as launcher
from dus_cli.heal.launch.resolve import open_model
from dus_cli.heal.options import DataOptions, HealOptions
from dus_cli.heal.watch.views import NoView
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import MapRequest
from dus_cli.progress import NoProgress, Progress
from dus_cli.source import incomplete
from dus_cli.source.checkpoint import fingerprint, open_checkpoint
from dus_cli.upscaling import verb
from dus_cli.upscaling.options import UpscaleOptions
from dus_cli.upscaling.report import UpscaleReport
from dus_cli.upscaling.request import UpscaleRequest
from dus_cli.verification.planned import VerifyMode
from dus_cli.verification.verb import verify
from dus_cli.writing import in_place
from dus_cli.writing.staging import Staging
from dus_cli.writing.transfer import CopyMode

# As their documentation has it; docs/storage.md has the sources.
STORES = {
    "s3fs": Refusals(kind="fuse.s3fs", unstable_inodes=True, space=(0, 0)),
    "gcsfuse": Refusals(kind="fuse.gcsfuse", rename_full_folder="EMFILE", vague_times=True),
    "goofys": Refusals(kind="fuse.goofys", rename_full_folder="ENOTEMPTY", sequential=True),
    "mountpoint-s3": Refusals(
        kind="fuse",
        rename_folder="ENOSYS",
        fsync="ENOSYS",
        sequential=True,
        vanishing_folders=True,
        unstable_inodes=True,
    ),
    "no renames": Refusals(
        rename_folder="EPERM", fsync="EINVAL", direct="EINVAL", unstable_inodes=True
    ),
    "no renames of what is full": Refusals(
        rename_full_folder="ENOTEMPTY", sequential=True, vanishing_folders=True
    ),
}
IN_PLACE = Refusals(rename_folder="ENOSYS", fsync="EOPNOTSUPP")

Mounting = Callable[..., Path]


@pytest.fixture
def mounted(tmp_path: Path) -> Iterator[Mounting]:
    """Mount a backing directory; the mount point. All are unmounted at the end, whatever
    happened.
    """
    mounts: list[Mount] = []

    def mount(refusals: Refusals, backing: str = "bucket") -> Path:
        point = tmp_path / f"mount-{len(mounts)}"
        try:
            mounts.append(Mount(tmp_path / backing, point, refusals))
        except PermissionError as error:
            pytest.skip(f"no FUSE mount can be made here: {error}")
        return point

    yield mount
    for mount_made in mounts:
        mount_made.__exit__()
    assert str(tmp_path) not in Path("/proc/self/mounts").read_text()


def run(
    base: Path,
    out: Path,
    *,
    trim: int | None = None,
    progress: Progress | None = None,
    **options: Any,
) -> UpscaleReport:
    wanted = UpscaleRequest(
        ModelRef(str(base), path=base), MapRequest(trim), max_shard_bytes=200_000
    )
    return verb.upscale(wanted, out, UpscaleOptions(**options), progress=progress)


def contents(folder: Path) -> dict[str, bytes]:
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


def with_small_files(base: Path) -> Path:
    (base / "tokenizer.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates/rag.jinja").write_text("kept")
    return base


# --- whole, and the same bytes --------------------------------------------------------------------


@pytest.mark.parametrize("store", STORES)
def test_the_output_on_a_store_has_the_bytes_of_one_on_a_disk(
    base: Path, tmp_path: Path, mounted: Mounting, store: str
) -> None:
    with_small_files(base)
    run(base, tmp_path / "local", checksums=True)
    mount = mounted(STORES[store])
    report = run(base, mount / "out", checksums=True, verify=VerifyMode.full)
    assert report.published == "index last"
    assert any("written in place" in warning for warning in report.to_json()["warnings"])
    assert contents(mount / "out") == contents(tmp_path / "local")
    assert [path.name for path in mount.iterdir()] == ["out"]
    assert run(base, mount / "out", checksums=True).status == "unchanged"
    assert verify(mount / "out").is_sound


def test_a_mount_that_renames_folders_is_as_good_as_a_disk(base: Path, mounted: Mounting) -> None:
    mount = mounted(Refusals(kind="fuse.sshfs"))
    assert run(base, mount / "out").published == "rename"
    assert run(base, mount / "out", trim=1, overwrite=True).published == "rename"
    assert [path.name for path in mount.iterdir()] == ["out"]


def test_where_only_the_order_of_writing_is_refused_the_rename_stays(
    base: Path, mounted: Mounting
) -> None:
    mount = mounted(Refusals(sequential=True))
    assert run(base, mount / "out").published == "rename"
    assert verify(mount / "out").is_sound


def test_zeros_and_casts_are_written_in_order_too(
    base: Path, tmp_path: Path, mounted: Mounting
) -> None:
    mount = mounted(STORES["goofys"])
    request = MapRequest(None, "0:8,4:8", identity=True)
    ref, dtype = ModelRef(str(base), path=base), Dtype.float32
    reports = [
        verb.upscale(UpscaleRequest(ref, request, dtype=dtype), out / "out")
        for out in (tmp_path, mount)
    ]
    assert contents(tmp_path / "out") == contents(mount / "out")
    assert reports[0].tally == reports[1].tally
    assert reports[0].tally.zeros
    assert reports[0].tally.cast


def test_the_command_says_on_stderr_and_in_its_report_that_it_writes_in_place(
    base: Path, mounted: Mounting
) -> None:
    mount = mounted(IN_PLACE)
    done = dus("upscale", base, "-o", mount / "out")
    assert done.returncode == 0
    assert (
        "written in place, because folders cannot be renamed there (Function not implemented)"
        in done.stderr
    )
    report = dus("upscale", base, "-o", mount / "again", "--json").report
    assert report["published"] == "index last"


def test_what_is_written_in_place_is_not_run_before_it_has_its_name(
    base: Path, mounted: Mounting
) -> None:
    pytest.importorskip("transformers")
    mount = mounted(IN_PLACE)
    done = dus("upscale", base, "-o", mount / "out", "--verify", "forward", "-q")
    done.assert_one_line_error(
        "is written in place, and --verify forward runs a model before it is published",
        "run dus verify OUT --base MODEL --forward afterwards",
    )
    assert list(mount.iterdir()) == []


def test_a_dry_run_foretells_it_of_a_known_store_and_writes_nothing(
    base: Path, mounted: Mounting
) -> None:
    mount = mounted(STORES["gcsfuse"])
    report = dus("upscale", base, "-o", mount / "out", "--dry-run", "--json").report
    assert report["published"] is None
    assert any(
        "gcsfuse cannot rename a folder in one step" in warning for warning in report["warnings"]
    )
    assert list(mount.iterdir()) == []


# --- the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("shard", ["5GB", "20KB"], ids=["one file", "shards"])
def test_before_the_last_file_nothing_takes_the_folder_for_a_model(
    tmp_path: Path, mounted: Mounting, shard: str
) -> None:
    """Every state that a run in place goes through, as a loader, a pipeline's `test -f` and dus
    would find it.
    """
    from tiny import write_base
    from transformers import AutoConfig, AutoModelForCausalLM

    base = write_base(tmp_path / "base")
    journal = tmp_path / "journal"
    mount = mounted(Refusals(rename_folder="ENOSYS", journal=str(journal)))
    done = dus(
        "upscale", base, "-o", mount / "out", "--max-shard-size", shard, "--checksums", "--json"
    )
    assert done.report["published"] == "index last"
    steps = [line.split(" ", 1) for line in journal.read_text().splitlines() if " out/" in line]
    names = [name.removeprefix("out/") for what, name in steps if what == "written"]
    weights = [index for index, name in enumerate(names) if name.endswith(".safetensors")]
    assert names[0] == "INCOMPLETE"
    assert names[-1] == "config.json"
    assert steps[-1] == ["removed", "out/INCOMPLETE"]
    if shard != "5GB":
        assert len(weights) > 2
        assert names[-2] == "model.safetensors.index.json"
    for made_late in {
        "model.safetensors.index.json",
        "dus.json",
        "SHA256SUMS",
        "config.json",
    } & set(names):
        assert names.index(made_late) > max(weights), made_late
    prefix = tmp_path / "prefix"
    prefix.mkdir()
    for name in names[:-1]:
        if name == "INCOMPLETE":
            (prefix / name).write_text(incomplete.Owner("key").to_text())
        else:
            shutil.copyfile(mount / "out" / name, prefix / name)
        for auto in (AutoConfig, AutoModelForCausalLM):
            with pytest.raises((OSError, ValueError), match=r"config\.json"):
                auto.from_pretrained(prefix)
        with pytest.raises(CheckpointError, match="not whole"):
            verify(prefix)
    shutil.copyfile(mount / "out/config.json", prefix / "config.json")
    with pytest.raises(CheckpointError, match="not whole"):
        verify(prefix)
    assert AutoModelForCausalLM.from_pretrained(mount / "out").config.num_hidden_layers == 6


# --- killed, failed, raced ------------------------------------------------------------------------


@pytest.fixture
def killed(base: Path, tmp_path: Path, mounted: Mounting) -> tuple[Path, Path]:
    """A base, and an OUT that a run in place has left half-written."""
    journal = tmp_path / "journal"
    mount = mounted(Refusals(rename_folder="ENOSYS", delay=0.02, journal=str(journal)))
    process = subprocess.Popen(
        [*DUS, "upscale", base, "-o", mount / "out", "--max-shard-size", "100KB", "-q"]
    )
    while not (journal.exists() and ".safetensors" in journal.read_text()):
        assert process.poll() is None
        time.sleep(0.002)
    process.kill()
    process.wait()
    return base, mount / "out"


def test_a_killed_run_leaves_a_folder_that_says_what_it_is(
    killed: tuple[Path, Path], tmp_path: Path
) -> None:
    base, out = killed
    assert not (out / "config.json").exists()
    assert "not whole" in json.loads((out / "INCOMPLETE").read_text())["about"]
    dus("verify", out).assert_one_line_error("is not whole", "INCOMPLETE")
    # the latter is what heal does first
    for use in (lambda: run(out, tmp_path / "deeper"), lambda: open_model(out)):
        with pytest.raises(CheckpointError, match="is not whole"):
            use()
    with pytest.raises(OutputError, match=r"left half-written by another command.*--overwrite"):
        run(base, out, trim=1)
    assert (out / "INCOMPLETE").exists()
    assert dus("upscale", base, "-o", out, "--max-shard-size", "100KB", "-q").returncode == 0
    assert verify(out, open_checkpoint(base)).is_sound
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]


def test_overwrite_clears_what_another_command_left_half_written(killed: tuple[Path, Path]) -> None:
    base, out = killed
    assert run(base, out, trim=1, overwrite=True).published == "index last"
    assert verify(out).num_layers == 14


def test_a_signal_leaves_nothing(base: Path, tmp_path: Path, mounted: Mounting) -> None:
    journal = tmp_path / "journal"
    mount = mounted(Refusals(rename_folder="ENOSYS", delay=0.02, journal=str(journal)))
    process = subprocess.Popen(
        [*DUS, "upscale", base, "-o", mount / "out", "--max-shard-size", "100KB", "-q"],
        stderr=subprocess.PIPE,
    )
    while not (journal.exists() and ".safetensors" in journal.read_text()):
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    assert b"SIGTERM" in process.communicate()[1]
    assert process.returncode == 143
    assert list(mount.iterdir()) == []


def test_a_finished_output_is_not_replaced_where_it_could_not_stay_until_then(
    base: Path, mounted: Mounting
) -> None:
    mount = mounted(IN_PLACE)
    run(base, mount / "out")
    before = contents(mount / "out")
    with pytest.raises(OutputError, match=r"cannot be replaced in one step.*remove it first"):
        run(base, mount / "out", trim=1, overwrite=True)
    with pytest.raises(OutputError, match="not empty"):
        run(base, mount / "out", trim=1)
    assert contents(mount / "out") == before
    assert [path.name for path in mount.iterdir()] == ["out"]


def test_on_a_known_store_that_is_said_before_the_model_is_looked_at(
    base: Path, mounted: Mounting
) -> None:
    out = mounted(STORES["gcsfuse"]) / "out"
    run(base, out)
    command = ("upscale", "no/such", "-o", out, "--overwrite", "-q")
    dus(*command, HF_HUB_OFFLINE="1").assert_one_line_error(
        "cannot be replaced in one step", "gcsfuse"
    )
    report = dus(
        "upscale", base, "-o", out, "--trim", "1", "--overwrite", "--dry-run", "--json"
    ).report
    assert any("cannot be replaced in one step" in warning for warning in report["warnings"])


def test_of_two_hosts_the_one_whose_mark_is_gone_gives_way(
    mounted: Mounting, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two mounts of one bucket share no locks, as two machines do not."""
    one, two = mounted(IN_PLACE), mounted(IN_PLACE)
    with Staging(one / "out", overwrite=False, key="same") as first:
        first.write_text("README.md", "first")
        monkeypatch.setattr(socket, "gethostname", lambda: "other-host")
        with Staging(two / "out", overwrite=False, key="same") as second:
            assert any("was begun by process" in warning for warning in second.warnings)
            second.write_text("README.md", "second")
            with pytest.raises(OutputError, match="was taken meanwhile by another run"):
                first.check_ours()
            with pytest.raises(OutputError, match="was taken meanwhile by another run"):
                first.publish()
            first.__exit__()
            assert (two / "out/README.md").read_text() == "second"
            second.write_text("config.json", "{}")
            second.publish()
    assert contents(two / "out") == {"README.md": b"second", "config.json": b"{}"}


def test_a_run_whose_mark_is_replaced_while_it_writes_fails_and_leaves_the_rest_to_the_other(
    base: Path, mounted: Mounting
) -> None:
    out = mounted(IN_PLACE) / "out"
    with pytest.raises(OutputError, match="was taken meanwhile by another run"):
        run(
            base,
            out,
            progress=Meddler(
                lambda: (out / "INCOMPLETE").write_text(incomplete.Owner("").to_text())
            ),
            jobs=1,
        )
    assert (out / "INCOMPLETE").exists()
    assert len(list(out.glob("*.safetensors"))) == 1
    assert not (out / "config.json").exists()


@pytest.mark.parametrize("key", ["same", "other"])
def test_a_run_on_this_host_is_noticed_without_locks(
    mounted: Mounting, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    def refused(*_: object) -> None:
        raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))

    monkeypatch.setattr(fcntl, "flock", refused)
    mount = mounted(IN_PLACE)
    (mount / "out").mkdir()
    with subprocess.Popen(["sleep", "10"]) as living:
        started = Path(f"/proc/{living.pid}/stat").read_text().split()[21]
        owner = incomplete.Owner("same", pid=living.pid, started=started)
        assert not replace(owner, started="1").is_running_here  # a later process of the same number
        (mount / "out/INCOMPLETE").write_text(owner.to_text())
        with pytest.raises(OutputError, match=f"another run is writing .*process {living.pid}"):
            Staging(mount / "out", overwrite=True, key=key).__enter__()
        living.kill()
    with Staging(mount / "out", overwrite=key == "other", key=key) as taken:
        assert taken.published == "index last"
    assert list(mount.iterdir()) == []


def test_a_damaged_mark_is_nobodys(tmp_path: Path) -> None:
    for raw in (
        b"",
        b"[]",
        b'{"key": 1}',
        b'{"key": "k", "host": "h", "pid": "x", "token": ""}',
        b"\xff",
    ):
        (tmp_path / "INCOMPLETE").write_bytes(raw)
        with pytest.raises(CheckpointError, match="not whole"):
            incomplete.check_whole(tmp_path)
        with pytest.raises(
            OutputError,
            match=r"left half-written by another command \(process 0 on an unknown host\)",
        ):
            in_place.clear_left(tmp_path, "key", overwrite=False)
    for pid in (0, -1, 2**70):
        assert not incomplete.Owner("key", pid=pid).is_running_here
    assert incomplete.Owner("key").is_running_here


# --- errors that stores report late ---------------------------------------------------------------


@pytest.mark.parametrize(
    "refusals", [Refusals(), replace(IN_PLACE, unstable_inodes=True)], ids=["rename", "in place"]
)
@pytest.mark.parametrize("ending", [".safetensors", "rag.jinja", "README.md", "config.json"])
def test_an_upload_that_fails_at_close_is_one_line_and_nothing_stays(
    base: Path, mounted: Mounting, refusals: Refusals, ending: str
) -> None:
    with_small_files(base)
    mount = mounted(replace(refusals, close={ending: "EIO"}))
    with pytest.raises(
        OutputError, match=r"cannot write .*Input/output error; nothing was left behind"
    ):
        run(base, mount / "out")
    assert list(mount.iterdir()) == []


def test_an_upload_that_fails_when_the_last_piece_was_written_is_one_line(
    base: Path, mounted: Mounting
) -> None:
    mount = mounted(Refusals(close={".safetensors": "EIO"}, close_beyond=50_000))
    with pytest.raises(OutputError, match=r"cannot write .*safetensors: Input/output error"):
        run(base, mount / "out")
    assert list(mount.iterdir()) == []


def test_a_sync_that_fails_is_not_one_that_is_refused(base: Path, mounted: Mounting) -> None:
    for code, fails in (
        ("EINVAL", False),
        ("ENOTSUP", False),
        ("ENOSYS", False),
        ("EIO", True),
        ("ENOSPC", True),
    ):
        mount = mounted(Refusals(fsync=code), backing=code)
        if fails:
            with pytest.raises(OutputError, match=os.strerror(getattr(errno, code))):
                run(base, mount / "out")
            assert list(mount.iterdir()) == []
        else:
            assert run(base, mount / "out").published == "rename"
    mount = mounted(replace(IN_PLACE, fsync="EIO", fsync_of=".safetensors"), backing="in place")
    with pytest.raises(OutputError, match=r"cannot write .*safetensors: Input/output error"):
        run(base, mount / "out")


def test_a_number_beyond_the_dtype_is_found_where_shards_are_written_in_order(
    tmp_path: Path, mounted: Mounting
) -> None:
    huge = b"\x00\x00\x7f\x7f"  # 3.39e38, finite in float32
    base = write_checkpoint(
        tmp_path / "base",
        llama_tensors(4, dtype="F32"),
        llama_config(4),
        fill=lambda _, size: huge * (size // 4),
    )
    mount = mounted(IN_PLACE)
    with pytest.raises(CheckpointError, match="beyond float16's range"):
        verb.upscale(
            UpscaleRequest(ModelRef(str(base), path=base), MapRequest(1), dtype=Dtype.float16),
            mount / "out",
        )
    assert list(mount.iterdir()) == []


def test_a_store_that_lets_nothing_be_removed_is_refused_before_the_first_byte(
    base: Path, mounted: Mounting
) -> None:
    mount = mounted(replace(STORES["mountpoint-s3"], unlink="EPERM"))
    dus("upscale", base, "-o", mount / "out", "-q").assert_one_line_error(
        "cannot be removed", "--allow-delete"
    )
    assert not (mount / "out").exists()
    with pytest.raises(OutputError, match=r"probe cannot be removed \(Operation not permitted\)"):
        run(base, mount / "out")  # also where the first try has left something


def test_blocks_are_not_cloned_into_objects(base: Path, mounted: Mounting) -> None:
    mount = mounted(IN_PLACE)
    with pytest.raises(OutputError, match="--copy-mode clone"):
        run(base, mount / "out", copy_mode=CopyMode.clone)
    assert list(mount.iterdir()) == []


def test_free_space_that_is_not_told_refuses_nothing_and_none_refuses(
    base: Path, mounted: Mounting
) -> None:
    mount = mounted(Refusals(space=(0, 0)), "zero")
    assert storage.free_bytes(mount) is None
    report = run(base, mount / "out")
    assert report.to_json()["space"]["free"] is None
    assert "not known" in dus("upscale", base, "-o", mount / "other", "--dry-run").stdout
    full = mounted(Refusals(space=(0, 1000)), "full")
    with pytest.raises(OutputError, match=r"0 bytes free"):
        run(base, full / "out")


# --- sources --------------------------------------------------------------------------------------


class Meddler(NoProgress):
    """Does something at the first bytes written."""

    def __init__(self, action: Callable[[], object]) -> None:
        self.actions = [action]

    def advance(self, _num_bytes: int) -> None:
        while self.actions:
            self.actions.pop()()


ODD = Refusals(unstable_inodes=True, vague_times=True, direct="EINVAL")


def test_a_source_whose_inodes_and_times_wander_is_no_changed_one(
    sharded: Path, tmp_path: Path, mounted: Mounting
) -> None:
    mount = mounted(ODD)
    shutil.copytree(sharded, mount / "base")
    shard = next((mount / "base").glob("*.safetensors"))
    assert len({shard.stat().st_ino for _ in range(3)}) == 3
    assert len({fingerprint(shard) for _ in range(4)}) == 1
    assert run(mount / "base", tmp_path / "out", verify=VerifyMode.full).status == "written"


@pytest.mark.parametrize("in_order", [False, True])
@pytest.mark.parametrize("fault", ["truncated", "rewritten"])
def test_a_source_on_a_store_that_does_change_is_noticed(
    tmp_path: Path, mounted: Mounting, fault: str, in_order: bool
) -> None:
    mount = mounted(ODD)
    tensors = llama_tensors(8, hidden=512, intermediate=1024)
    base = write_checkpoint(mount / "base", tensors, llama_config(8), fill=fill_randomly)
    shard = base / "model.safetensors"
    os.utime(shard, (10**9, 10**9))

    def meddle() -> None:
        if fault == "truncated":
            os.truncate(shard, 1 << 20)
        else:
            with shard.open("r+b") as file:
                file.seek(-1, os.SEEK_END)
                file.write(b"x")
            os.utime(shard, (10**9 + 2, 10**9 + 2))

    out = (mounted(IN_PLACE, "other") if in_order else tmp_path) / "out"
    with pytest.raises(CheckpointError, match=r"became shorter|changed while it was read"):
        run(base, out, progress=Meddler(meddle), jobs=1)
    assert not out.exists()


@pytest.mark.parametrize("in_order", [False, True])
def test_a_source_that_cannot_be_read_is_one_line(
    base: Path, tmp_path: Path, mounted: Mounting, in_order: bool
) -> None:
    tensors = llama_tensors(8, hidden=256, intermediate=1024)
    mount = mounted(Refusals(read={".safetensors": "ESTALE"}))
    write_checkpoint(mount / "base", tensors, llama_config(8))
    out = (mounted(IN_PLACE, "other") if in_order else tmp_path) / "out"
    with pytest.raises(CheckpointError, match=r"cannot read model\.safetensors: Stale file handle"):
        run(mount / "base", out)
    assert not out.exists()


# --- healing --------------------------------------------------------------------------------------


def test_healing_where_checkpoints_could_not_get_their_names_is_refused_at_once(
    base: Path, tmp_path: Path, mounted: Mounting
) -> None:
    run(base, tmp_path / "out")
    known = mounted(STORES["s3fs"], "known")
    data = tmp_path / "data.jsonl"
    data.write_text('{"text": "a"}\n')
    done = dus("heal", tmp_path / "out", "--data", data, "-o", known / "healed", "--dry-run")
    done.assert_one_line_error("cannot be healed into", "s3fs", "heal on a disk")
    asked = mounted(IN_PLACE, "asked")
    options = HealOptions(
        model=tmp_path / "out", output=asked / "healed", data=DataOptions(files=(str(data),))
    )
    with pytest.raises(OutputError, match=r"cannot be healed into.*Function not implemented"):
        launcher.prepare_run(options, open_model(tmp_path / "out"), NoView())
    unsynced = mounted(Refusals(fsync="EINVAL"), "unsynced")
    with pytest.raises(OutputError, match=r"files cannot be synced there \(Invalid argument\)"):
        launcher.prepare_run(
            replace(options, output=unsynced / "healed"), open_model(tmp_path / "out"), NoView()
        )
    assert [*known.iterdir(), *asked.iterdir(), *unsynced.iterdir()] == []
