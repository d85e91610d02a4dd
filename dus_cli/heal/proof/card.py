"""The model card of a healed model: the source's card with a new state and the proof."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dus_cli.common.units import counted
from dus_cli.heal.launch.plan import text_size, train_size
from dus_cli.heal.proof.confidence import confidence_text, doubt
from dus_cli.heal.proof.scores import scores_texts
from dus_cli.release.card import HEAL_END, HEAL_START, HEALED, SCALED, STATES

_START, _END = "<!-- dus heal -->", "<!-- /dus heal -->"


def averaged_card(card: str, steps: Sequence[int], name: str) -> str:
    """The card of the mean of a run's checkpoints, whose loss is not measured."""
    card = re.sub(f"^{SCALED}$", HEALED, card, count=1, flags=re.MULTILINE)
    verdict = (
        f"> **The mean of {counted(len(steps), 'checkpoint')}** of a run of `dus heal`, of steps "
        f"{', '.join(map(str, steps))}. Its loss was not measured: measure it with `dus eval`."
    )
    return _with_section(card, verdict, name)


def healed_card(card: str, report: dict[str, Any], name: str) -> str:
    """The card with a section on the healing, which replaces the warning or is appended.

    For the Hub a trained model is a finetune of its base. If it has reached its base's loss, the
    instructions for healing are removed.
    """
    card = re.sub(f"^{SCALED}$", HEALED, card, count=1, flags=re.MULTILINE)
    if report["reached_base"] is not False:
        card = re.sub(
            f"{re.escape(HEAL_START)}.*?{re.escape(HEAL_END)}\n*",
            "",
            card,
            count=1,
            flags=re.DOTALL,
        )
    return _with_section(card, _section(report), name)


def _with_section(card: str, text: str, name: str) -> str:
    section = f"{_START}\n{text}\n{_END}"
    for state in STATES.values():
        if state in card:
            return card.replace(state, section)
    earlier = re.compile(f"{re.escape(_START)}.*?{re.escape(_END)}", re.DOTALL)
    if earlier.search(card):
        return earlier.sub(lambda _: section, card, count=1)
    return f"{card.rstrip()}\n\n{section}\n" if card.strip() else f"# {name}\n\n{section}\n"


def _section(report: dict[str, Any]) -> str:
    base = report["base_loss"]
    sets = report.get("heldout_sets", [])
    on = f" on `{sets[0]['name']}`" if sets else ""
    if base is None:
        verdict = (
            "**Continued pretraining** by `dus heal`. The model does not hold its base to compare "
            "it with."
        )
    elif report["tokens_to_base"] == 0:
        verdict = (
            "**Continued pretraining** by `dus heal`. It was no worse than its base right after "
            "scaling."
        )
    elif report["reached_base"]:
        verdict = (
            f"**This model is healed**: its held-out loss{on} came down to its base's after "
            f"{counted(report['tokens_to_base'], 'token')}, "
            f"{report['fraction_of_pretraining']:.2g} of what pretraining a model of this size "
            "takes (20 tokens per parameter)."
        )
        if (thin := doubt(report)) is not None:
            verdict += f" That may be chance: {thin}."
    else:
        verdict = (
            f"**This model is not healed yet**: its held-out loss{on} is still above its base's."
        )
    return f"""> {verdict}

{_table(report)}

<picture>
  <source media="(prefers-color-scheme: dark)" srcset="healing-dark.svg">
  <img alt="Training and held-out loss against tokens, with the base's line" src="healing-light.svg">
</picture>

{_measured_on(report)}
{_tasks_text(report)}
{counted(report["tokens"], "token")} in {counted(report["steps"], "step")}, {report["flops"]:.3g} FLOPs. `metrics.jsonl` has every
step, `report.json` the figures, `run.json` every option."""


def _table(report: dict[str, Any]) -> str:
    """The losses, a column for each held-out set."""
    sets = report.get("heldout_sets", [])
    rows = {"base": "base_loss", "right after scaling": "scaled_loss", "now": "loss"}
    if report["base_loss"] is None:
        rows = {"before": "scaled_loss", "now": "loss"}
    names = [f" on `{each['name']}`" for each in sets] or [""]
    head = " | ".join(f"held-out loss{name} (nats per token)" for name in names)
    lines = [f"| | {head} |", f"|---|{'---|' * len(names)}"]
    for label, field in rows.items():
        losses = " | ".join(f"{each[field]:.4f}" for each in sets or [report])
        lines.append(f"| {label} | {losses} |")
    sure = [confidence_text(each) for each in sets or [report]]
    if any(sure):
        lines.append(f"| difference now | {' | '.join(text or '' for text in sure)} |")
    return "\n".join(lines)


def _measured_on(report: dict[str, Any]) -> str:
    """The training data, the epochs, and the size of the held-out text."""
    names = ", ".join(f"`{_plain(name)}`" for name in report["data"])
    held_out = report["available_heldout_tokens"]
    is_part = held_out > 1.05 * report["heldout_tokens"]
    of = f" of the {counted(held_out, 'token')} held out" if is_part else " held out"
    return (
        f"Trained on {names}: {train_size(report)}, "
        f"{report['epochs']:,.2f} epochs. The losses are over "
        f"{text_size(report['heldout_tokens'], report['heldout_documents'])}{of}"
        f"{_sets_text(report)}."
    )


def _tasks_text(report: dict[str, Any]) -> str:
    scores = "".join(f"- {text}\n" for text in scores_texts(report))
    head = "Tasks of lm-evaluation-harness, ± one standard error:"
    return f"\n{head}\n\n{scores}" if scores else ""


def _sets_text(report: dict[str, Any]) -> str:
    sets = [
        f"{text_size(each['tokens'], each['documents'])} are `{each['name']}`"
        for each in report.get("heldout_sets", [])
    ]
    return f": {', '.join(sets)}" if sets else ""


def _plain(name: str) -> str:
    """A name without characters that Markdown's `code` cannot hold."""
    return "".join(letter if letter.isprintable() and letter != "`" else "?" for letter in name)
