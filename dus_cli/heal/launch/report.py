"""The reports of a healing and of its dry run, for a person and as JSON."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

from dus_cli import __version__
from dus_cli.common.storage import free_bytes
from dus_cli.common.units import counted, human_bytes, human_time
from dus_cli.data.sources import Unread
from dus_cli.heal import estimate
from dus_cli.heal.launch.plan import (
    REFERENCE_GPU,
    TYPICAL_MFU,
    num_learning,
    plan_lines,
    plan_of,
    text_size,
    with_pace,
)
from dus_cli.heal.options import HealOptions
from dus_cli.heal.proof.confidence import confidence_text, doubt
from dus_cli.heal.proof.scores import scores_texts
from dus_cli.heal.run import REPORT, SCHEMA, Run
from dus_cli.heal.watch.run_state import push_text
from dus_cli.maps.shape import Shape, flops_per_token, pretraining_flops


def heal_text(report: dict[str, Any], output: Path) -> str:
    """The summary at the end, with `output` as the user typed it."""
    base = report["base_loss"]
    rows = [
        *_heldout_rows(report),
        *(("tasks", text) for text in scores_texts(report)),
        ("tokens", f"{report['tokens']:,} in {counted(report['steps'], 'step')}"),
        ("cost", f"{report['flops']:.3g} FLOPs, {human_time(report['seconds'])}"),
    ]
    if report["tokens_per_second"] is not None:
        memory = human_bytes(report["peak_memory_bytes"])
        rows.append(
            (
                "speed",
                f"{report['tokens_per_second']:,.0f} tokens/s, peak memory {memory} per worker",
            )
        )
    pushes = report.get("pushes", [])
    rows += [
        ("pushed", push_text(push)) for push in pushes if "error" in push or push is pushes[-1]
    ]
    if report["skipped_steps"]:
        skipped = counted(report["skipped_steps"], "step")
        rows.append(("skipped", f"{skipped} with a loss or gradient out of bounds"))
    if report["skipped_lines"]:
        reasons = ", ".join(
            f"{count:,} {reason}" for reason, count in report["skipped_lines"].items()
        )
        rows.append(("left out", reasons))
    rows += _unread_row(report)
    lines = [f"{label:<13}{value}" for label, value in rows]
    folder = shlex.quote(str(output))
    if report["status"] == "unchanged":
        lines.append(f"{folder} is finished already, with these options; nothing was done.")
    elif base is None:
        lines.append(f"Wrote {folder}. The model does not hold its base to compare it with.")
    elif report["tokens_to_base"] == 0:
        lines.append(f"Wrote {folder}. It was no worse than its base from the start.")
    elif report["reached_base"]:
        lines.append(
            f"Wrote {folder}. It reached its base after "
            f"{counted(report['tokens_to_base'], 'token')}, "
            f"{report['fraction_of_pretraining']:.2g} of pretraining."
        )
    else:
        lines.append(
            f"Wrote {folder}. It has not reached its base yet: give it more tokens (--tokens, "
            "--until base)."
        )
    if report.get("average"):
        steps = ", ".join(map(str, report["average"]["steps"]))
        average = shlex.quote(str(output.with_name(report["average"]["folder"])))
        lines.append(f"Wrote {average}, the mean of the checkpoints of steps {steps}.")
    if (thin := doubt(report)) is not None:
        more = "give more held-out text (--holdout, --eval-data, --eval-tokens)"
        lines.append(f"warning: {thin}; {more}")
    return "\n".join(lines)


def _heldout_rows(report: dict[str, Any]) -> list[tuple[str, str]]:
    """The losses and the size of their text: a row for each held-out set that has a name, else two
    rows.
    """
    sets = report.get("heldout_sets", [])
    if sets:
        texts = []
        for each in sets:
            size = text_size(each["tokens"], each["documents"])
            texts.append(f"{each['name']} {_losses_text(each)} over {size}")
            texts += [sure] if (sure := confidence_text(each)) else []
        return [("held-out", texts[0]), *(("", text) for text in texts[1:])]
    rows = [("held-out", _losses_text(report))]
    rows += [("", sure)] if (sure := confidence_text(report)) else []
    if "heldout_documents" in report:  # an older dus did not write it
        size = text_size(report["heldout_tokens"], report["heldout_documents"])
        rows.append(("", f"over {size}"))
    return rows


def _losses_text(losses: dict[str, Any]) -> str:
    base, scaled, now = losses["base_loss"], losses["scaled_loss"], losses["loss"]
    if base is None:
        return f"{now:.4f}"
    return f"{now:.4f} (base {base:.4f}, right after scaling {scaled:.4f})"


def _unread_row(report: dict[str, Any]) -> list[tuple[str, str]]:
    # an older dus did not write unread_files
    record = report.get("unread_files") or {"count": 0, "names": []}
    unread = Unread(record["count"], tuple(record["names"]))
    return [("not read", str(unread))] if unread.count else []


def command_json(command: list[str], options: HealOptions) -> dict[str, Any]:
    """The report of `--print-command --json`; docs/layout.md describes each field."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": str(options.model.resolve()),
        "output": str(options.output.resolve()),
        "command": command,
    }


