"""What a healing has to say at its end, and its dry run before it: for a person and as JSON."""

from __future__ import annotations

import shlex
from typing import Any

from dus_cli import __version__
from dus_cli.heal import estimate, launcher
from dus_cli.heal.corpus import Unread
from dus_cli.heal.estimate import MemoryEstimate, Shape, num_shards
from dus_cli.heal.resolve import Wishes
from dus_cli.heal.run import SCHEMA, Run
from dus_cli.heal.tokens import Prepared
from dus_cli.report import human_bytes, human_time

# What a well-tuned run reaches of a GPU's peak; the time in a dry run is told for it.
_TYPICAL_MFU = 0.45
_REFERENCE_GPU = "H100"


def heal_text(report: dict[str, Any]) -> str:
    """The closing summary."""
    base, scaled, loss = report["base_loss"], report["scaled_loss"], report["loss"]
    rows = [
        ("held-out", f"{loss:.4f}" + ("" if base is None else f" (base {base:.4f}, right after scaling {scaled:.4f})")),
        ("tokens", f"{report['tokens']:,} in {report['steps']:,} steps"),
        ("cost", f"{report['flops']:.3g} FLOPs, {human_time(report['seconds'])}"),
    ]
    if report["tokens_per_second"] is not None:
        memory = human_bytes(report["peak_memory_bytes"])
        rows.append(("speed", f"{report['tokens_per_second']:,.0f} tokens/s, peak memory {memory} a worker"))
    if report["skipped_steps"]:
        rows.append(("skipped", f"{report['skipped_steps']} steps with a loss or gradient out of bounds"))
    if report["skipped_lines"]:
        reasons = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped_lines"].items())
        rows.append(("left out", reasons))
    rows += _unread_row(report)
    lines = [f"{label:<13}{value}" for label, value in rows]
    output = shlex.quote(report["output"])
    if report["status"] == "unchanged":
        lines.append(f"{output} is finished already, with these options; nothing was done.")
    elif base is None:
        lines.append(f"Wrote {output}. No base stands in this model to compare it with.")
    elif report["tokens_to_base"] == 0:
        lines.append(f"Wrote {output}. It was no worse than its base to begin with.")
    elif report["reached_base"]:
        lines.append(
            f"Wrote {output}. It reached its base after {report['tokens_to_base']:,} tokens, "
            f"{report['fraction_of_pretraining']:.2g} of pretraining."
        )
    else:
        lines.append(f"Wrote {output}. It has not reached its base yet: give it more tokens (--tokens, --until base).")
    return "\n".join(lines)


def _unread_row(report: dict[str, Any]) -> list[tuple[str, str]]:
    unread = report.get("unread_files") or {"count": 0, "names": []}  # no report of an older dus has them
    found = Unread(unread["count"], tuple(unread["names"]))
    return [("not read", str(found))] if found.count else []


def command_json(command: list[str], wishes: Wishes) -> dict[str, Any]:
    """The report of `--print-command --json`; docs/layout.md describes each field."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": str(wishes.model.resolve()),
        "output": str(wishes.output.resolve()),
        "command": command,
    }


def dry_run_json(run: Run, shape: Shape, wishes: Wishes) -> dict[str, Any]:
    """The report of a dry run; docs/layout.md describes each field."""
    data = Prepared.from_json(run.data)
    memory = _memory(run, shape, wishes)
    tokens = run.num_steps * run.tokens_per_step
    flops = tokens * estimate.flops_per_token(shape, run.seq_length)
    per_device = _TYPICAL_MFU * estimate.PEAK_FLOPS[_REFERENCE_GPU] / estimate.flops_per_token(shape, run.seq_length)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "dry_run": True,
        "model": run.model,
        "output": run.output,
        "num_parameters": run.num_parameters,
        "num_layers": run.num_layers,
        "base_layers": None if run.base is None else list(run.base.layers),
        "train_tokens": data.num_train_tokens,
        "train_documents": data.num_train_documents,
        "heldout_tokens": data.num_heldout_tokens,
        "heldout_documents": data.num_heldout_documents,
        "skipped_lines": data.skipped,
        "unread_files": data.unread,
        "seq_length": run.seq_length,
        "tokens_per_step": run.tokens_per_step,
        "steps": run.num_steps,
        "tokens": tokens,
        "num_workers": _num_workers(wishes),
        "flops": flops,
        "fraction_of_pretraining": flops / estimate.pretraining_flops(shape, run.seq_length),
        "memory_per_device": {
            "weights": int(memory.weights),
            "gradients": int(memory.gradients),
            "optimizer": int(memory.optimizer),
            "teacher": int(memory.teacher),
            "gathered": int(memory.gathered),
            "activations": int(memory.activations),
            "logits": int(memory.logits),
            "total": int(memory.total),
        },
        "h100_tokens_per_second": round(per_device, 1),
        "h100_hours": round(tokens / per_device / 3600, 4),
    }


def dry_run_text(run: Run, shape: Shape, wishes: Wishes) -> str:
    """The same for a person."""
    report = dry_run_json(run, shape, wishes)
    memory = report["memory_per_device"]
    parts = ", ".join(f"{name} {human_bytes(size)}" for name, size in memory.items() if name != "total" and size)
    recipe = run.recipe
    rows = [
        ("model", f"{run.num_parameters:,} parameters, {run.num_layers} layers"),
        ("base", "its layers stand in the model" if run.base else "none in this model"),
        ("data", f"{report['train_tokens']:,} tokens in {report['train_documents']:,} documents"),
        ("held out", f"{report['heldout_tokens']:,} tokens in {report['heldout_documents']:,} documents"),
        *_unread_row(report),
        ("budget", f"{report['steps']:,} steps of {report['tokens_per_step']:,} tokens: {report['tokens']:,} tokens"),
        (
            "recipe",
            f"lr {recipe.lr:g} {recipe.schedule}, warm-up {recipe.warmup_steps}, decay {recipe.decay_steps} steps",
        ),
        ("cost", f"{report['flops']:.3g} FLOPs, {report['fraction_of_pretraining']:.2g} of pretraining"),
        ("memory", f"{human_bytes(memory['total'])} a device with {report['num_workers']} workers"),
        ("", parts),
        (
            "time",
            f"{report['h100_tokens_per_second']:,.0f} tokens/s a {_REFERENCE_GPU} at {_TYPICAL_MFU:.0%} MFU",
        ),
        ("", f"{report['h100_hours']:,.3g} GPU hours"),
    ]
    lines = [f"{label:<13}{value}" for label, value in rows]
    return "\n".join([*lines, f"Dry run: nothing was written to {shlex.quote(run.output)}."])


def _num_workers(wishes: Wishes) -> int:
    return launcher.num_processes(wishes.launch) * wishes.launch.nnodes


def _memory(run: Run, shape: Shape, wishes: Wishes) -> MemoryEstimate:
    workers = _num_workers(wishes)
    return estimate.memory_per_device(
        shape,
        num_shards=num_shards(run.fit.sharding, workers, workers // wishes.launch.nnodes),
        micro_batch_tokens=(run.fit.micro_batch_rows or 1) * run.seq_length,
        weight_bytes=2 if run.fit.precision == "bf16" else 4,
        has_fp32_masters=run.fit.master_weights == "fp32",
        activation_checkpointing=run.fit.activation_checkpointing,
        teacher_layers=len(run.base.layers) if run.base and run.recipe.distill_weight else 0,
    )
