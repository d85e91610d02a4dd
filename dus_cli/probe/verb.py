"""The verb: open, check maps, read text, load, measure, recommend."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dus_cli.common.libraries import require
from dus_cli.common.memory import available_bytes
from dus_cli.common.reference import ModelRef
from dus_cli.errors import DataError, ProbeError, ReplayError, UsageError, shown_list
from dus_cli.hub.fetching import Fetch
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import context_length, vocab_size
from dus_cli.maps.starts import IDENTITY
from dus_cli.models.precision import torch_dtype
from dus_cli.planning.plan import MapRequest, UpscalePlan
from dus_cli.probe import maps as wanted
from dus_cli.probe import recommend
from dus_cli.probe.budget import Memory, plan_memory, weight_bytes
from dus_cli.probe.found import Doublings, Measured, Probe, ProbePlan, ProbeText
from dus_cli.probe.maps import MapCandidate
from dus_cli.probe.options import ProbeOptions
from dus_cli.probe.rounds import Rounds
from dus_cli.probe.tree import Step, as_they_are, count_nodes, grow, most_states
from dus_cli.progress import Progress
from dus_cli.source.checkpoint import Checkpoint
from dus_cli.upscaling.request import UpscaleRequest
from dus_cli.upscaling.request import plan_for as run_plan

if TYPE_CHECKING:
    import torch
    from torch import nn

    from dus_cli.probe.distances import Depths
    from dus_cli.probe.measure import Batch, Meter

# Tokens that go through a layer at once: enough for efficient matrix products, few enough for a
# CPU's cache.
_BATCH_TOKENS = {"cpu": 512}
_BATCH_TOKENS_ELSEWHERE = 8192

_SEQ_LENGTH = 512

# The base as a map of its own layers, which is never refused: it tells where layers stand and what
# they cost.
_WHOLE = MapRequest(layers="0:")


def plan_probe(ref: ModelRef, options: ProbeOptions, *, quiet: bool) -> ProbePlan:
    """Plan a probe: which maps would be measured, and what that takes. Headers are read, no
    weights.

    Raises:
        DusError: any known failure; see `errors`.
    """
    return _task(ref, options, quiet=quiet).plan


def probe(ref: ModelRef, options: ProbeOptions, progress: Progress, *, quiet: bool) -> Probe:
    """Measure maps of a model.

    Raises:
        DusError: any known failure; see `errors`.
    """
    task = _task(ref, options, quiet=quiet)
    if ref.repo_id is not None:
        task = replace(task, of_base=run_plan(UpscaleRequest(ref, _WHOLE), quiet=quiet))
    return _measure(task, options, progress)


@dataclass(frozen=True)
class _Task:
    """What is measured, and on which base; `started` is the time.monotonic() of its planning."""

    of_base: UpscalePlan
    plan: ProbePlan
    fit: _Fit
    started: float


def _task(ref: ModelRef, options: ProbeOptions, *, quiet: bool) -> _Task:
    """Check maps and memory by the headers alone, before gigabytes are fetched."""
    started = time.monotonic()
    require("dus probe", "numpy", "torch", "transformers")
    if options.search and any(start.name == IDENTITY for start in options.starts):
        raise UsageError(
            "--search has nothing to find with --start identity: whatever the map, the model "
            "computes what its base does; leave one of them out"
        )
    of_base = run_plan(UpscaleRequest(ref, _WHOLE), fetch=Fetch.files, quiet=quiet)
    seq_length = _seq_length(of_base.checkpoint, options)
    requests = wanted.wanted_requests(options, len(of_base.layer_map))
    candidates = [wanted.check(of_base, request, seq_length) for request in requests]
    if not options.search and all(candidate.refused for candidate in candidates):
        raise ProbeError(
            "dus upscale refuses every one of these maps, the first because: "
            f"{candidates[0].refused}"
        )
    fit = _fit(of_base, options, seq_length, candidates)
    plan = ProbePlan(
        model=ref.text,
        name=ref.name,
        commit=of_base.base.commit,
        num_layers=len(of_base.layer_map),
        base_cost=wanted.cost_of(of_base, seq_length),
        candidates=tuple(candidates),
        seq_length=seq_length,
        precision=str(fit.dtype).removeprefix("torch."),
        device=fit.device.type,
        streams=options.stream_layers,
        memory=fit.memory,
        bound=options.within,
        layer_passes=count_nodes(grow(_layers(of_base, candidates))),
        seconds=time.monotonic() - started,
        engines=options.engines,
        starts=tuple(dict.fromkeys(options.starts)),
    )
    return _Task(of_base, plan, fit, started)


@dataclass(frozen=True)
class _Fit:
    """Where and how it is computed: `rows_at_once` go through a layer together."""

    device: torch.device
    dtype: torch.dtype
    rows_at_once: int
    memory: Memory


def _fit(
    of_base: UpscalePlan, options: ProbeOptions, seq_length: int, candidates: Sequence[MapCandidate]
) -> _Fit:
    import torch

    from dus_cli.probe.distances import KEPT_BYTES

    device = torch.device("cpu")
    available = available_bytes()
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator() or device
        available = int(0.85 * torch.accelerator.get_memory_info()[0])
    dtype = torch_dtype(options.precision.on())
    checkpoint, num_layers = of_base.checkpoint, len(of_base.layer_map)
    width = wanted.width_of(checkpoint)
    rows = max(1, _BATCH_TOKENS.get(device.type, _BATCH_TOKENS_ELSEWHERE) // seq_length)
    states = most_states(grow(_layers(of_base, candidates)), num_layers)
    if options.search:
        more = num_layers * len(options.starts)  # each layer doubled alone
        states = max(states, len(candidates) + options.best + 1 + more)
    others = min(KEPT_BYTES, 4 * options.tokens * (num_layers + 1) * width)  # for the distances
    others += 32 * rows * seq_length * width * dtype.itemsize  # within a layer
    # the files, mapped while they are loaded
    others += 0 if options.stream_layers else checkpoint.num_bytes
    memory = plan_memory(
        weight_bytes(checkpoint, of_base.stack, dtype.itemsize, streams=options.stream_layers),
        states,
        rows * seq_length * width * dtype.itemsize,
        -(-options.tokens // (rows * seq_length)),
        others,
        options.max_memory or available,
        streams=options.stream_layers,
    )
    return _Fit(device, dtype, rows, memory)


def _layers(of_base: UpscalePlan, candidates: Sequence[MapCandidate]) -> list[tuple[Step, ...]]:
    """The steps of the base's own map, and of the maps that are not refused."""
    return [
        as_they_are(of_base.layer_map.sources),
        *(c.steps for c in candidates if c.refused is None),
    ]


