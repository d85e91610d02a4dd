"""All files of an output that dus composes rather than copies."""

from __future__ import annotations

from dus_cli.errors import encodable
from dus_cli.planning.plan import UpscalePlan, dump_json
from dus_cli.release import card, lineage


def written_texts(plan: UpscalePlan) -> dict[str, str]:
    """The texts of these files by name: config, index, card, pictures, lineage."""
    records = {card.NAME: card.model_card(plan), lineage.NAME: dump_json(lineage.lineage(plan))}
    texts = {**plan.text_files(), **card.pictures(plan), **records}
    return {name: encodable(text) for name, text in texts.items()}
