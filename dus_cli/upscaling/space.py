"""Disk space that an output needs."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from dus_cli.common.storage import free_bytes
from dus_cli.common.units import human_bytes
from dus_cli.errors import OutputError, shown
from dus_cli.planning.layout import BLOCK
from dus_cli.planning.plan import UpscalePlan
from dus_cli.writing import journal
from dus_cli.writing.transfer import CopyMode, can_clone


@dataclass(frozen=True)
class Space:
    """Bytes of disk that the output needs, reflinks counted, and that are free: None where that
    is not known.
    """

    needed: int
    free: int | None
    can_clone: bool


def space_for(made: UpscalePlan, folder: Path, copy_mode: CopyMode, *, may_create: bool) -> Space:
    clones = copy_mode is not CopyMode.copy and can_clone(
        _sample(made), folder, may_create=may_create
    )
    # Config, index, card and lineage are counted with one flat mebibyte.
    needed = sum(layout.num_bytes for layout in made.shards.values()) + made.num_file_bytes
    if clones:
        needed -= made.num_clonable_bytes
    if journal.is_in(folder):  # what a streamed run has left here has its room already
        needed -= sum(
            path.stat().st_blocks * 512 for name in made.shards if (path := folder / name).exists()
        )
    return Space(needed + (1 << 20), free_bytes(folder), clones)


def _sample(made: UpscalePlan) -> Path:
    """A file of the base to try a clone with. The dry run of a Hub model has small files only."""
    shards = [shard.path for shard in made.checkpoint.shards]
    others = [path for _, path in made.files if path.exists() and path.stat().st_size >= BLOCK]
    return next((path for path in [shards[0], *others] if path.exists()), shards[0])


def check_space(space: Space, copy_mode: CopyMode, output: Path) -> None:
    if copy_mode is CopyMode.clone and not space.can_clone:
        raise OutputError(
            f"--copy-mode clone: the file system of {shown(output)} cannot share blocks with the "
            "model's (reflinks need XFS or btrfs, and both on the same one); use --copy-mode auto"
        )
    if space.free is not None and space.needed > space.free:
        raise OutputError(
            f"{shown(output)} needs {human_bytes(space.needed)} and its file system has "
            f"{human_bytes(space.free)} free; free some space or choose another place for -o"
        )