@dataclass
class _Measuring:
    """Measures maps of one model on one text. `passes` counts the calls of a layer for all rows.

    `scaled` collects which tensors of each layer the measured maps scale.
    """

    of_base: UpscalePlan
    meter: Meter
    num_labels: int
    seq_length: int
    scaled: list[dict[str, int]]
    progress: Progress
    passes: int = 0

    def losses(self, about: Sequence[MapCandidate], depths: Depths | None = None) -> list[float]:
        """The base's loss, and one for each map that was not refused; nats per token."""
        for candidate in about:
            for layer, factor in candidate.steps:
                if factor != 1:
                    self.scaled[layer].update(candidate.scaled)
        maps = _layers(self.of_base, about)
        count = count_nodes(grow(maps))
        self.passes += count
        self.progress.start("measuring", count * self.meter.num_groups, "layers")
        totals = self.meter.losses(maps, depths, lambda: self.progress.advance(1))
        return [total / self.num_labels for total in totals]

    def check(self, request: MapRequest) -> MapCandidate:
        return wanted.check(self.of_base, request, self.seq_length)


def _load(
    of_base: UpscalePlan,
    options: ProbeOptions,
    fit: _Fit,
    batches: Sequence[Batch],
    scaled: Sequence[Mapping[str, int]],
) -> tuple[nn.Module, Meter]:
    """Load the model, and make a meter for it on these batches."""
    from dus_cli.models import weights
    from dus_cli.probe.measure import meter_of

    checkpoint, stack = of_base.checkpoint, of_base.stack
    if options.stream_layers:
        try:
            model, ready = weights.stream(checkpoint, stack, fit.dtype, fit.device)
        except ReplayError as error:
            raise ProbeError(f"--stream-layers: {error}; leave it out") from error
    else:
        model, ready = weights.load(checkpoint, fit.dtype, fit.device)
    scaling = weights.scaling(checkpoint, stack, model, scaled, fit.dtype, fit.device)
    at_once = fit.memory.batches_at_once
    meter = meter_of(
        model, stack.num_layers, batches, ready=ready, batches_at_once=at_once, scaled=scaling
    )
    return model, meter


