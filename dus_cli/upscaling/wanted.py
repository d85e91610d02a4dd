"""What is asked of upscale, and the plan made from it."""

from __future__ import annotations

import dataclasses
from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from dus_cli.common.reference import ModelRef, model_text
from dus_cli.errors import UsageError
from dus_cli.hub import fetching
from dus_cli.hub.fetching import Fetch
from dus_cli.maps.recipes import RECIPES
from dus_cli.maps.starts import IDENTITY, StartRule
from dus_cli.planning.dtypes import Dtype
from dus_cli.planning.plan import DEFAULT_SHARD_BYTES, Base, MapRequest, UpscalePlan, make_plan
from dus_cli.progress import Progress
from dus_cli.release.remaking import Remaking, read_remaking
from dus_cli.source.checkpoint import Checkpoint, open_checkpoint
from dus_cli.upscaling.options import RECORDED, UpscaleOptions


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

    @classmethod
    def of(cls, model: str | Path | None, options: UpscaleOptions) -> Wanted:
        """What these options ask of a model; None stands for the base of `options.lineage`.

        Raises:
            UsageError: options that exclude each other, or no model.
            DusError: the lineage cannot be followed.
        """
        if options.lineage is not None:
            return cls._again(options.lineage, model, options)
        if model is None:
            raise UsageError("which model? give a directory or a Hub id, or lineage")
        ref = ModelRef.parse(model_text(model), revision=options.revision, token=options.token)
        return cls(ref, _request(options), options.max_shard_size, options.dtype)

    @classmethod
    def _again(cls, path: Path, model: str | Path | None, options: UpscaleOptions) -> Wanted:
        """What a lineage records."""
        differing = [
            field.name
            for field in dataclasses.fields(options)
            if field.name in RECORDED and getattr(options, field.name) != field.default
        ]
        refuse_recorded(differing)
        base = None if model is None else model_text(model)
        remaking = read_remaking(path, base, token=options.token)
        request = replace(remaking.request, engines=options.engines)
        remaking = replace(remaking, request=request)
        return cls(*remaking.parts, remaking)

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


def refuse_recorded(fields: Collection[str]) -> None:
    """Check that nothing is given that a lineage records.

    Args:
        fields: those of `RECORDED` that were given.

    Raises:
        UsageError: there is one.
    """
    if fields:
        names = [f"--{name.replace('_', '-')}" for name in RECORDED if name in fields]
        raise UsageError(f"--from says {' and '.join(names)} already, as it was; leave it out")


def _request(options: UpscaleOptions) -> MapRequest:
    """The layer map and its start; `identity` and a start of that name are one."""
    identity, start, recipe = options.identity, StartRule(), options.recipe
    if options.start is not None:
        start = StartRule.parse(options.start)
    if start.name == IDENTITY:
        identity, start = True, StartRule()
    elif options.start is not None and (
        identity or (recipe is not None and RECIPES[recipe].identity)
    ):
        what = "--identity" if identity else f"--recipe {recipe}"
        raise UsageError(f"{what} says how new layers start; leave out --start")
    return MapRequest(
        trim=options.trim,
        layers=options.layers,
        copies=options.copies,
        recipe=recipe,
        identity=identity,
        assume=options.assume,
        engines=options.engines,
        double=options.double,
        start=start,
    )


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
