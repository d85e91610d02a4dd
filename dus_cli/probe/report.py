"""A probe and its plan, as JSON with a documented schema and for a person."""

from __future__ import annotations

import math
import shlex
from collections.abc import Sequence
from typing import Any

from dus_cli import __version__
from dus_cli.common.reports import SCHEMA
from dus_cli.common.units import counted, human_bytes, human_count
from dus_cli.probe.found import Doublings, Measured, Probe, ProbePlan, ProbeText
from dus_cli.probe.maps import Cost
from dus_cli.release.lineage import seam_record

# The width of a map's name, with which the table has 80 columns.
_WIDTH = 15


def perplexity(loss: float) -> float:
    """Exp of a mean cross-entropy in nats; infinite if it does not fit a float."""
    return math.exp(loss) if loss < 700 else math.inf


def plan_json(plan: ProbePlan) -> dict[str, Any]:
    """The report of `--dry-run --json`: that of a probe, with null for what was not measured."""
    maps = [Measured(candidate, None) for candidate in plan.candidates]
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "dry_run": True,
        "model": plan.model,
        "commit": plan.commit,
        "data": None,
        "seq_length": plan.seq_length,
        "precision": plan.precision,
        "device": plan.device,
        "stream_layers": plan.streams,
        "base": _figures(None, plan.base_cost),
        "for": list(plan.engines),
        "maps": _maps_json(plan, maps),
        "recommended": {"within": None, "knee": None},
        "distances": None,
        "layer_passes": plan.layer_passes,
        "memory": {
            "estimate": plan.memory.total,
            "weights": plan.memory.weights,
            "states": plan.memory.states,
            "groups": plan.memory.num_groups,
            "peak": None,
        },
        "seconds": round(plan.seconds, 3),
        "warnings": [],
    }
    return report | _starts_json(plan, plan.layer_passes, ())


def probe_json(found: Probe) -> dict[str, Any]:
    """The report of `--json`; docs/layout.md describes each field."""
    plan, planned = found.plan, plan_json(found.plan)
    return (
        planned
        | {
            "dry_run": False,
            "data": _text_json(found.text),
            "base": _figures(found.base_loss, plan.base_cost),
            "maps": _maps_json(plan, found.maps),
            "recommended": {
                "within": _within_json(found),
                "knee": None if found.knee is None else _choice(found, found.knee),
            },
            "distances": {
                "tokens": found.distances.num_tokens,
                "angular": _rounded(found.distances.angular),
                "block_influence": _rounded(found.distances.influence),
            },
            "layer_passes": found.layer_passes,
            "memory": planned["memory"] | {"groups": found.num_groups, "peak": found.peak_bytes},
            "seconds": round(found.seconds, 3),
            "warnings": list(found.warnings),
        }
        | _starts_json(plan, found.layer_passes, found.doublings)
    )


def _text_json(text: ProbeText) -> dict[str, Any]:
    return {
        "files": list(text.files),
        "tokens": text.tokens,
        "documents": text.documents,
        "bytes": text.num_bytes,
        "skipped": text.skipped,
        "unread_files": text.unread.to_json(),
        "before": list(text.before),
    }


def _rounded(table: Sequence[Sequence[float]]) -> list[list[float]]:
    return [[round(value, 6) for value in row] for row in table]


def _starts_json(
    plan: ProbePlan, layer_passes: int, doublings: Sequence[Doublings]
) -> dict[str, Any]:
    """The fields that a report has only where starts were asked for."""
    if not plan.starts:
        return {}
    return {
        "starts": [str(start) for start in plan.starts],
        "base_passes": round(layer_passes / plan.num_layers, 2),
        "doublings": [_doublings_json(one) for one in doublings],
    }


def _maps_json(plan: ProbePlan, maps: Sequence[Measured]) -> list[dict[str, Any]]:
    records = [_map_json(measured) for measured in maps]
    if plan.starts:
        for record, measured in zip(records, maps, strict=True):
            record["start"] = str(measured.candidate.start)
            record["factors"] = list(measured.candidate.factors) or None
    return records


