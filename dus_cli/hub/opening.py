"""Open a base, from a directory or from the Hub."""

from __future__ import annotations

from dus_cli.common.reference import ModelRef
from dus_cli.hub import fetching
from dus_cli.progress import Progress
from dus_cli.source.checkpoint import Checkpoint, open_checkpoint


def open_base(ref: ModelRef, *, quiet: bool = True, progress: Progress | None = None) -> Checkpoint:
    """Open a base with its weights, which are fetched into the Hub's cache if necessary.

    Args:
        ref: the base.
        quiet: no progress bars from huggingface_hub.
        progress: receives the progress of fetching weights, if huggingface_hub draws nothing.

    Raises:
        DusError: the base cannot be found, fetched or read.
    """
    if ref.path is not None:
        return open_checkpoint(ref.path)
    folder, commit = fetching.fetch_small_files(ref, quiet=quiet)
    fetching.fetch_weights(ref, folder, commit, progress)
    return open_checkpoint(folder)
