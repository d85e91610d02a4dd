"""What one model's pass over the text adds up."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from dus_cli.evaluation.intervals import Sums


@dataclass
class Scores:
    """What a pass over the text adds up, document by document, and what tells one pass from
    another.

    `nats` are of the `tokens` that were predicted. `guessed` are nats of first tokens that nothing
    stands before, each as one of `num_words` equally likely ones: with them, bytes of whole
    documents can be compared.
    """

    num_words: int = 1
    nats: Sums = field(default_factory=Sums)
    guessed: Sums = field(default_factory=Sums)
    tokens: Sums = field(default_factory=Sums)
    text_bytes: Sums = field(default_factory=Sums)
    num_documents: int = 0
    unknown_tokens: int = 0
    skipped: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def __post_init__(self) -> None:
        self.text_digest, self.token_digest = hashlib.sha256(), hashlib.sha256()

    @property
    def code_length(self) -> list[float]:
        """Nats by document for all of its tokens, the first one too."""
        return [sum(pair) for pair in zip(self.nats, self.guessed, strict=True)]

    def add_document(
        self, text: bytes, ids: Sequence[int], unknown: int | None, *, is_first_scored: bool = True
    ) -> int:
        """Count a document; its number."""
        number = self.num_documents
        self.num_documents += 1
        self.nats.add(number, 0.0)
        num_guessed = 0 if is_first_scored else min(1, len(ids))
        self.tokens.add(number, len(ids) - num_guessed)
        self.guessed.add(number, num_guessed * math.log(self.num_words))
        self.text_bytes.add(number, len(text))
        self.unknown_tokens += 0 if unknown is None else ids.count(unknown)
        self.text_digest.update(len(text).to_bytes(8, "little") + text)
        self.token_digest.update(array("Q", [len(ids), *ids]).tobytes())
        return number
