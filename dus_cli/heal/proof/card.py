"""The model card of a healed model: the source's card, with its state told anew and the proof
added.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from dus_cli.release.card import HEAL_END, HEAL_START, HEALED, SCALED, STATES

_START, _END = "<!-- dus heal -->", "<!-- /dus heal -->"


def averaged_card(card: str, steps: Sequence[int], name: str) -> str:
    """The card of the mean of a run's checkpoints, whose loss nobody has measured yet."""
    card = re.sub(f"^{SCALED}$", HEALED, card, count=1, flags=re.MULTILINE)
    verdict = (
        f"> **The mean of {len(steps)} checkpoints** of a run of `dus heal`, of steps "
        f"{', '.join(map(str, steps))}. Its loss was not measured: `dus eval` does."
    )
    return _with_section(card, verdict, name)


def healed_card(card: str, report: dict[str, Any], name: str) -> str:
    """The card with a section on the healing: in the warning's place, or at the end of a card
    without one.

    To the Hub a model that was trained is a finetune of its base; one that has reached it need not
    be told how to heal.
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
            "**Continued pretraining** by `dus heal`. No base stands in this model to compare it "
            "with."
        )
    elif report["tokens_to_base"] == 0:
        verdict = (
            "**Continued pretraining** by `dus heal`. It was no worse than its base right after "
            "scaling."
        )
    elif report["reached_base"]:
        verdict = (
            f"**This model is healed**: its held-out loss{on} came down to its base's after "
            f"{report['tokens_to_base']:,} tokens, {report['fraction_of_pretraining']:.2g} of what "
            "pretraining a model of this size takes (20 tokens a parameter)."
        )
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

{report["tokens"]:,} tokens in {report["steps"]:,} steps, {report["flops"]:.3g} FLOPs. `metrics.jsonl` has every
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
    return "\n".join(lines)


def _measured_on(report: dict[str, Any]) -> str:
    """The data, how often it was gone over, and what the losses are of."""
    names = ", ".join(f"`{_plain(name)}`" for name in report["data"])
    there = report["available_heldout_tokens"]
    of = (
        f" of the {there:,} tokens held out"
        if there > 1.05 * report["heldout_tokens"]
        else " held out"
    )
    return (
        f"Trained on {names}: {report['train_tokens']:,} tokens of {report['train_documents']:,} "
        f"documents, {report['epochs']:,.2f} epochs. The losses are over "
        f"{report['heldout_tokens']:,} tokens of {report['heldout_documents']:,} documents{of}"
        f"{_of_sets(report)}."
    )


def _of_sets(report: dict[str, Any]) -> str:
    sets = [
        f"{each['tokens']:,} tokens of {each['documents']:,} documents are `{each['name']}`"
        for each in report.get("heldout_sets", [])
    ]
    return f": {', '.join(sets)}" if sets else ""


def _plain(name: str) -> str:
    """A name as code of Markdown can hold it."""
    return "".join(letter if letter.isprintable() and letter != "`" else "?" for letter in name)
