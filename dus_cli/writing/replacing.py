"""What may be deleted for a new output: files that dus wrote, or that a checkpoint's files are
called. Nothing else.

A `Claim` tells whether a file, by its path in the folder with "/", is one of these; of a folder
without files the path ends with "/".
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Callable, Collection, Iterator
from pathlib import Path

from dus_cli.errors import CheckpointError, OutputError, shown, shown_list
from dus_cli.source.belonging import holds_checkpoint, is_trace, model_files, read_record

Claim = Callable[[str], bool]


def claim_by_names(names: Collection[str]) -> Claim:
    """The files of these names, and the folders that they lie in."""
    folders = {f"{parent}/" for name in names for parent in _parents(name)}
    return lambda relative: relative in names or relative in folders or is_trace(relative)


def claim_model(folder: Path) -> Claim:
    """The files of the model in a folder: as its dus.json names them, else as the files of a
    checkpoint are called.
    """
    return claim_by_names(model_files(folder, read_record(folder)))


def check_replaceable(folder: Path) -> None:
    """Check that a folder has nothing but a model that dus wrote, or an ordinary checkpoint, and
    that it can be removed.

    Raises:
        OutputError: it has something else, which is named, or one of its folders cannot be written
            to.
    """
    if not any(folder.iterdir()):
        return
    record = read_record(folder)
    try:
        found = others(folder, claim_model(folder))
        is_model = record is not None or holds_checkpoint(folder)
    except CheckpointError as error:
        raise OutputError(f"{shown(folder)} cannot be replaced: {error}") from error
    if found or not is_model:
        what = f"holds {shown_list(found)}" if found else "holds no checkpoint"
        raise OutputError(
            f"{shown(folder)} {what}, and --overwrite replaces only what dus wrote, or the files "
            "of a checkpoint; move that away, or choose another -o"
        )
    for root, _, _ in os.walk(folder):
        if not os.access(root, os.W_OK | os.X_OK):
            raise OutputError(
                f"{shown(root)} cannot be written to, so what it holds could not be removed; "
                "change its permissions, or choose another -o"
            )


def others(folder: Path, claim: Claim, ignored: Collection[str] = ()) -> list[str]:
    """What a folder holds besides the claimed files, sorted; a folder without files ends with "/".

    Of `ignored` names at the top nothing is told.
    """
    return sorted(_others(folder, folder, claim, ignored))


def _others(folder: Path, root: Path, claim: Claim, ignored: Collection[str] = ()) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name in ignored:
            continue
        relative = path.relative_to(root).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            found = list(_others(path, root, claim))
            yield from found
            if not found and not claim(f"{relative}/") and not _has_files(path):
                yield f"{relative}/"
        elif not claim(relative) or not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            yield relative


def _has_files(folder: Path) -> bool:
    return any(names for _, _, names in os.walk(folder))


def remove_claimed(folder: Path, claim: Claim) -> list[str]:
    """Remove the claimed files of a folder, the folders that are empty then, and itself: what is
    left of it.

    Links are removed, and not followed.
    """
    for root, folders, names in os.walk(folder, topdown=False):
        for name in names:
            path = Path(root) / name
            if claim(path.relative_to(folder).as_posix()):
                with contextlib.suppress(OSError):
                    path.unlink()
        for name in folders:
            path = Path(root) / name
            with contextlib.suppress(OSError):
                path.unlink() if path.is_symlink() and claim(
                    path.relative_to(folder).as_posix()
                ) else path.rmdir()
    with contextlib.suppress(OSError):
        folder.rmdir()
    return others(folder, lambda _: False) or [f"{folder.name}/"] if folder.exists() else []


def move_others(source: Path, target: Path, claim: Claim) -> None:
    """Move what is not claimed to the same place in another folder; where that is taken, with
    ".before" at its name.

    Raises:
        OSError: it cannot be moved.
    """
    for relative in others(source, claim):
        place = target / relative
        place.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(place):
            place = place.with_name(f"{place.name}.before")
        (source / relative).rename(place)


def _parents(name: str) -> Iterator[str]:
    parts = name.split("/")[:-1]
    for count in range(1, len(parts) + 1):
        yield "/".join(parts[:count])
