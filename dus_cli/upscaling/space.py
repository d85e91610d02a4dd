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
    """Bytes of disk: `needed` for the output beside what reflinks share, and `free`, None if not
    known.
    """

    needed: int
    free: int | None
    can_clone: bool


def space_for(plan: UpscalePlan, folder: Path, copy_mode: CopyMode, *, may_create: bool) -> Space:
    """The disk space for an output below `folder`. `may_create` allows trying a clone there."""
    clones = copy_mode is not CopyMode.copy and can_clone(
        _sample(plan), folder, may_create=may_create
    )
    # One mebibyte is added for config, index, card and lineage.
    needed = sum(layout.num_bytes for layout in plan.shards.values()) + plan.num_file_bytes
    if clones:
        needed -= plan.num_clonable_bytes
    if journal.is_in(folder):  # an earlier streamed run's bytes take up their space already
        needed -= sum(
            path.stat().st_blocks * 512 for name in plan.shards if (path := folder / name).exists()
        )
    return Space(needed + (1 << 20), free_bytes(folder), clones)


def _sample(plan: UpscalePlan) -> Path:
    """A file of the base to try a clone with. The dry run of a Hub model has only small files."""
    shards = [shard.path for shard in plan.checkpoint.shards]
    others = [path for _, path in plan.files if path.exists() and path.stat().st_size >= BLOCK]
    return next((path for path in [shards[0], *others] if path.exists()), shards[0])


def check_space(space: Space, copy_mode: CopyMode, output: Path) -> None:
    """Check that the output fits on the disk, and that it can be cloned if that is required.

    Raises:
        OutputError: it does not, or cannot.
    """
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
