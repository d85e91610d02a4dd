"""What upscale is to write: the request from its options, and the plan made from it."""

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
class UpscaleRequest:
    """Everything that decides the bytes of the output.

    Attributes:
        ref: the base.
        request: the layer map and its start.
        max_shard_bytes: size of the largest shard.
        dtype: what floating-point tensors are cast to; None for no cast.
        remaking: the lineage that the rest comes from (--from), or None. What it records of the
            base is recorded again.
    """

    ref: ModelRef
    request: MapRequest
    max_shard_bytes: int = DEFAULT_SHARD_BYTES
    dtype: Dtype | None = None
    remaking: Remaking | None = None

    @classmethod
    def of(cls, model: str | Path | None, options: UpscaleOptions) -> UpscaleRequest:
        """The request of some options. If `model` is None it is the base of `options.lineage`.

        Raises:
            UsageError: the options exclude each other, or there is no model.
            DusError: the lineage cannot be used.
        """
        if options.lineage is not None:
            return cls._from_lineage(options.lineage, model, options)
        if model is None:
            raise UsageError("no model is given; give a directory or a Hub id, or lineage")
        ref = ModelRef.parse(model_text(model), revision=options.revision, token=options.token)
        return cls(ref, _request(options), options.max_shard_size, options.dtype)

    @classmethod
    def _from_lineage(
        cls, path: Path, model: str | Path | None, options: UpscaleOptions
    ) -> UpscaleRequest:
        """The request that a lineage records."""
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
        """The base as the lineage will record it; `commit` is None for a directory."""
        return Base(self.ref, commit) if self.remaking is None else self.remaking.base()

    def plan(
        self, base: Base, checkpoint: Checkpoint, absent: Mapping[str, int] | None = None
    ) -> UpscalePlan:
        """The plan for an open base, checked against the lineage if there is one.

        The arguments are those of `make_plan`.

        Raises:
            LayerMapError, ConfigError, CheckpointError: as `make_plan`.
            VerificationError: as `Remaking.check`.
        """
        new_plan = make_plan(
            base, checkpoint, self.request, self.max_shard_bytes, self.dtype, absent
        )
        if self.remaking is not None:
            self.remaking.check(new_plan)
        return new_plan


def refuse_recorded(fields: Collection[str]) -> None:
    """Refuse options beside --from that its lineage records.

    Args:
        fields: the fields of `RECORDED` that were given.

    Raises:
        UsageError: there is at least one.
    """
    if fields:
        names = [f"--{name.replace('_', '-')}" for name in RECORDED if name in fields]
        raise UsageError(f"--from gives {' and '.join(names)} as recorded; leave it out")


def _request(options: UpscaleOptions) -> MapRequest:
    """The layer map and its start; --identity and --start identity are the same."""
    identity, start, recipe = options.identity, StartRule(), options.recipe
    if options.start is not None:
        start = StartRule.parse(options.start)
    if start.name == IDENTITY:
        identity, start = True, StartRule()
    elif options.start is not None and (
        identity or (recipe is not None and RECIPES[recipe].identity)
    ):
        option = "--identity" if identity else f"--recipe {recipe}"
        raise UsageError(f"{option} decides how new layers start; leave out --start")
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


def plan_for(
    request: UpscaleRequest,
    *,
    fetch: Fetch = Fetch.weights,
    quiet: bool = True,
    progress: Progress | None = None,
) -> UpscalePlan:
    """Open the base and decide everything that will be written. Only the Hub's cache is written to.

    Args:
        request: base, map, and what else decides the bytes.
        fetch: which files of a Hub model are fetched into the cache; of weights that are not, the
            headers are read.
        quiet: no progress bars from huggingface_hub.
        progress: receives the progress of fetching weights, if huggingface_hub draws nothing.

    Raises:
        DusError: any known failure; see `errors`.
    """
    ref = request.ref
    if ref.path is not None:
        return request.plan(request.base(), open_checkpoint(ref.path))
    folder, commit = fetching.fetch_small_files(ref, fetch=fetch, quiet=quiet)
    base = request.base(commit)
    # Plan from the headers alone first: if the map does not fit the model, the error comes before
    # gigabytes are fetched.
    remote = fetching.RemoteHeaders(ref, commit, folder)
    absent = fetching.absent_files(ref, commit, folder)
    plan = request.plan(base, open_checkpoint(folder, remote), absent)
    if fetch is not Fetch.weights:
        return plan
    fetching.fetch_weights(ref, folder, commit, progress)
    return request.plan(
        base, open_checkpoint(folder, remote), fetching.absent_files(ref, commit, folder)
    )