def dry_run_json(
    run: Run, shape: Shape, options: HealOptions, pilot: dict[str, Any] | None = None
) -> dict[str, Any]:
    """The report of a dry run; docs/layout.md describes each field. `pilot` is what a pilot
    measured.
    """
    plan = plan_of(run, shape, options.launch)
    if pilot is not None:
        plan["pilot"] = with_pace(pilot, plan)
    flops = plan["tokens"] * flops_per_token(shape, run.seq_length)
    per_device = (
        TYPICAL_MFU * estimate.PEAK_FLOPS[REFERENCE_GPU] / flops_per_token(shape, run.seq_length)
    )
    return {
        "schema": SCHEMA,
        "version": __version__,
        "dry_run": True,
        "model": run.model,
        "output": run.output,
        "num_parameters": run.num_parameters,
        "num_layers": run.num_layers,
        "base_layers": None
        if run.base is None or run.base.folder is not None
        else list(run.base.layers),
        "base_folder": None if run.base is None else run.base.folder,
        "skipped_lines": run.data["skipped"],
        "unread_files": run.data["unread"],
        "seq_length": run.seq_length,
        "tokens_per_step": run.tokens_per_step,
        "flops": flops,
        "fraction_of_pretraining": flops / pretraining_flops(shape, run.seq_length),
        "disk": _disk(run, shape, options),
        "h100_tokens_per_second": round(per_device, 1),
        "h100_hours": round(plan["tokens"] / per_device / 3600, 4),
        **plan,
    }


def dry_run_text(
    run: Run, shape: Shape, options: HealOptions, pilot: dict[str, Any] | None = None
) -> str:
    """The report of a dry run for a person. `pilot` is what a pilot measured."""
    report = dry_run_json(run, shape, options, pilot)
    memory = report["memory_per_device"]
    parts = ", ".join(
        f"{name} {human_bytes(size)}" for name, size in memory.items() if name != "total" and size
    )
    recipe, disk = run.recipe, report["disk"]
    free = "" if disk["free"] is None else f", {human_bytes(disk['free'])} free"
    checkpoint, written = human_bytes(disk["checkpoint"]), human_bytes(disk["model"])
    num_exports = disk["num_exports"]
    exports = f" and {counted(num_exports, 'export')} of it" if num_exports else ""
    speed = (
        f"{report['h100_tokens_per_second']:,.0f} tokens/s per {REFERENCE_GPU} at "
        f"{TYPICAL_MFU:.0%} MFU"
    )
    gpus = f"{speed}, {report['h100_hours']:,.3g} GPU hours"
    rows = [
        ("model", f"{run.num_parameters:,} parameters, {run.num_layers} layers"),
        ("base", _base_text(run)),
        *_unread_row(report),
        (
            "budget",
            (
                f"{counted(report['steps'], 'step')} of "
                f"{counted(report['tokens_per_step'], 'token')}: "
                f"{counted(report['tokens'], 'token')}"
            ),
        ),
        (
            "recipe",
            (
                f"lr {recipe.lr:g} {recipe.schedule}, warm-up {recipe.warmup_steps}, decay "
                f"{recipe.decay_steps} steps"
            ),
        ),
        *([("", f"times {scales}")] if (scales := options.recipe.lr_scale) else []),
        (
            "cost",
            f"{report['flops']:.3g} FLOPs, {report['fraction_of_pretraining']:.2g} of pretraining",
        ),
        ("", gpus),
        ("per worker", parts),
        ("disk", f"{human_bytes(disk['total'])} at most{free}"),
        (
            "",
            (
                f"{counted(disk['num_checkpoints'], 'checkpoint')} of {checkpoint}, the model "
                f"{written}{exports}"
            ),
        ),
    ]
    lines = [f"{label:<13}{value}" for label, value in rows]
    done = f"Dry run: nothing was written to {shlex.quote(str(options.output))}."
    return "\n".join([*lines, *plan_lines(report), done])


def _base_text(run: Run) -> str:
    if run.base is None:
        return "not in the model, so its loss is unknown"
    return "inside the model" if run.base.folder is None else f"in {run.base.folder}"


def _disk(run: Run, shape: Shape, options: HealOptions) -> dict[str, int | None]:
    """The most bytes that the run takes on the disk, without token files: the checkpoints kept, the
    one being written, and the models.
    """
    checkpoint = estimate.checkpoint_bytes(
        shape,
        num_learning=num_learning(run, shape),
        weight_bytes=2 if run.fit.precision == "bf16" else 4,
        has_fp32_masters=run.fit.master_weights == "fp32",
    )
    model = sum(path.stat().st_size for path in Path(run.model).glob("*.safetensors"))
    number = max(run.keeping.keep, run.keeping.average or 0) + 1
    exports = run.keeping.num_exports(run.num_steps - 1)
    models = exports + (1 if run.keeping.average is None else 2)
    return {
        "total": number * checkpoint + models * model,
        "num_checkpoints": number,
        "checkpoint": checkpoint,
        "model": model,
        "num_exports": exports,
        "free": free_bytes(options.output.resolve().parent),
    }


def read_report(folder: Path, model: Path) -> dict[str, Any]:
    """The report.json of a folder, with the paths that the published file leaves out."""
    report: dict[str, Any] = json.loads((folder / REPORT).read_text(encoding="utf-8"))
    return report | {"model": str(model), "output": str(folder)}
