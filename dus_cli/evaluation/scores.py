"""What one model's pass over the text adds up."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from dus_cli.evaluation.intervals import Sums


@dataclass
class Scores:
    """What a pass over the text adds up, document by document, and what tells one pass from another."""

    nats: Sums = field(default_factory=Sums)
    tokens: Sums = field(default_factory=Sums)
    text_bytes: Sums = field(default_factory=Sums)
    num_documents: int = 0
    unknown_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.text_digest, self.token_digest = hashlib.sha256(), hashlib.sha256()

    def add_document(self, text: bytes, ids: Sequence[int], unknown: int | None) -> int:
        """Count a document; its number."""
        number = self.num_documents
        self.num_documents += 1
        self.nats.add(number, 0.0)
        self.tokens.add(number, len(ids))
        self.text_bytes.add(number, len(text))
        self.unknown_tokens += 0 if unknown is None else ids.count(unknown)
        self.text_digest.update(len(text).to_bytes(8, "little") + text)
        self.token_digest.update(array("Q", [len(ids), *ids]).tobytes())
        return number
