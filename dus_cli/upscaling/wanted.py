"""What is asked of upscale, and the plan made from it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from dus_cli.common.reference import ModelRef
from dus_cli.hub import fetching
from dus_cli.hub.fetching import Fetch
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import DEFAULT_SHARD_BYTES, Base, MapRequest, UpscalePlan, make_plan
from dus_cli.progress import Progress
from dus_cli.release.remaking import Remaking
from dus_cli.source.checkpoint import Checkpoint, open_checkpoint


@dataclass(frozen=True)
class Wanted:
    """What decides the bytes that are written: the base, the layer map, the largest shard, the
    cast.

    `remaking` is the lineage that these come from, where one is followed again: what it records of
    the base is recorded again.
    """

    ref: ModelRef
    request: MapRequest
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    dtype: Dtype | None = None
    remaking: Remaking | None = None

    def base(self, commit: str | None = None) -> Base:
        return Base(self.ref, commit) if self.remaking is None else self.remaking.base()

    def plan(
        self, base: Base, checkpoint: Checkpoint, absent: Mapping[str, int] | None = None
    ) -> UpscalePlan:
        """The plan for a base that is open, held against the lineage where there is one. Arguments
        as of `make_plan`.

        Raises:
            LayerMapError, ConfigError, CheckpointError: as `make_plan`.
            VerificationError: as `Remaking.check`.
        """
        made = make_plan(base, checkpoint, self.request, self.max_shard_bytes, self.dtype, absent)
        if self.remaking is not None:
            self.remaking.check(made)
        return made


def plan(
    wanted: Wanted,
    *,
    fetch: Fetch = Fetch.weights,
    quiet: bool = True,
    progress: Progress | None = None,
) -> UpscalePlan:
    """Find the model and decide everything that will be written. Nothing is written but the Hub's
    cache.

    Args:
        wanted: base, map, and what else decides the bytes.
        fetch: what of a Hub model comes into the cache; of weights that do not, the headers are
            read.
        quiet: no progress bars from huggingface_hub.
        progress: told of weights that are fetched, where huggingface_hub draws nothing.

    Raises:
        DusError: any known failure; see `errors`.
    """
    ref = wanted.ref
    if ref.path is not None:
        return wanted.plan(wanted.base(), open_checkpoint(ref.path))
    folder, commit = fetching.fetch_small_files(ref, fetch=fetch, quiet=quiet)
    base = wanted.base(commit)
    # The plan from the headers alone says whether the map and the model fit, before gigabytes are
    # fetched.
    remote = fetching.RemoteHeaders(ref, commit, folder)
    absent = fetching.absent_files(ref, commit, folder)
    made = wanted.plan(base, open_checkpoint(folder, remote), absent)
    if fetch is not Fetch.weights:
        return made
    fetching.fetch_weights(ref, folder, commit, progress)
    return wanted.plan(
        base, open_checkpoint(folder, remote), fetching.absent_files(ref, commit, folder)
    )