def _measure(task: _Task, options: ProbeOptions, progress: Progress) -> Probe:
    from dus_cli.models.devices import peak_memory_bytes
    from dus_cli.models.replay import damaged
    from dus_cli.probe.distances import Depths

    of_base, plan, fit = task.of_base, task.plan, task.fit
    checkpoint, num_layers, seq_length = of_base.checkpoint, plan.num_layers, plan.seq_length
    text, batches, num_labels, warnings = _read(
        checkpoint, options, seq_length, fit.rows_at_once, say=progress.note
    )
    progress.start("loading the model", None)
    batches = [batch.to(fit.device) for batch in batches]
    scaled: list[dict[str, int]] = [{} for _ in range(num_layers)]
    model, meter = _load(of_base, options, fit, batches, scaled)
    measuring = _Measuring(of_base, meter, num_labels, seq_length, scaled, progress)
    depths = Depths(num_layers, wanted.width_of(checkpoint), [batch.labels for batch in batches])
    candidates = list(plan.candidates)
    if options.search and not options.starts:  # the distances say which maps are worth a loss
        measuring.losses([], depths)
        distances = depths.distances()
        near = wanted.nearest(distances.angular, options.best)
        requests = [MapRequest(layers=str(layer_map), assume=options.assume) for layer_map in near]
        candidates += map(measuring.check, requests)
        base_loss, *mine = measuring.losses(candidates)
    else:
        base_loss, *mine = measuring.losses(candidates, depths)
        distances = depths.distances()
    if not math.isfinite(base_loss):
        raise damaged("on this text", model)
    values = iter(mine)
    maps = tuple(Measured(c, None if c.refused else next(values)) for c in candidates)
    doublings: tuple[Doublings, ...] = ()
    if options.search and options.starts:
        rounds = Rounds(options, num_layers, measuring.check, measuring.losses)
        doublings = tuple(rounds.doublings(plan.starts))
        maps += tuple(each for one in doublings for each in rounds.maps(one, distances))
    maps = tuple(
        replace(m, seams=tuple(map(distances.of, m.candidate.layer_map.seams))) for m in maps
    )
    lost = [m.candidate.options for m in maps if m.loss is not None and not m.is_finite]
    if lost:
        warnings = (
            *warnings,
            f"no finite loss in {plan.precision}: {shown_list(lost)}; try --precision fp32",
        )
    within, knee = _recommended(maps, base_loss, options.within, options.engines)
    return Probe(
        plan=plan,
        text=text,
        base_loss=base_loss,
        maps=maps,
        distances=distances,
        within=within,
        knee=knee,
        layer_passes=measuring.passes,
        num_groups=meter.num_groups,
        seconds=time.monotonic() - task.started,
        peak_bytes=peak_memory_bytes(fit.device),
        warnings=warnings,
        doublings=doublings,
    )


