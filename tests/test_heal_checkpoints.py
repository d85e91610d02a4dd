"""Checkpoints of a run: complete or invisible, also when they are saved while training goes on."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")

from dus_cli.errors import HealError, OutputError  # noqa: E402
from dus_cli.heal import checkpoints_folder as folders  # noqa: E402
from dus_cli.heal.train.checkpoints import Checkpoints, open_checkpoints  # noqa: E402
from dus_cli.heal.train.masters import split  # noqa: E402
from dus_cli.models import team as teams  # noqa: E402

# torch.distributed.checkpoint warns of its own ways
pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture
def team(monkeypatch: pytest.MonkeyPatch) -> Iterator[teams.Team]:
    """A team of one."""
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    with teams.joined_team() as team:
        yield team


@pytest.fixture(params=["at once", "in the background"])
def checkpoints(request: pytest.FixtureRequest, team: teams.Team, tmp_path: Path) -> Checkpoints:
    made = open_checkpoints(tmp_path / "checkpoints", team, keep=2)
    made._in_background = request.param == "in the background"  # as from an accelerator
    return made


def tensors(value: float) -> dict[str, Any]:
    return {"weight": torch.full((1000, 300), value), "step": torch.tensor(value)}


def test_what_is_saved_is_the_moment_of_the_call_whatever_training_does_next(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    live = tensors(1.0)
    checkpoints.save(3, live, {"step": 3})
    for tensor in live.values():
        tensor.fill_(2.0)
    checkpoints.finish()
    found = tensors(0.0)
    checkpoints.load(3, found)
    assert {float(tensor.mean()) for tensor in found.values()} == {1.0}
    assert checkpoints.state(3) == {"step": 3}


def test_a_mean_is_of_the_fp32_masters(checkpoints: Checkpoints) -> None:
    masters = [1.0 + 2**-12, 1.0 + 3 * 2**-12]  # both are 1 in bf16
    saved: dict[str, Any] = {}
    for step, value in enumerate(masters):
        weight = torch.empty((5, 3), dtype=torch.bfloat16)
        lower = torch.empty((5, 3), dtype=torch.int16)
        split(torch.full((5, 3), value), weight, lower)
        assert set(weight.flatten().tolist()) == {1.0}
        saved = {
            "model.weight": weight,
            "lower.weight": lower,
            "model.norm": torch.full((3,), value),
        }
        checkpoints.save(step, saved, {"step": step})
    checkpoints.finish()
    means = checkpoints.means([0, 1], saved)
    for name in ("weight", "norm"):
        mean = means.of(name)
        assert mean is not None
        assert set(mean.flatten().tolist()) == {1.0 + 2**-11}
    assert means.of("frozen") is None


def test_the_newest_are_kept_and_a_step_is_saved_once(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    for step in (1, 2, 2, 3):
        checkpoints.save(step, tensors(float(step)), {"step": step})
        checkpoints.poll()
    checkpoints.finish()
    assert folders.complete(tmp_path / "checkpoints") == [2, 3]
    assert folders.newest(tmp_path / "checkpoints") == checkpoints.newest() == 3
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_until_it_is_complete_a_checkpoint_has_no_name(
    checkpoints: Checkpoints, tmp_path: Path
) -> None:
    checkpoints.save(7, tensors(1.0), {"step": 7})
    assert folders.complete(tmp_path / "checkpoints") == []
    checkpoints.finish()
    assert folders.complete(tmp_path / "checkpoints") == [7]
    assert json.loads((tmp_path / "checkpoints" / "step-00000007" / "state.json").read_text()) == {
        "step": 7
    }


def test_a_failed_save_is_one_line_and_leaves_the_one_before_whole(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.save(1, tensors(1.0), {"step": 1})
    checkpoints.finish()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystemWriter.write_data", full)
    checkpoints.save(2, tensors(2.0), {"step": 2})
    with pytest.raises(OutputError, match="No space left on device"):
        checkpoints.finish()
    monkeypatch.undo()
    assert folders.complete(tmp_path / "checkpoints") == [1]
    found = tensors(0.0)
    checkpoints.load(1, found)
    assert float(found["weight"][0, 0]) == 1.0


def test_a_checkpoint_without_room_is_refused_before_a_byte_with_what_it_takes_and_what_is_kept(
    checkpoints: Checkpoints, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("dus_cli.heal.train.checkpoints.free_bytes", lambda _: 1_000_000)
    with pytest.raises(OutputError) as refused:
        checkpoints.save(1, tensors(1.0), {"step": 1})
    place = (
        f"No space left on device, in {tmp_path}, where a checkpoint takes 1.20 MB, with 1.00 MB "
        "free"
    )
    assert str(refused.value).startswith(place)
    assert "no checkpoint is saved yet, and the same command starts again once" in str(
        refused.value
    )
    assert list((tmp_path / "checkpoints").iterdir()) == []
    monkeypatch.undo()
    checkpoints.save(1, tensors(1.0), {"step": 1})
    checkpoints.finish()
    monkeypatch.setattr("dus_cli.heal.train.checkpoints.free_bytes", lambda _: 1_000_000)
    with pytest.raises(
        OutputError,
        match="the checkpoint of step 1 is whole, and the same command goes on from there",
    ):
        checkpoints.save(2, tensors(2.0), {"step": 2})


@pytest.mark.parametrize("limit", ["No space left on device", "File too large"])
def test_what_the_system_says_is_told_where_torch_says_unexpected_pos(
    checkpoints: Checkpoints, tmp_path: Path, limit: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    code = {"No space left on device": errno.ENOSPC, "File too large": errno.EFBIG}[limit]

    class Full(io.BytesIO):
        def write(self, _: object) -> int:
            raise OSError(code, os.strerror(code))

    @contextlib.contextmanager
    def full(*_: object) -> Iterator[io.BytesIO]:
        yield Full()

    monkeypatch.setattr("torch.distributed.checkpoint.filesystem.FileSystem.create_stream", full)
    checkpoints.save(1, tensors(1.0), {"step": 1})
    with pytest.raises(OutputError) as refused:
        checkpoints.finish()
    assert limit in str(refused.value)
    assert "no checkpoint is saved yet" in str(refused.value)
    assert "pos" not in str(refused.value)


def test_a_second_run_on_the_same_checkpoints_is_refused(
    checkpoints: Checkpoints, team: teams.Team, tmp_path: Path
) -> None:
    with pytest.raises(HealError, match=rf"another run .*\(process {os.getpid()} on"):
        folders.check_unlocked(tmp_path / "checkpoints")
    with pytest.raises(HealError, match="another run"):
        open_checkpoints(tmp_path / "checkpoints", team, keep=1)


def test_what_a_killed_run_had_half_written_is_cleared(team: teams.Team, tmp_path: Path) -> None:
    half = tmp_path / "checkpoints" / ".step-00000009"
    half.mkdir(parents=True)
    (half / "__0_0.distcp").write_bytes(b"half")
    assert open_checkpoints(tmp_path / "checkpoints", team, keep=1).newest() is None
    assert not half.exists()