def _doublings_json(doublings: Doublings) -> dict[str, Any]:
    costs = doublings.costs
    return {
        "start": str(doublings.start),
        "layers": [
            {"layer": layer, "loss": None if cost is None else loss, "above_base": cost}
            for layer, (loss, cost) in enumerate(zip(doublings.losses, costs, strict=True))
        ],
        "most": doublings.most,
        "not_borne": list(doublings.not_borne),
    }


def _figures(loss: float | None, cost: Cost | None) -> dict[str, Any]:
    loss = loss if loss is not None and math.isfinite(loss) else None
    ends = None if loss is None else perplexity(loss)
    return {
        "num_layers": None if cost is None else cost.num_layers,
        "parameters": None if cost is None else cost.num_parameters,
        "bytes": None if cost is None else cost.num_bytes,
        "flops_per_token": None if cost is None else cost.flops_per_token,
        "loss": loss,
        "perplexity": ends if ends is None or math.isfinite(ends) else None,
    }


def _map_json(measured: Measured) -> dict[str, Any]:
    layer_map = measured.candidate.layer_map
    seams = [seam_record(seam) for seam in layer_map.seams]
    if measured.seams:
        for record, (angular, influence) in zip(seams, measured.seams, strict=True):
            record |= {
                "angular_distance": round(angular, 6),
                "block_influence": round(influence, 6),
            }
    return {
        "trim": layer_map.trim,
        "layers": str(layer_map),
        "layer_map": list(layer_map.sources),
        **_figures(measured.loss, measured.candidate.cost),
        "num_layers": len(layer_map),
        "seams": seams,
        "engines": [judged.to_json() for judged in measured.candidate.engines],
        "options": measured.candidate.options,
        "refused": measured.candidate.refused,
    }


def _within_json(found: Probe) -> dict[str, Any]:
    choice = (
        {"map": None, "command": None} if found.within is None else _choice(found, found.within)
    )
    bound = found.plan.bound
    return {"share": bound, "loss": (1 + bound) * found.base_loss, **choice}


def _choice(found: Probe, number: int) -> dict[str, Any]:
    return {"map": number, "command": upscale_command(found, number)}


def upscale_command(found: Probe, number: int) -> str:
    """The shell command that writes the model of a map."""
    candidate = found.maps[number].candidate
    output = f"{found.plan.name.rpartition('/')[2]}-{len(candidate.layer_map)}-layers"
    model = shlex.quote(found.plan.model)
    return f"dus upscale {model} {candidate.options} -o {shlex.quote(output)}"


def plan_text(plan: ProbePlan) -> str:
    """The maps that would be measured, what they cost and the memory that this takes."""
    memory = plan.memory
    lines = _table(plan, None, [Measured(candidate, None) for candidate in plan.candidates])
    needed = f"{human_bytes(memory.total)} of memory, {human_bytes(memory.weights)} of it weights"
    lines += ["", f"Dry run: nothing was measured. It would take about {needed}."]
    if memory.num_groups > 1:
        lines.append(f"The rows would go through the layers in {memory.num_groups} groups.")
    return "\n".join(lines)


def probe_text(found: Probe) -> str:
    """The table and the advice. Apart from commands, long maps, engines and warnings they fit in 80
    columns.
    """
    table = _table(found.plan, found.base_loss, found.maps)
    warnings = [f"warning: {warning}" for warning in found.warnings]
    return "\n".join([*table, "", *_closing(found), *warnings])