def _recommended(
    maps: Sequence[Measured], base_loss: float, bound: float, engines: Sequence[str]
) -> tuple[int | None, int | None]:
    """The numbers of the largest map within the bound, and of the knee among the depthwise scalings
    of the first start.

    Only maps whose output all `engines` compute as config.json says are considered.
    """
    deeper = [
        (number, m.loss, len(m.candidate.layer_map))
        for number, m in enumerate(maps)
        if m.is_finite
        and m.loss is not None
        and m.candidate.layer_map.is_deeper
        and m.candidate.is_right_for(engines)
    ]
    largest = recommend.within([(loss, size) for _, loss, size in deeper], (1 + bound) * base_loss)
    trimmed = [entry for entry in deeper if maps[entry[0]].candidate.layer_map.trim is not None]
    starts = [maps[number].candidate.start for number, *_ in trimmed]
    scaled = [entry for entry, start in zip(trimmed, starts, strict=True) if start == starts[0]]
    bend = recommend.knee([(loss, size) for _, loss, size in scaled])
    return None if largest is None else deeper[largest][0], None if bend is None else scaled[bend][
        0
    ]


def _read(
    checkpoint: Checkpoint,
    options: ProbeOptions,
    seq_length: int,
    rows_at_once: int,
    *,
    say: Callable[[str], object],
) -> tuple[ProbeText, list[Batch], int, tuple[str, ...]]:
    """Read the text: its description, its rows in batches of one shape, the number of predicted
    tokens, and warnings.
    """
    import numpy as np
    import torch

    from dus_cli.data.documents import Reading
    from dus_cli.data.sample import Packed, read_sample
    from dus_cli.data.streams import IGNORED
    from dus_cli.data.tokeniser import open_tokeniser
    from dus_cli.probe.measure import Batch

    fields = decoder_config(checkpoint.config).fields
    words = vocab_size(checkpoint.config, fields)
    tokeniser = open_tokeniser(checkpoint.folder, words, special_tokens=options.special_tokens)
    reading = Reading(options.text_field, options.on_bad_line)
    sample = read_sample(
        options.data, tokeniser, options.tokens, reading=reading, holdout=options.holdout, say=say
    )
    rows = Packed(sample.texts, tokeniser, seq_length, document_mask=False)
    if not len(rows):
        raise DataError(f"{shown_list(list(options.data))} has one token; give more text")
    rows_at_once = -(-len(rows) // -(-len(rows) // rows_at_once))  # as many batches, evenly filled
    batches = []
    for start in range(0, len(rows), rows_at_once):
        group = rows[start : start + rows_at_once]
        group += [row._replace(labels=np.full_like(row.labels, IGNORED)) for row in rows[:1]] * (
            rows_at_once - len(group)
        )
        ids, labels = (
            np.stack([getattr(row, name) for row in group]) for name in ("input_ids", "labels")
        )
        batches.append(Batch(torch.from_numpy(ids), torch.from_numpy(labels)))
    num_labels = sum(int((batch.labels != IGNORED).sum()) for batch in batches)
    text = ProbeText(
        options.data,
        num_labels,
        rows.num_documents,
        num_bytes=sample.num_bytes,
        skipped=sample.skipped,
        before=tokeniser.before,
        unread=sample.unread,
    )
    few = rows.num_tokens < 0.9 * options.tokens
    warnings = (
        (f"the data has {rows.num_tokens:,} tokens where --tokens asks for {options.tokens:,}",)
        if few
        else ()
    )
    return text, batches, num_labels, warnings


def _seq_length(checkpoint: Checkpoint, options: ProbeOptions) -> int:
    most = context_length(decoder_config(checkpoint.config).fields)
    if options.seq_length is not None and most is not None and options.seq_length > most:
        raise ProbeError(
            f"--seq-length {options.seq_length} is more than the model's {most} positions; choose "
            "less"
        )
    return options.seq_length or min(_SEQ_LENGTH, most or _SEQ_LENGTH)
