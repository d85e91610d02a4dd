"""What may be deleted to replace an output: files that dus wrote, or that have the name of a
checkpoint's file. Nothing else.

A `Claim` says whether a path in the folder (with "/") is one of these; the path of a folder without
files ends with "/".
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
    """Claim the files of these names, and the folders that hold them."""
    folders = {f"{parent}/" for name in names for parent in _parents(name)}
    return lambda relative: relative in names or relative in folders or is_trace(relative)


def claim_model(folder: Path) -> Claim:
    """Claim the files of the model in a folder: those that its dus.json lists, else those that have
    the name of a checkpoint's file.
    """
    return claim_by_names(model_files(folder, read_record(folder)))


def check_replaceable(folder: Path) -> None:
    """Check that a folder holds only a model that dus wrote, or an ordinary checkpoint, and that it
    can be removed.

    Raises:
        OutputError: it holds something else, which the message names, or one of its folders cannot
            be written to.
    """
    if not any(folder.iterdir()):
        return
    record = read_record(folder)
    try:
        foreign = others(folder, claim_model(folder))
        is_model = record is not None or holds_checkpoint(folder)
    except CheckpointError as error:
        raise OutputError(f"{shown(folder)} cannot be replaced: {error}") from error
    if foreign or not is_model:
        content = f"holds {shown_list(foreign)}" if foreign else "holds no checkpoint"
        raise OutputError(
            f"{shown(folder)} {content}, and --overwrite replaces only what dus wrote, or the "
            "files of a checkpoint; move that away, or choose another -o"
        )
    for root, _, _ in os.walk(folder):
        if not os.access(root, os.W_OK | os.X_OK):
            raise OutputError(
                f"{shown(root)} cannot be written to, so what it holds could not be removed; "
                "change its permissions, or choose another -o"
            )


def others(folder: Path, claim: Claim, ignored: Collection[str] = ()) -> list[str]:
    """The paths in a folder that are not claimed, sorted; a folder without files ends with "/".

    Entries at the top level with a name in `ignored` are left out.
    """
    return sorted(_others(folder, folder, claim, ignored))


def _others(folder: Path, root: Path, claim: Claim, ignored: Collection[str] = ()) -> Iterator[str]:
    for path in folder.iterdir():
        if path.name in ignored:
            continue
        relative = path.relative_to(root).as_posix()
        mode = path.lstat().st_mode
        if stat.S_ISDIR(mode):
            inner = list(_others(path, root, claim))
            yield from inner
            if not inner and not claim(f"{relative}/") and not _has_files(path):
                yield f"{relative}/"
        elif not claim(relative) or not (stat.S_ISREG(mode) or stat.S_ISLNK(mode)):
            yield relative


def _has_files(folder: Path) -> bool:
    return any(names for _, _, names in os.walk(folder))


def remove_claimed(folder: Path, claim: Claim) -> list[str]:
    """Remove the claimed files of a folder, the folders that are then empty, and the folder itself.

    Links are removed, not followed.

    Returns:
        The paths that are left, as `others` lists them.
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
    """Move what is not claimed to the same place in another folder. If that exists, ".before" is
    appended to the name.

    Raises:
        OSError: something cannot be moved.
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
