"""Every file that is made up rather than copied."""

from __future__ import annotations

from dus_cli.errors import encodable
from dus_cli.planning.plan import UpscalePlan, dump_json
from dus_cli.release import card, lineage


def written_texts(made: UpscalePlan) -> dict[str, str]:
    """Every file that is made up rather than copied, by name: config, index, card, pictures,
    lineage.
    """
    records = {card.NAME: card.model_card(made), lineage.NAME: dump_json(lineage.lineage(made))}
    texts = {**made.text_files(), **card.pictures(made), **records}
    return {name: encodable(text) for name, text in texts.items()}
