"""Write an output under its final name, on a file system that cannot rename folders, so that an
unfinished one is never taken for a model.

This is the exception to "the final name means finished". INCOMPLETE is written first and removed
last. The index and config.json are written after everything else: without them no loader finds a
model. transformers reads config.json first, and a model of one file has no index.
"""

from __future__ import annotations

import contextlib
from collections.abc import Collection, Mapping
from functools import partial
from pathlib import Path

from dus_cli.common.files import writing
from dus_cli.common.storage import is_mount_point, sync
from dus_cli.errors import CheckpointError, OutputError, shown, shown_list
from dus_cli.source import incomplete
from dus_cli.source.checkpoint import CONFIG_NAME
from dus_cli.source.incomplete import Owner
from dus_cli.source.weights import INDEX_NAME
from dus_cli.writing.replacing import Claim, claim_by_names, claim_model, others, remove_claimed

# Written after everything else, in this order.
LAST = (INDEX_NAME, CONFIG_NAME)

# The folder within OUT in which a run works if OUT itself cannot be renamed, such as a mount point.
WITHIN = ".dus.partial"

# What an output may hold from the start; mke2fs makes lost+found in every new file system.
_ALWAYS = (WITHIN, "lost+found", incomplete.NAME)


def check_left(output: Path, key: str, *, overwrite: bool) -> Owner | None:
    """The run that left `output` half-written; None if it is not half-written.

    Raises:
        OutputError: that run is still running on this host, or its key is not `key`.
    """
    left = incomplete.owner(output)
    if left is None:
        return None
    if left.is_running_here:
        raise OutputError(
            f"another run is writing {shown(output)} at this moment ({left}); wait for it"
        )
    if left.key != key and not overwrite:
        raise OutputError(
            f"{shown(output)} was left half-written by another command ({left}); run that one "
            "again, remove the folder, or clear it with --overwrite"
        )
    return left


def clear_left(output: Path, key: str, *, overwrite: bool) -> str | None:
    """Remove what an earlier run in place left under `output`.

    Returns:
        A warning if that run may still be running on another host; else None.

    Raises:
        OutputError: as `check_left`, or its files cannot be removed.
    """
    left = check_left(output, key, overwrite=overwrite)
    if left is None:
        return None
    claim = claim_model(output) if left.files is None else claim_by_names(left.files)
    if foreign := others(output, claim, _ALWAYS):
        raise OutputError(
            f"{shown(output)} was left half-written ({left}) and holds {shown_list(foreign)}, "
            "which dus did not write; move that away, or choose another -o"
        )
    remaining = _clear(output, claim)
    if remaining:
        raise OutputError(
            f"{shown(output)} was left half-written and {shown(remaining)} in it cannot be removed"
        )
    if left.is_of_this_host:
        return None
    return (
        f"{shown(output)} was begun by {left}: if that run is still running, it will notice this "
        "one and fail"
    )


def check_empty(output: Path, why: str) -> None:
    """Check that nothing would be replaced. `why` says why that cannot be done in one step.

    Raises:
        OutputError: `output` is not empty.
    """
    if holds_something(output):
        raise OutputError(
            f"{shown(output)} cannot be replaced in one step, because {why}: the old model would "
            "be lost before the new one is whole; remove it first, or choose another -o"
        )


def holds_something(output: Path) -> bool:
    """Whether a folder holds more than a new file system does, and a run that has just started."""
    return output.is_dir() and any(path.name not in _ALWAYS for path in output.iterdir())


def in_place_warning(output: Path, why: str) -> str:
    """The warning about an output that is written in place."""
    return (
        f"{shown(output)} is written in place, because {why}; it is whole once {CONFIG_NAME} is "
        f"there and {incomplete.NAME} is gone"
    )


class InPlace:
    """OUT while it is written in place. If another run replaces the mark, OUT is left to it."""

    def __init__(self, output: Path, key: str, files: Collection[str] | None = None) -> None:
        self.output = output
        self._mark = output / incomplete.NAME
        self._owner = Owner(key, files=None if files is None else tuple(sorted(files)))

    def claim(self, why: str) -> None:
        """Mark the folder as incomplete, and as this run's. If two hosts do so at the same time,
        `check_ours` fails on one of them.

        Raises:
            OutputError: the folder is not empty, or another run has marked it.
        """
        check_empty(self.output, why)
        with writing(incomplete.NAME):
            self.output.mkdir(exist_ok=True)
            try:
                _write(self._mark, self._owner.to_text())
            except FileExistsError:
                raise self._taken() from None
        self.check_ours()

    def check_ours(self) -> None:
        """Check that no other run has taken the folder.

        Raises:
            OutputError: one has.
        """
        if not self._is_ours():
            raise self._taken()

    def _is_ours(self) -> bool:
        owner = incomplete.owner(self.output)
        return owner is not None and owner.token == self._owner.token

    def _taken(self) -> OutputError:
        """The error if another run has the folder."""
        owner = None
        with contextlib.suppress(CheckpointError):
            owner = incomplete.owner(self.output)
        taker = f"another run ({owner})" if owner is not None else "someone who removed its mark"
        return OutputError(
            f"{shown(self.output)} was taken meanwhile by {taker}; its files were left to that run"
        )

    def finish(self, texts: Mapping[str, str]) -> None:
        """Write the files of LAST, and remove the mark. Then the output is whole.

        Raises:
            OutputError: another run has taken the folder, or the store failed.
        """
        self.check_ours()
        for name in LAST:
            if name in texts:
                with writing(name):
                    _write(self.output / name, texts[name])
                    if (self.output / name).read_text(encoding="utf-8") != texts[name]:
                        raise OutputError(
                            f"{name} is not what was written; the store or its mount failed"
                        )
        with writing(incomplete.NAME):
            self._mark.unlink()

    def abandon(self) -> None:
        """Remove what this run wrote, if it is still this run's and not finished."""
        with contextlib.suppress(CheckpointError, OSError):
            if self._is_ours():
                files = self._owner.files
                _clear(self.output, (lambda _: True) if files is None else claim_by_names(files))
            elif incomplete.owner(self.output) is None:
                # not marked yet; or finished, and then it is not empty and rmdir fails
                self.output.rmdir()


def _write(path: Path, text: str) -> None:
    with path.open("xb") as file:
        file.write(text.encode())
        file.flush()
        sync(file.fileno())


def _clear(folder: Path, claim: Claim) -> str | None:
    """Remove the claimed files of a folder, and its mark last.

    Returns:
        The name of an entry that cannot be removed (then the mark stays), or None.
    """
    for name in LAST:
        if claim(name):
            with contextlib.suppress(OSError):
                (folder / name).unlink(missing_ok=True)
    for path in sorted(folder.iterdir()):
        if path.name in _ALWAYS:
            continue
        with contextlib.suppress(OSError):
            if path.is_dir() and not path.is_symlink():
                remove_claimed(path, partial(_below, claim, path.name))
            elif claim(path.name):
                path.unlink(missing_ok=True)
    remaining = [path.name for path in folder.iterdir() if path.name not in _ALWAYS]
    if remaining:
        return remaining[0]
    try:
        (folder / incomplete.NAME).unlink(missing_ok=True)
        if not any(folder.iterdir()) and not is_mount_point(folder):
            folder.rmdir()
    except FileNotFoundError:  # some stores have no empty folders
        return None
    except OSError:
        return incomplete.NAME
    return None


def _below(claim: Claim, folder: str, relative: str) -> bool:
    return claim(f"{folder}/{relative}")
