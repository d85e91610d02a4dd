"""The report of an upscale, as JSON and as text."""

from __future__ import annotations

import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from dus_cli import __version__
from dus_cli.common.reports import SCHEMA, table_lines
from dus_cli.common.units import counted, human_bytes
from dus_cli.errors import shown, shown_list
from dus_cli.planning.plan import Start, UpscalePlan
from dus_cli.release.drawing import describe_scales, draw_kinds, draw_map
from dus_cli.release.lineage import engines_record, map_record, seam_record, starts_record
from dus_cli.release.remaking import Remaking
from dus_cli.source.checkpoint import Checkpoint
from dus_cli.upscaling.space import Space
from dus_cli.writing.outputs import ByteCounts

if TYPE_CHECKING:
    from dus_cli.hub.streaming import Streamed
    from dus_cli.push.report import PushReport

_VERIFIED = {
    "none": "no (--verify none)",
    "structure": "structure",
    "full": "structure and every byte",
    "forward": "structure, and each layer beside the base's",
}

_VERIFIED_STREAM = "structure, what stands twice, whole files by sha256"

_STATE = {
    Start.seams: "It is not healed yet: {seams} it worse than its base.",
    Start.scaled: "It is not healed yet: some of its layers add less or more than in its base.",
    Start.identity: "It computes what its base does, until its new layers are trained.",
    Start.base: "It has its base's layers, all and in order: there is nothing to heal.",
    Start.part: "It is not healed yet: the layers that it leaves out make it worse than its base.",
}


@dataclass(frozen=True)
class UpscaleReport:
    """The result of an upscale or of its dry run; `str` gives the summary for a person.

    Attributes:
        plan: the layer map, and every tensor and file of the output.
        output: the directory, as given.
        status: "written", "planned" (a dry run), or "unchanged" (the output was already what would
            be written).
        space: bytes of disk that are needed and free.
        tally: bytes written, by how: cloned, copied, cast, zeros, scaled.
        verified: the `--verify` that the output passed.
        seconds: time of the run; of a dry run, the time of planning.
        notes: warnings of this run, beside those of the plan.
        remaking: the lineage that was followed (--from), or None.
        published: how the output got its name, "rename" or "index last"; None if nothing was
            written.
        push: the report of --push-to, or None.
        streamed: what --stream fetched, or None.
    """

    plan: UpscalePlan = field(repr=False)
    output: Path
    status: Literal["written", "planned", "unchanged"]
    space: Space
    tally: ByteCounts
    verified: str
    seconds: float
    notes: tuple[str, ...] = ()
    remaking: Remaking | None = None
    published: str | None = None
    push: PushReport | None = None
    streamed: Streamed | None = None

    @property
    def warnings(self) -> tuple[str, ...]:
        """The plan's warnings, which the model card repeats, and those of this run."""
        of_the_push = self.push.warnings if self.push else ()
        return (
            *self.plan.warnings,
            *_unread_warnings(self.plan.checkpoint),
            *self.notes,
            *of_the_push,
        )

    @property
    def reproduced(self) -> bool | None:
        """True if every file has the sum in the SHA256SUMS beside --from's lineage; None if nothing
        was compared.
        """
        return (
            True if self.remaking and self.remaking.sums is not None and not self.dry_run else None
        )

    @property
    def dry_run(self) -> bool:
        return self.status == "planned"

    def __str__(self) -> str:
        return upscale_text(self)

    def to_json(self) -> dict[str, Any]:
        """The report of `--json`; docs/layout.md describes each field."""
        plan, layer_map = self.plan, self.plan.layer_map
        return {
            "schema": SCHEMA,
            "version": __version__,
            "status": self.status,
            "dry_run": self.dry_run,
            "model": plan.base.ref.text,
            "commit": plan.base.commit,
            "base_format": plan.checkpoint.format,
            "base_weights": {
                "read": plan.checkpoint.weight_files,
                "not_read": list(plan.checkpoint.unread),
            },
            "output": str(self.output),
            **map_record(plan),
            **starts_record(plan),
            "seams": [seam_record(seam) for seam in layer_map.seams],
            "start": plan.start.value,
            "kinds": plan.output_kinds,
            "why_trim": plan.why_trim,
            "engines": engines_record(plan),
            "parameters": {"base": plan.checkpoint.num_parameters, "output": plan.num_parameters},
            "bytes": plan.num_data_bytes,
            "tensors": plan.num_tensors,
            "shards": [
                {"name": name, "bytes": layout.num_bytes} for name, layout in plan.shards.items()
            ],
            "files": plan.along,
            "left_out": list(plan.left_out),
            "space": {
                "needed": self.space.needed,
                "free": self.space.free,
                "can_clone": self.space.can_clone,
            },
            "bytes_cloned": self.tally.cloned,
            "bytes_copied": self.tally.copied,
            "bytes_cast": self.tally.cast,
            "bytes_zeros": self.tally.zeros,
            "bytes_scaled": self.tally.scaled,
            "streamed": None if self.streamed is None else asdict(self.streamed),
            "verified": self.verified,
            "published": self.published,
            "seconds": round(self.seconds, 3),
            "from": None if self.remaking is None else str(self.remaking.path),
            "reproduced": self.reproduced,
            "push": None if self.push is None else self.push.to_json(),
            "warnings": list(self.warnings),
        }


