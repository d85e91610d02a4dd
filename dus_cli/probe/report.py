"""What a probe has to say: as JSON with a documented schema, and for a person."""

from __future__ import annotations

import math
import shlex
from typing import Any

from dus_cli import __version__
from dus_cli.common.reports import SCHEMA
from dus_cli.common.units import human_bytes, human_count
from dus_cli.probe.found import Doublings, Measured, Probe
from dus_cli.probe.maps import Cost
from dus_cli.release.lineage import seam_record

# Of a map's name in the table, which is 80 columns wide with it.
_WIDTH = 15


def perplexity(loss: float) -> float:
    """Exp of a mean cross-entropy in nats; infinite where that is beyond a float."""
    return math.exp(loss) if loss < 700 else math.inf


def probe_json(found: Probe) -> dict[str, Any]:
    """The report of `--json`; docs/layout.md describes each field."""
    text = found.text
    report: dict[str, Any] = {
        "schema": SCHEMA,
        "version": __version__,
        "dry_run": found.is_dry_run,
        "model": found.model,
        "commit": found.commit,
        "data": None
        if text is None
        else {
            "files": list(text.files),
            "tokens": text.tokens,
            "documents": text.documents,
            "bytes": text.num_bytes,
            "skipped": text.skipped,
            "unread_files": text.unread.to_json(),
            "before": list(text.before),
        },
        "seq_length": found.seq_length,
        "precision": found.precision,
        "device": found.device,
        "stream_layers": found.streams,
        "base": _figures(found.base_loss, found.base_cost),
        "for": list(found.engines),
        "maps": [_map_json(measured) for measured in found.maps],
        "recommended": {
            "within": None if found.is_dry_run else _within_json(found),
            "knee": None if found.knee is None else _choice(found, found.knee),
        },
        "distances": None
        if found.distances is None
        else {
            "tokens": found.distances.num_tokens,
            "angular": [[round(value, 6) for value in row] for row in found.distances.angular],
            "block_influence": [
                [round(value, 6) for value in row] for row in found.distances.influence
            ],
        },
        "layer_passes": found.layer_passes,
        "memory": {
            "estimate": found.memory.total,
            "weights": found.memory.weights,
            "states": found.memory.states,
            "groups": found.memory.num_groups,
            "peak": found.peak_bytes,
        },
        "seconds": round(found.seconds, 3),
        "warnings": list(found.warnings),
    }
    if found.starts:
        report["starts"] = [str(start) for start in found.starts]
        report["base_passes"] = round(found.layer_passes / found.num_layers, 2)
        report["doublings"] = [_doublings_json(doublings) for doublings in found.doublings]
        for record, measured in zip(report["maps"], found.maps, strict=True):
            record["start"] = str(measured.candidate.start)
            record["factors"] = list(measured.candidate.factors) or None
    return report


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
    assert found.base_loss is not None
    choice = (
        {"map": None, "command": None} if found.within is None else _choice(found, found.within)
    )
    return {"share": found.bound, "loss": (1 + found.bound) * found.base_loss, **choice}


def _choice(found: Probe, number: int) -> dict[str, Any]:
    return {"map": number, "command": upscale_command(found, number)}


def upscale_command(found: Probe, number: int) -> str:
    """The line that writes a map's model, ready for a shell."""
    candidate = found.maps[number].candidate
    output = f"{found.name.rpartition('/')[2]}-{len(candidate.layer_map)}-layers"
    return f"dus upscale {shlex.quote(found.model)} {candidate.options} -o {shlex.quote(output)}"


def probe_text(found: Probe) -> str:
    """The table and the advice, at most 80 columns wide but for commands, long maps, engines and
    warnings.
    """
    wrong = list(
        dict.fromkeys(engine for measured in found.maps for engine in measured.candidate.wrong)
    )
    head = ["map", "layers", "params", "bytes", "FLOP/token", "loss", "perplexity", "seam"]
    rows = [head, _row("base", found.base_cost, found.base_cost.num_layers, found.base_loss, "")]
    for measured in found.maps:
        layer_map, name = measured.candidate.layer_map, measured.candidate.name
        seam = f"{max(angular for angular, _ in measured.seams):.3f}" if measured.seams else ""
        rows.append(_row(name, measured.candidate.cost, len(layer_map), measured.loss, seam))
    if wrong:  # a column of its own, of initials
        not_in = [
            "".join(engine.name[0] for engine in measured.candidate.wrong)
            for measured in found.maps
        ]
        rows = [[*row, cell] for row, cell in zip(rows, ["not in", "", *not_in], strict=True)]
        head = rows[0]
    if found.starts:
        begins = ["start", "", *(str(measured.candidate.start) for measured in found.maps)]
        rows = [[row[0], cell, *row[1:]] for row, cell in zip(rows, begins, strict=True)]
        head = rows[0]
    widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip()
        for row in rows
    ]
    refused = [
        measured.candidate for measured in found.maps if measured.candidate.refused is not None
    ]
    lines += [f"refused: {candidate.options}: {candidate.refused}" for candidate in refused]
    typed = [m.candidate.name for m in found.maps if m.candidate.layer_map.trim is None]
    lines += [f"{_short(name)} is {name}" for name in typed if len(name) > _WIDTH]
    if wrong:
        names = ", ".join(f"{engine.name[0]} {engine.title}" for engine in wrong)
        lines.append(f"not in: {names} would not compute it as config.json says")
    return "\n".join(
        [*lines, "", *_closing(found), *(f"warning: {warning}" for warning in found.warnings)]
    )


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
    memory = (
        f"{human_bytes(found.memory.total)} of memory, {human_bytes(found.memory.weights)} of it "
        "weights"
    )
    if found.is_dry_run:
        groups = (
            ""
            if found.memory.num_groups == 1
            else f"\nThe rows would go through the layers in {found.memory.num_groups} groups."
        )
        return [f"Dry run: nothing was measured. It would take about {memory}.{groups}"]
    assert found.text is not None
    assert found.base_loss is not None
    peak = (
        "" if found.peak_bytes is None else f", {human_bytes(found.peak_bytes)} of memory at most"
    )
    documents = f"{found.text.documents:,} document{'s' * (found.text.documents != 1)}"
    lines = [
        f"loss: nats per token, over {found.text.tokens:,} tokens of {documents};",
        "seam: angular distance of the layers that meet, 0 (alike) to 1 (opposite)",
        *([f"not read: {found.text.unread}"] if found.text.unread.count else []),
        *map(_borne, found.doublings),
        f"{found.layer_passes} passes of a layer, {found.seconds:.0f} s{peak}",
        "",
    ]
    limit = (1 + found.bound) * found.base_loss
    if found.within is None:
        asked = f" that is right for {', '.join(found.engines)}" if found.engines else ""
        lines.append(
            f"No deeper model{asked} is within {found.bound:.0%} of the base's loss "
            f"({limit:.3f}); see --within."
        )
    else:
        lines.append(
            f"largest within {found.bound:.0%} of the base's loss ({limit:.3f}): "
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
    """Which layers were not doubled in a search, and why."""
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
