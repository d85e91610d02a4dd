"""Checkpoints of a run, saved by torch.distributed.checkpoint in the background; one that is not
complete has no name.

`checkpoints/step-00000120/` holds the optimizer's tensors, split over the workers that wrote them,
and `state.json`. It is written under another name, synced, and renamed by the first worker when
every worker is done. A run with another number of workers can read it.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor

from dus_cli.common.storage import free_bytes, sync
from dus_cli.common.units import human_bytes
from dus_cli.errors import HealError, OutputError, shown
from dus_cli.heal import checkpoints_folder as folders
from dus_cli.heal.train.masters import joined
from dus_cli.models.team import Team

_STATE = "state.json"

_OF_THE_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO)


# What torch.distributed.checkpoint raises if it cannot write; if it cannot read, a KeyError too.
_FAILURES = (dcp.api.CheckpointException, OSError, RuntimeError)


class MeanOf(NamedTuple):
    """Average the last `number` of the checkpoints that are due every `every` steps."""

    number: int
    every: int


@dataclass
class _Pending:
    future: Future[Any]
    partial: Path
    final: Path
    num_bytes: int


def open_checkpoints(
    folder: Path, team: Team, keep: int, mean_of: MeanOf | None = None
) -> Checkpoints:
    """The checkpoints of a run, whose folder is made, locked and cleared of what a kill left.

    Args:
        folder: of the run's checkpoints.
        team: the workers; every one of them calls this.
        keep: how many of the newest are kept.
        mean_of: those of which a mean is wanted, which are kept too.

    Raises:
        HealError: another run holds the folder.
    """
    lock = -1
    if team.is_first:
        folder.mkdir(parents=True, exist_ok=True)
        lock = folders.lock(folder)
        for left in folder.glob(".step-*"):
            shutil.rmtree(left)
    team.wait()
    return Checkpoints(folder, team, keep, mean_of, lock=lock)


class Checkpoints:
    """The checkpoints of one run. Every method is called by every worker, in the same order.

    `lock` is the descriptor that holds the folder, as long as this object lives.
    """

    def __init__(
        self, folder: Path, team: Team, keep: int, mean_of: MeanOf | None, *, lock: int
    ) -> None:
        self._folder = folder
        self._team = team
        self._keep, self._mean_of = keep, mean_of
        self._lock = lock
        self._in_background = team.device.type != "cpu"
        self._pending: _Pending | None = None
        self._saved: int | None = None

    def newest(self) -> int | None:
        """The step of the newest complete checkpoint, as the first worker sees it."""
        steps = folders.complete(self._folder) if self._team.is_first else []
        newest = self._team.sum([float(steps[-1] + 1) if steps else 0.0])[0]
        self._saved = int(newest) - 1 if newest else None
        return self._saved

    def state(self, step: int) -> dict[str, Any]:
        """The state that `save` was given.

        Raises:
            HealError: it cannot be read.
        """
        path = self._folder / folders.name(step)
        try:
            state: dict[str, Any] = dict(json.loads((path / _STATE).read_text(encoding="utf-8")))
            if not state:
                raise ValueError(f"{_STATE} is empty")
        except (OSError, ValueError, TypeError) as error:
            raise _cannot_read(path, error) from error
        return state

    def load(self, step: int, tensors: Mapping[str, Tensor]) -> None:
        """Read a checkpoint into tensors that are already there.

        Raises:
            HealError: it cannot be read.
        """
        path = self._folder / folders.name(step)
        with _refusals_told(path):
            dcp.load(dict(tensors), checkpoint_id=path, no_dist=self._team.size == 1)  # type: ignore[attr-defined]

    def save(self, step: int, tensors: Mapping[str, Tensor], state: Mapping[str, Any]) -> None:
        """Begin to save, unless this step is saved already. On an accelerator the tensors are
        copied before this returns, and written while training goes on.

        Raises:
            OutputError: the checkpoint before this one could not be written, or there is no room
                for this one.
        """
        self.finish()
        if step == self._saved:
            return
        self.check_room(tensors)
        partial = self._folder / f".{folders.name(step)}"
        try:
            if self._team.is_first:
                partial.mkdir()
                _write(partial / _STATE, json.dumps(state))
            self._team.wait()
            future = self._begin(tensors, partial)
        except OSError as error:
            raise self._cannot_save(error, partial, num_bytes(tensors)) from error
        self._pending = _Pending(
            future, partial, self._folder / folders.name(step), num_bytes(tensors)
        )
        self._saved = step

    def check_room(self, tensors: Mapping[str, Tensor], more: int = 0) -> None:
        """Check that the disk has room for a checkpoint of these tensors, and for some bytes more.

        Raises:
            OutputError: it has not.
        """
        needed = num_bytes(tensors)
        free = free_bytes(self._folder) if self._team.is_first else None
        if self._team.any(free is not None and free < needed + more):
            raise OutputError(self._no_room(needed, more, free))

    def _no_room(self, needed: int, more: int, free: int | None) -> str:
        parts = [f"a checkpoint takes {human_bytes(needed)}"] if needed else []
        parts += [f"the healed model takes {human_bytes(more)}"] if more else []
        sizes = f", where {' and '.join(parts)}"
        sizes += "" if free is None else f", with {human_bytes(free)} free"
        return folders.disk_failure(self._folder, os.strerror(errno.ENOSPC), sizes)

    def _cannot_save(self, error: BaseException | None, partial: Path, needed: int) -> OutputError:
        """Remove what a failed save left, and make its error."""
        free = free_bytes(self._folder)
        if self._team.is_first:
            shutil.rmtree(partial, ignore_errors=True)
        code = _code(error)
        # another worker's failure comes as text, without a code
        if code is None and free is not None and free < needed:
            code = errno.ENOSPC
        if code == errno.ENOSPC:
            return OutputError(self._no_room(needed, 0, None))
        reason = (
            "a checkpoint cannot be saved "
            f"({shown(_reason(error) if code is None else os.strerror(code))})"
        )
        return OutputError(
            folders.disk_failure(self._folder, reason, f", where one takes {human_bytes(needed)}")
        )

    def _begin(self, tensors: Mapping[str, Tensor], partial: Path) -> Future[Any]:
        """Save from a copy in the background; on a CPU, whose memory the copy would take, save at
        once.
        """
        where: dict[str, Any] = {"checkpoint_id": partial, "process_group": self._team.saving}
        where["no_dist"] = self._team.size == 1
        if self._in_background:
            saving = dcp.async_save(dict(tensors), **where)  # type: ignore[attr-defined]
            assert isinstance(saving, Future)
            return saving
        done: Future[Any] = Future()
        try:
            done.set_result(dcp.save(dict(tensors), **where))  # type: ignore[attr-defined]
        except _FAILURES as error:
            done.set_exception(error)
        return done

    def averaged(self) -> list[int]:
        """The ascending steps of the checkpoints whose mean is written; none if none is wanted."""
        return self._averaged(folders.complete(self._folder))

    def _averaged(self, complete: Sequence[int]) -> list[int]:
        return [] if self._mean_of is None else folders.averaged(complete, *self._mean_of)

    def means(self, steps: Sequence[int], tensors: Mapping[str, Tensor]) -> Means:
        """Means over these checkpoints; only the first worker calls this."""
        return Means([self._folder / folders.name(step) for step in steps], tensors)

    def poll(self) -> None:
        """Give a checkpoint its name if every worker is done with it."""
        if self._pending is not None and not self._team.any(not self._pending.future.done()):
            self.finish()

    def finish(self) -> None:
        """Wait until the checkpoint that is being saved is complete, name it, and remove those
        beyond `keep`.

        Raises:
            OutputError: it could not be written; those before it are whole.
        """
        pending, self._pending = self._pending, None
        if pending is None:
            return
        failure = pending.future.exception()
        if self._team.any(failure is not None):
            raise self._cannot_save(failure, pending.partial, pending.num_bytes) from failure
        if self._team.is_first:
            _sync(pending.partial)
            pending.partial.replace(pending.final)
            _sync(self._folder)
            complete = folders.complete(self._folder)
            kept = {*complete[-self._keep :], *self._averaged(complete)}
            for step in sorted(set(complete) - kept):
                shutil.rmtree(self._folder / folders.name(step), ignore_errors=True)
        self._team.wait()


class Means:
    """Means over a run's checkpoints in fp32, one tensor at a time; memory holds two of them.

    Args:
        checkpoints: their folders.
        tensors: what each of them holds, for names, shapes and dtypes.
    """

    def __init__(self, checkpoints: Sequence[Path], tensors: Mapping[str, Tensor]) -> None:
        self._checkpoints, self._tensors = checkpoints, tensors

    def of(self, parameter: str) -> Tensor | None:
        """A parameter's mean on the CPU, of its fp32 masters where there are any; None where it
        never learned.

        Raises:
            HealError: a checkpoint cannot be read.
        """
        keys = (f"model.{parameter}", f"lower.{parameter}")
        wholes = [self._tensors[key] for key in keys if key in self._tensors]
        if not wholes:
            return None
        total = torch.zeros(wholes[0].shape, dtype=torch.float32)
        for path in self._checkpoints:
            each = [torch.empty(whole.shape, dtype=whole.dtype) for whole in wholes]
            with _refusals_told(path):
                dcp.load(  # type: ignore[attr-defined]
                    dict(zip(keys, each, strict=False)), checkpoint_id=path, no_dist=True
                )
            total += joined(*each) if len(each) > 1 else each[0]
        return total / len(self._checkpoints)


def _write(path: Path, text: str) -> None:
    with path.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        sync(file.fileno())


def _sync(folder: Path) -> None:
    file = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        sync(file)
    finally:
        os.close(file)


@contextmanager
def _refusals_told(path: Path) -> Iterator[None]:
    """Turn what torch.distributed.checkpoint raises for a checkpoint into one line.

    Raises:
        HealError: the checkpoint cannot be read.
    """
    try:
        yield
    except (*_FAILURES, KeyError) as error:
        raise _cannot_read(path, error) from error


def _cannot_read(path: Path, error: BaseException) -> HealError:
    return HealError(
        f"{shown(path)} cannot be read ({shown(_reason(error))}); remove it to go on from the one "
        "before"
    )


def num_bytes(tensors: Mapping[str, Tensor]) -> int:
    """The bytes that a checkpoint of these tensors takes, over all workers."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())


def _code(error: BaseException | None) -> int | None:
    """The operating system's code of a failure, which torch wraps in exceptions of its own."""
    waiting, seen = [error], set[int]()
    while waiting:
        one = waiting.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, OSError) and one.errno in _OF_THE_DISK:
            return one.errno
        waiting += [one.__cause__, one.__context__]
        if isinstance(one, dcp.api.CheckpointException):
            waiting += [failure[0] for failure in one.failures.values()]
    return next((code for code in _OF_THE_DISK if os.strerror(code) in str(error)), None)


def _reason(error: BaseException | None) -> str:
    """The last line of a library's message."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return lines[-1] if lines else type(error).__name__
