"""Trackers that log the same figures as metrics.jsonl: TensorBoard, wandb and trackio."""

from __future__ import annotations

import json
import uuid
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from dus_cli.common.libraries import require
from dus_cli.errors import HealError, reason_of
from dus_cli.heal.run import TRACKED

if TYPE_CHECKING:
    from dus_cli.heal.options import SavingOptions
    from dus_cli.heal.run import Run

# What an option's user can do about a failure.
_ADVICE = {
    "wandb": "run wandb login on this machine, or set WANDB_MODE=offline",
    "trackio": "check the project's name and, if TRACKIO_SPACE_ID is set, HF_TOKEN",
}


class Tracker(Protocol):
    """Gets every row of metrics.jsonl."""

    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class _NoTracker:
    def log(self, row: dict[str, Any]) -> None:
        pass

    def close(self) -> None:
        pass


class _TensorBoard:
    """Event files in OUT/tensorboard. Readers drop what earlier files have from `purge_step` on."""

    def __init__(self, run: Run, purge_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run.folder / "tensorboard"), purge_step=purge_step)

    def log(self, row: dict[str, Any]) -> None:
        for name, value in figures(row).items():
            self._writer.add_scalar(name, value, row["step"])
        self._writer.flush()  # a killed run would lose two minutes

    def close(self) -> None:
        self._writer.close()


class _LibraryRun:
    """A run of wandb or trackio, which have nearly the same interface.

    Steps since the last checkpoint run twice if the run was killed; a row of a step that the
    tracker has is not logged again. Without a connection wandb cannot tell what it has, and begins
    a new file of the same run; it then gets every row, because the file of a killed process may
    lack its last ones, or all of them.
    """

    def __init__(self, run: Run) -> None:
        name = run.keeping.track
        self._module: Any = __import__(name)
        known = _known(run)
        tracked = known or {**_names(run), "id": uuid.uuid4().hex[:12]}
        options: dict[str, Any] = {"resume": "allow" if known or name == "wandb" else "never"}
        if name == "wandb":
            options |= {"id": tracked["id"], "dir": str(run.folder)}
        try:
            begun = self._module.init(
                project=tracked["project"],
                name=tracked["run"],
                group=run.keeping.track_group,
                config=asdict(run),
                **options,
            )
        except Exception as error:  # they have no common class for what is wrong with an account
            raise HealError(
                f"--track {name}: {name} fails with {type(error).__name__}: {reason_of(error)}; "
                f"{_ADVICE[name]}, or leave the option out"
            ) from error
        (run.folder / TRACKED).write_text(json.dumps(tracked) + "\n", encoding="utf-8")
        # trackio tells it nowhere else
        self._next_step: int = begun.starting_step if name == "wandb" else begun._next_step  # noqa: SLF001

    def log(self, row: dict[str, Any]) -> None:
        if row["step"] >= self._next_step:
            self._module.log(figures(row), step=row["step"])

    def close(self) -> None:
        self._module.finish()


def check_tracker(saving: SavingOptions) -> None:
    """Check that a tracker's package is installed, and that the options about it apply to it.

    Raises:
        MissingExtraError: it is not installed.
        HealError: an option does not apply.
    """
    track = saving.track.value
    if track not in _ADVICE:
        for name in ("project", "run", "group"):
            if getattr(saving, f"track_{name}") is not None:
                raise HealError(
                    f"--track-{name} is for wandb and trackio; give --track wandb or --track "
                    "trackio, or leave it out"
                )
    if track != "none":
        require(f"--track {track}", track)


def open_tracker(run: Run, written: Sequence[dict[str, Any]], last_step: int) -> Tracker:
    """Open the tracker of a run, or continue in the one of before the run was stopped. It gets the
    rows so far that it lacks.

    Args:
        run: the run.
        written: the rows that metrics.jsonl had when the worker started.
        last_step: the step of the newest checkpoint; -1 if there is none.

    Raises:
        HealError: the tracker refuses.
    """
    if run.keeping.track == "none":
        return _NoTracker()
    tracker: Tracker
    if run.keeping.track == "tensorboard":
        is_new = not (run.folder / "tensorboard").is_dir()
        tracker = _TensorBoard(run, last_step + 1)
        if not is_new:
            return tracker
    else:
        tracker = _LibraryRun(run)
    for row in written:
        if row["step"] <= last_step:
            tracker.log(row)
    return tracker


def _names(run: Run) -> dict[str, Any]:
    keeping = run.keeping
    return {
        "tracker": keeping.track,
        "project": keeping.track_project or "dus-heal",
        "run": keeping.track_run or run.folder.name,
    }


def _known(run: Run) -> dict[str, Any] | None:
    """What tracking.json has, if it is about the run of these names; else None."""
    path = run.folder / TRACKED
    try:
        record = dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, TypeError):
        return None
    names = _names(run)
    is_same = "id" in record and all(record.get(key) == names[key] for key in names)
    return record if is_same else None


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, by flat names.

    >>> figures({"step": 3, "loss": 2.5, "seconds": {"data": 0.1}, "push": {"commit": "01ab"}})
    {'loss': 2.5, 'seconds/data': 0.1}
    """
    flat: dict[str, Any] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": inner for key, inner in value.items()}
        elif name != "step":
            flat[name] = value
    return {
        name: value
        for name, value in flat.items()
        if isinstance(value, (int, float)) and not isinstance(value, bool)
    }
