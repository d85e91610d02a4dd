"""A base opened, wherever it lies."""

from __future__ import annotations

from dus_cli.common.reference import ModelRef
from dus_cli.hub import fetching
from dus_cli.progress import Progress
from dus_cli.source.checkpoint import Checkpoint, open_checkpoint


def open_base(ref: ModelRef, *, quiet: bool = True, progress: Progress | None = None) -> Checkpoint:
    """A base with its weights, from its directory or by way of the Hub's cache. Arguments as of
    `plan`.

    Raises:
        DusError: as `plan`.
    """
    if ref.path is not None:
        return open_checkpoint(ref.path)
    folder, commit = fetching.fetch_small_files(ref, quiet=quiet)
    fetching.fetch_weights(ref, folder, commit, progress)
    return open_checkpoint(folder)