def _table(plan: ProbePlan, base_loss: float | None, maps: Sequence[Measured]) -> list[str]:
    """The lines of the table: a row for each map, and below them what does not fit in a row.
    `base_loss` is None if nothing was measured.
    """
    candidates = [measured.candidate for measured in maps]
    rows = [
        ["map", "layers", "params", "bytes", "FLOP/token", "loss", "perplexity", "seam"],
        _row("base", plan.base_cost, plan.base_cost.num_layers, base_loss, ""),
    ]
    for measured in maps:
        layer_map, name = measured.candidate.layer_map, measured.candidate.name
        seam = f"{max(angular for angular, _ in measured.seams):.3f}" if measured.seams else ""
        rows.append(_row(name, measured.candidate.cost, len(layer_map), measured.loss, seam))
    wrong = list(dict.fromkeys(engine for each in candidates for engine in each.wrong))
    if wrong:  # a column of the engines' initials
        initials = ["".join(engine.name[0] for engine in each.wrong) for each in candidates]
        rows = [[*row, cell] for row, cell in zip(rows, ["not in", "", *initials], strict=True)]
    if plan.starts:
        starts = ["start", "", *(str(candidate.start) for candidate in candidates)]
        rows = [[row[0], cell, *row[1:]] for row, cell in zip(rows, starts, strict=True)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    refused = [candidate for candidate in candidates if candidate.refused is not None]
    lines += [f"refused: {candidate.options}: {candidate.refused}" for candidate in refused]
    typed = [candidate.name for candidate in candidates if candidate.layer_map.trim is None]
    lines += [f"{_short(name)} is {name}" for name in typed if len(name) > _WIDTH]
    if wrong:
        names = ", ".join(f"{engine.name[0]} {engine.title}" for engine in wrong)
        lines.append(f"not in: {names} would not compute it as config.json says")
    return lines


def _row(name: str, cost: Cost | None, num_layers: int, loss: float | None, seam: str) -> list[str]:
    size = ["", "", ""]
    if cost is not None:
        size = [
            human_count(cost.num_parameters),
            human_bytes(cost.num_bytes),
            human_count(cost.flops_per_token),
        ]
    ends = ["", ""] if loss is None else [f"{loss:.3f}", _shown_perplexity(perplexity(loss))]
    return [
        _short(name),
        str(num_layers),
        *size,
        *(["refused", ""] if cost is None else ends),
        seam,
    ]


def _short(name: str) -> str:
    return name if len(name) <= _WIDTH else name[: _WIDTH - 1] + "…"


def _shown_perplexity(value: float) -> str:
    return f"{value:.2f}" if value < 1e5 else f"{value:.2g}"


def _closing(found: Probe) -> list[str]:
    peak = (
        "" if found.peak_bytes is None else f", {human_bytes(found.peak_bytes)} of memory at most"
    )
    documents = counted(found.text.documents, "document")
    lines = [
        f"loss: nats per token, over {found.text.tokens:,} tokens of {documents};",
        "seam: angular distance of the layers that meet, 0 (alike) to 1 (opposite)",
        *([f"not read: {found.text.unread}"] if found.text.unread.count else []),
        *map(_borne, found.doublings),
        f"{found.layer_passes} passes of a layer, {found.seconds:.0f} s{peak}",
        "",
    ]
    bound = found.plan.bound
    limit = (1 + bound) * found.base_loss
    if found.within is None:
        engines = found.plan.engines
        right = f" that is right for {', '.join(engines)}" if engines else ""
        lines.append(
            f"No deeper model{right} is within {bound:.0%} of the base's loss "
            f"({limit:.3f}); see --within."
        )
    else:
        lines.append(
            f"largest within {bound:.0%} of the base's loss ({limit:.3f}): "
            f"{_named(found, found.within)}"
        )
        lines.append(f"  {upscale_command(found, found.within)}")
    if found.knee is not None and found.knee != found.within:
        lines.append(f"knee, beyond which more trimming pays less: {_named(found, found.knee)}")
        lines.append(f"  {upscale_command(found, found.knee)}")
    elif found.knee is not None:
        lines.append("It is the knee as well: more trimming pays less.")
    return lines


def _borne(doublings: Doublings) -> str:
    """The line that says which layers a search did not double, and why."""
    if not doublings.not_borne:
        return f"{doublings.start}: every layer bears to be doubled"
    layers = ", ".join(map(str, doublings.not_borne))
    return f"{doublings.start}: do not bear to be doubled (alone above the bound): {layers}"


def _named(found: Probe, number: int) -> str:
    candidate, loss = found.maps[number].candidate, found.maps[number].loss
    return (
        f"{candidate.options.removeprefix('--')}, {len(candidate.layer_map)} layers, loss "
        f"{loss:.3f}"
    )
