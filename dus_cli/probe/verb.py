"""The verb: open, check maps, read text, load, measure, recommend."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from dus_cli.common.libraries import require
from dus_cli.common.memory import available_bytes
from dus_cli.common.reference import ModelRef
from dus_cli.errors import DataError, ProbeError, shown_list
from dus_cli.hub.fetching import Fetch
from dus_cli.maps.model_config import decoder_config
from dus_cli.maps.shape import context_length, vocab_size
from dus_cli.models.precision import torch_dtype
from dus_cli.planning.plan import MapRequest, UpscalePlan
from dus_cli.probe import maps as wanted
from dus_cli.probe import recommend
from dus_cli.probe.budget import Memory, plan_memory, weight_bytes
from dus_cli.probe.found import Measured, Probe, Text
from dus_cli.probe.maps import Candidate
from dus_cli.probe.options import ProbeOptions
from dus_cli.probe.tree import count_nodes, grow, most_states
from dus_cli.progress import Progress
from dus_cli.source.checkpoint import Checkpoint
from dus_cli.upscaling.wanted import Wanted
from dus_cli.upscaling.wanted import plan as run_plan

if TYPE_CHECKING:
    import torch

    from dus_cli.probe.distances import Depths
    from dus_cli.probe.measure import Batch

# Tokens that go through a layer at once: enough for the matrix products, and few enough for a CPU's
# cache.
_BATCH_TOKENS = {"cpu": 512}
_BATCH_TOKENS_ELSEWHERE = 8192

_SEQ_LENGTH = 512

# The base as the map of its own layers: where they stand and what they cost, whatever else may be
# refused.
_WHOLE = MapRequest(layers="0:")


def probe(
    ref: ModelRef, options: ProbeOptions, progress: Progress, *, dry_run: bool, quiet: bool
) -> Probe:
    """Measure maps of a model, or say what that would take.

    Raises:
        DusError: any known failure; see `errors`.
    """
    started = time.monotonic()
    require("dus probe", "numpy", "torch", "transformers")
    whole = Wanted(ref, _WHOLE)
    # From the headers alone: that the maps and the model fit is known before gigabytes are fetched.
    of_base = run_plan(whole, fetch=Fetch.files, quiet=quiet)
    seq_length = _seq_length(of_base.checkpoint, options)
    requests = wanted.wanted_requests(options, len(of_base.layer_map))
    candidates = [wanted.check(of_base, request, seq_length) for request in requests]
    if not options.search and all(candidate.refused for candidate in candidates):
        raise ProbeError(
            "dus upscale refuses every one of these maps, the first because: "
            f"{candidates[0].refused}"
        )
    plan = _plan(of_base, options, seq_length, candidates)
    found = Probe(
        model=ref.text,
        name=ref.name,
        commit=of_base.base.commit,
        num_layers=len(of_base.layer_map),
        base_cost=wanted.cost_of(of_base, seq_length),
        base_loss=None,
        maps=tuple(Measured(candidate, None) for candidate in candidates),
        text=None,
        seq_length=seq_length,
        precision=str(plan.dtype).removeprefix("torch."),
        device=plan.device.type,
        streams=options.stream_layers,
        memory=plan.memory,
        distances=None,
        bound=options.within,
        within=None,
        knee=None,
        layer_passes=count_nodes(grow(_layers(of_base, candidates))),
        seconds=time.monotonic() - started,
        peak_bytes=None,
        engines=options.engines,
    )
    if dry_run:
        return found
    if ref.repo_id is not None:
        of_base = run_plan(whole, quiet=quiet)
    return _measure(found, of_base, options, plan, progress, started)


@dataclass(frozen=True)
class _Plan:
    """Where and how it is computed."""

    device: torch.device
    dtype: torch.dtype
    rows_at_once: int
    memory: Memory


def _plan(
    of_base: UpscalePlan, options: ProbeOptions, seq_length: int, candidates: Sequence[Candidate]
) -> _Plan:
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
        states = max(states, len(candidates) + options.best + 1)
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
    return _Plan(device, dtype, rows, memory)


def _layers(of_base: UpscalePlan, candidates: Sequence[Candidate]) -> list[tuple[int, ...]]:
    """The base and the maps that are measured."""
    return [
        of_base.layer_map.sources,
        *(c.layer_map.sources for c in candidates if c.refused is None),
    ]


def _measure(
    found: Probe,
    of_base: UpscalePlan,
    options: ProbeOptions,
    plan: _Plan,
    progress: Progress,
    started: float,
) -> Probe:
    from dus_cli.models.devices import peak_memory_bytes
    from dus_cli.probe import weights
    from dus_cli.probe.distances import Depths
    from dus_cli.probe.measure import Meter
    from dus_cli.probe.replay import damaged

    checkpoint, num_layers = of_base.checkpoint, found.num_layers
    text, batches, num_labels, warnings = _read(
        checkpoint, options, found.seq_length, plan.rows_at_once
    )
    progress.start("loading the model", None)
    if options.stream_layers:
        model, ready = weights.stream(checkpoint, of_base.stack, plan.dtype, plan.device)
    else:
        model, ready = weights.load(checkpoint, plan.dtype, plan.device)
    batches = [batch.to(plan.device) for batch in batches]
    meter = Meter(model, num_layers, batches, ready, plan.memory.batches_at_once)
    depths = Depths(num_layers, wanted.width_of(checkpoint), [batch.labels for batch in batches])
    candidates = [measured.candidate for measured in found.maps]
    passes = 0

    def losses(about: Sequence[Candidate], depths: Depths | None) -> list[float]:
        nonlocal passes
        maps = _layers(of_base, about)
        count = count_nodes(grow(maps))
        passes += count
        progress.start("measuring", count * meter.num_groups, "layers")
        return [
            total / num_labels for total in meter.losses(maps, depths, lambda: progress.advance(1))
        ]

    if options.search:  # the distances say which maps are worth a loss
        losses([], depths)
        distances = depths.distances()
        near = wanted.nearest(distances.angular, options.best)
        requests = [MapRequest(layers=str(layer_map), assume=options.assume) for layer_map in near]
        candidates += [wanted.check(of_base, request, found.seq_length) for request in requests]
        base_loss, *mine = losses(candidates, None)
    else:
        base_loss, *mine = losses(candidates, depths)
        distances = depths.distances()
    if not math.isfinite(base_loss):
        raise damaged("on this text", model)
    values = iter(mine)
    maps = tuple(
        Measured(
            c,
            None if c.refused else next(values),
            tuple(distances.of(seam) for seam in c.layer_map.seams),
        )
        for c in candidates
    )
    lost = [m.candidate.options for m in maps if m.loss is not None and not m.is_finite]
    if lost:
        warnings = (
            *warnings,
            f"no finite loss in {found.precision}: {shown_list(lost)}; try --precision fp32",
        )
    within, knee = _recommended(maps, base_loss, options.within, options.engines)
    return replace(
        found,
        base_loss=base_loss,
        maps=maps,
        text=text,
        memory=replace(plan.memory, num_groups=meter.num_groups),
        distances=distances,
        within=within,
        knee=knee,
        layer_passes=passes,
        seconds=time.monotonic() - started,
        peak_bytes=peak_memory_bytes(plan.device),
        warnings=warnings,
    )


def _recommended(
    maps: Sequence[Measured], base_loss: float, bound: float, engines: Sequence[str]
) -> tuple[int | None, int | None]:
    """Numbers of the largest map within the bound and of the knee among the depthwise scalings.

    Only of those whose output `engines` compute as config.json says.
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
    scaled = [entry for entry in deeper if maps[entry[0]].candidate.layer_map.trim is not None]
    bend = recommend.knee([(loss, size) for _, loss, size in scaled])
    return None if largest is None else deeper[largest][0], None if bend is None else scaled[bend][
        0
    ]


def _read(
    checkpoint: Checkpoint, options: ProbeOptions, seq_length: int, rows_at_once: int
) -> tuple[Text, list[Batch], int, tuple[str, ...]]:
    """The text, its rows in batches of one shape, how many tokens are predicted, and warnings."""
    import numpy as np
    import torch

    from dus_cli.data.documents import Reading
    from dus_cli.data.sample import Packed, read_sample
    from dus_cli.data.streams import IGNORED
    from dus_cli.data.tokeniser import Tokeniser
    from dus_cli.probe.measure import Batch

    fields = decoder_config(checkpoint.config).fields
    words = vocab_size(checkpoint.config, fields)
    tokeniser = Tokeniser(checkpoint.folder, words, special_tokens=options.special_tokens)
    reading = Reading(options.text_field, options.on_bad_line)
    sample = read_sample(
        options.data, tokeniser, options.tokens, reading=reading, holdout=options.holdout
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
    text = Text(
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
