"""Trackers that log the same figures as metrics.jsonl: TensorBoard, wandb and trackio."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Protocol

from dus_cli.common.libraries import require


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
    def __init__(self, folder: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(folder / "tensorboard"))

    def log(self, row: dict[str, Any]) -> None:
        for name, value in figures(row).items():
            self._writer.add_scalar(name, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class _LibraryRun:
    """A run of wandb or trackio, which have the same interface."""

    def __init__(self, library: str, folder: Path, config: dict[str, Any]) -> None:
        module: Any = __import__(library)
        self._module = module
        extra = {"dir": str(folder)} if library == "wandb" else {}
        self._run = module.init(project="dus-heal", name=folder.name, config=config, **extra)

    def log(self, row: dict[str, Any]) -> None:
        self._module.log(figures(row), step=row["step"])

    def close(self) -> None:
        self._module.finish()


def check_tracker(name: str) -> None:
    """Check that a tracker's package is installed.

    Raises:
        MissingExtraError: it is not.
    """
    if name != "none":
        require(f"--track {name}", name)


def open_tracker(name: str, folder: Path, config: dict[str, Any]) -> Tracker:
    """Open the tracker of a run; its own files go into the run's folder."""
    if name == "none":
        return _NoTracker()
    check_tracker(name)
    return _TensorBoard(folder) if name == "tensorboard" else _LibraryRun(name, folder, config)


def figures(row: dict[str, Any]) -> dict[str, float]:
    """The numbers of a row, by flat names.

    >>> figures({"step": 3, "loss": 2.5, "seconds": {"data": 0.1}})
    {'loss': 2.5, 'seconds/data': 0.1}
    """
    flat: dict[str, float] = {}
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}/{key}": number for key, number in value.items()}
        elif isinstance(value, (int, float)) and not isinstance(value, bool) and name != "step":
            flat[name] = value
    return flat
