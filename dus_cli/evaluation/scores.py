"""The sums of one model's pass over the text."""

from __future__ import annotations

import hashlib
import math
from array import array
from collections.abc import Sequence
from dataclasses import dataclass, field

from dus_cli.evaluation.intervals import Sums


@dataclass
class Scores:
    """The sums of a pass over the text by document, and digests to compare passes by.

    `nats` is the loss of the `tokens` that were predicted. If nothing comes before a document's
    first token, `guessed` counts it as one of `num_words` equally likely ones, so that whole
    documents can be compared by their bytes.
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
        """Nats by document for all of its tokens, including the first."""
        return [sum(pair) for pair in zip(self.nats, self.guessed, strict=True)]

    def add_document(
        self, text: bytes, ids: Sequence[int], unknown: int | None, *, is_first_scored: bool = True
    ) -> int:
        """Count a document and return its number."""
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