def plan_text(plan: UpscalePlan, width: int) -> str:
    """A line that names the model, and a drawing of its copies and seams, `width` columns wide."""
    layer_map = plan.layer_map
    trim = "" if layer_map.trim is None else f", trim {layer_map.trim}"
    recipe = "" if plan.request.recipe is None else f", recipe {plan.request.recipe}"
    title = (
        f"{plan.base.name}: {layer_map.num_base_layers} layers → {len(layer_map)} "
        f"layers{trim}{recipe}"
    )
    if plan.treatment.zeros:
        count = len(layer_map.new_layers)
        starts = "starts as an identity" if count == 1 else "start as identities"
        title += f"\n{counted(count, 'new layer')} {starts}"
    if plan.treatment.scaled:
        title += (
            f"\nstart {plan.request.start}: "
            f"{describe_scales(plan.treatment.factors, plan.treatment.scaled)}"
        )
    kinds = draw_kinds(plan.output_kinds, layer_map, width)
    return "\n".join([title, "", draw_map(layer_map, width), *kinds])


def upscale_text(report: UpscaleReport) -> str:
    """The summary for a person; for a dry run, the plan."""
    plan, tally, space = report.plan, report.tally, report.space
    base, output = plan.checkpoint.num_parameters, plan.num_parameters
    rows = [
        *([("trim", plan.why_trim)] if plan.why_trim else []),
        ("parameters", f"{output:,} (base {base:,}, ×{output / base:.2f})"),
        ("tensors", f"{plan.num_tensors:,} in {counted(len(plan.shards), 'shard')}"),
        ("tensor data", f"{plan.num_data_bytes:,} bytes ({human_bytes(plan.num_data_bytes)})"),
    ]
    if plan.stack.tables:
        names = shown_list(sorted(plan.stack.tables))
        rows.append(("tables", f"{names}: {plan.stack.table_width} of each layer, by the map"))
    if plan.checkpoint.unread:
        rows += [
            ("weights read", shown_list(plan.checkpoint.weight_files)),
            ("not read", shown_list(plan.checkpoint.unread)),
        ]
    if plan.checkpoint.is_pickled:
        rows.append(("format", "safetensors (the base's weights are pickled)"))
    if report.dry_run:
        reflinks = (
            "reflinks share the rest with the base"
            if space.can_clone
            else "this file system has no reflinks"
        )
        rows += [
            ("disk needed", f"{human_bytes(space.needed)} ({reflinks})"),
            ("disk free", "not known" if space.free is None else human_bytes(space.free)),
            (
                "shards",
                "\n".join(
                    f"{n}  {human_bytes(s.num_bytes)}" for n, s in list(plan.shards.items())[:20]
                ),
            ),
        ]
        if len(plan.shards) > 20:
            rows.append(("", f"… {len(plan.shards) - 20} more"))
        rows.append(("other files", ", ".join(map(shown, plan.along)) or "none"))
    elif report.status == "written":
        streams_full = report.streamed is not None and report.verified == "full"
        rows += [
            ("cloned", human_bytes(tally.cloned)),
            ("copied", human_bytes(tally.copied)),
            *([("cast", human_bytes(tally.cast))] if tally.cast else []),
            *([("zeros", human_bytes(tally.zeros))] if tally.zeros else []),
            *([("scaled", human_bytes(tally.scaled))] if tally.scaled else []),
            *_streamed_rows(report.streamed),
            ("verified", _VERIFIED_STREAM if streams_full else _VERIFIED[report.verified]),
            *([("reproduced", "every file is what the sums say")] if report.reproduced else []),
            ("time", f"{report.seconds:.2f} s"),
        ]
    if plan.left_out and report.status != "unchanged":
        rows.append(("left out", shown_list(plan.left_out, limit=8)))
    if report.push is not None:
        from dus_cli.push.report import push_text

        rows.append(("push", push_text(report.push)))
    lines = table_lines(rows) + [f"warning: {warning}" for warning in report.warnings]
    output_text = shlex.quote(str(report.output))
    if report.dry_run:
        lines.append(f"Dry run: nothing was written to {output_text}.")
    elif report.status == "unchanged":
        lines.append(f"{output_text} is already what this command writes: nothing was done.")
    else:
        seams = "the seam makes" if len(plan.layer_map.seams) == 1 else "the seams make"
        lines.append(f"Wrote {output_text}. {_STATE[plan.start].format(seams=seams)}")
        if plan.start is not Start.base:
            train = " --train new" if plan.start is Start.identity else ""
            lines.append(f"next: dus heal {output_text} --data corpus.jsonl{train}")
    return "\n".join(lines)


def _unread_warnings(checkpoint: Checkpoint) -> list[str]:
    """The warning if the base has its weights twice, in the same format."""
    if not checkpoint.rivals:
        return []
    read = checkpoint.weight_files[0]
    return [
        (
            f"the base's weights were read from {read}, as transformers does; "
            f"{shown_list(checkpoint.rivals)} was not"
        )
    ]


def _streamed_rows(streamed: Streamed | None) -> list[tuple[str, str]]:
    if streamed is None:
        return []
    earlier = (
        f"; {human_bytes(streamed.resumed)} were here from an earlier run"
        if streamed.resumed
        else ""
    )
    num_files = len(streamed.checked) + len(streamed.unchecked)
    sums = f"of {len(streamed.checked)} of {counted(num_files, 'file')}, as the Hub has it"
    notes = [f"not of {name}: {why}" for name, why in list(streamed.unchecked.items())[:3]]
    return [
        ("fetched", human_bytes(streamed.fetched) + earlier),
        ("sha256", "\n".join([sums, *notes])),
    ]
