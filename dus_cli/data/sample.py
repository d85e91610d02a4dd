"""A small sample of data for a measurement, tokenised and packed in memory.

`dus heal` keeps its data in token files, because it may be terabytes. A measurement takes a few
thousand tokens, so it reads only as far as it must and writes nothing.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from dus_cli.common.units import counted
from dus_cli.data.documents import ReadCounts, Reading, documents
from dus_cli.data.holdout import Split, text_hash
from dus_cli.data.remote import Say
from dus_cli.data.sources import Source, Unread, parse_sources
from dus_cli.data.streams import IGNORED, Ids, Packing, RowsInOrder
from dus_cli.data.tokeniser import Tokeniser
from dus_cli.errors import DataError, shown_list

# Of a long document this many characters are tokenised for each token of the budget.
_LONGEST_TOKEN = 32


@dataclass(frozen=True)
class Sample:
    """Documents in reading order. The last one of each source is cut at the token budget.

    `skipped` counts the lines and documents left out, by reason; `unread` are files that look like
    data and were not read.
    """

    texts: tuple[str, ...]
    skipped: dict[str, int]
    unread: Unread = field(default_factory=Unread)

    @property
    def num_bytes(self) -> int:
        """Size in UTF-8."""
        return sum(len(text.encode()) for text in self.texts)


def read_sample(
    files: Sequence[str],
    tokeniser: Tokeniser,
    max_tokens: int,
    *,
    reading: Reading | None = None,
    holdout: float | None = None,
    say: Say = lambda _: None,
) -> Sample:
    """The first documents of the data, with at most `max_tokens` tokens, special tokens included.

    Args:
        files: arguments of `--data`. Sources with weights share the tokens by weight; sources
            without are read one after the other.
        tokeniser: counts the tokens.
        max_tokens: the token budget.
        reading: the text field, and what to do with bad lines.
        holdout: read only the documents that `dus heal --holdout SHARE` holds out; None reads
            every document.
        say: called with a line for a person if a store does not answer and is tried again.

    Raises:
        DataError: a file is missing or cannot be read, or there is no document.
    """
    counts, texts = ReadCounts(), list[str]()
    with tempfile.TemporaryDirectory(prefix="dus-sample-") as spool:  # for standard input
        sources = parse_sources(files, Path(spool), (reading or Reading()).text_field, say=say)
        weights = [source.weight or 0.0 for source in sources]
        left = max_tokens
        for source, weight in zip(sources, weights, strict=True):
            budget = round(max_tokens * weight / sum(weights)) if weight else left
            documents_read, num_tokens = _first_documents(
                _documents(source, reading or Reading(), holdout, counts), tokeniser, budget
            )
            texts += documents_read
            left -= num_tokens
    if not texts:
        raise DataError(
            f"{shown_list(list(files))} has no documents to measure on: {_why(counts, holdout)}"
        )
    unread = sum((source.unread for source in sources), Unread())
    return Sample(tuple(texts), dict(sorted(counts.skipped.items())), unread)


def _why(counts: ReadCounts, holdout: float | None) -> str:
    if counts.documents and holdout is not None:
        return (
            f"none of {counted(counts.documents, 'document')} is in the held-out share of "
            f"{holdout:.2%}; raise --holdout"
        )
    if counts.documents:
        return "they have no tokens"
    if counts.skipped:
        left_out = shown_list([f"{count} {reason}" for reason, count in counts.skipped.items()])
        return f"left out: {left_out}; check the data"
    return "the files are empty; choose others"


def _documents(
    source: Source, reading: Reading, holdout: float | None, counts: ReadCounts
) -> Iterator[str]:
    split = None if holdout is None else Split(holdout)
    for path in source.paths:
        for text in documents(path, reading.text_field, reading.on_bad_line, counts):
            if split is None or split.holds_out(text_hash(text.encode())):
                yield text


def _first_documents(
    texts: Iterator[str], tokeniser: Tokeniser, max_tokens: int
) -> tuple[list[str], int]:
    """The first documents with at most `max_tokens` tokens, and how many tokens they have."""
    chosen: list[str] = []
    total, num_special = 0, len(tokeniser.before) + len(tokeniser.ending)
    for whole in texts:
        room = max_tokens - total - num_special
        if room < 1:
            break
        text = whole[: room * _LONGEST_TOKEN]
        (ids,) = tokeniser.encode([text])
        if len(ids) > room:
            text = _beginning(text, tokeniser, room)
            (ids,) = tokeniser.encode([text])
        if ids:
            tokeniser.check_ids(max(ids))
            chosen.append(text)
            total += len(ids) + num_special
        if len(text) < len(whole):
            break
    return chosen, total


def _beginning(text: str, tokeniser: Tokeniser, max_tokens: int) -> str:
    """The longest beginning of a text with at most `max_tokens` tokens, to about 1.5%, by
    bisection.
    """
    low, high = 0, len(text)
    while high - low > max(1, low >> 6):
        middle = (low + high) // 2
        (ids,) = tokeniser.encode([text[:middle]])
        low, high = (middle, high) if len(ids) <= max_tokens else (low, middle)
    return text[:low]


@dataclass(frozen=True)
class _InMemory:
    """The tokens of consecutive documents, and where each document ends."""

    ids: Ids
    ends: Ids

    def read(self, start: int, stop: int) -> Ids:
        """The tokens start…stop − 1."""
        return self.ids[start:stop]

    def document_starts(self, start: int, stop: int) -> Ids:
        """Positions in start…stop − 1 at which a document begins."""
        starts = np.concatenate([[0], self.ends[:-1]])
        return starts[(starts >= start) & (starts < stop)]


class Packed(RowsInOrder):
    """Documents packed into rows as `dus heal` packs its held-out set. The last row is padded."""

    def __init__(
        self,
        texts: Sequence[str],
        tokeniser: Tokeniser,
        seq_length: int,
        *,
        document_mask: bool = True,
    ) -> None:
        ids, ends = list[int](), list[int]()
        for document in tokeniser.encode(texts):
            ids += [*tokeniser.before, *document, *tokeniser.ending]
            ends.append(len(ids))
        tokens = _InMemory(np.array(ids, np.int64), np.array(ends, np.int64))
        tokeniser.check_ids(int(tokens.ids.max(initial=0)))
        super().__init__(
            tokens, len(ids), Packing(seq_length, tokeniser.eos, tokeniser.before, document_mask)
        )
        self.num_tokens = len(ids)  # special tokens included
        self._ends = tokens.ends

    def document_numbers(self, index: int) -> Ids:
        """The document, from 0, that each label of row `index` belongs to; -1 at ignored labels."""
        row, start = self[index], self.start(index)
        first = start + 1 - self.packing.lead(self.tokens, start)
        numbers = np.searchsorted(
            self._ends, np.arange(first, first + self.packing.seq_length), side="right"
        )
        return np.where(row.labels == IGNORED, -1, numbers)
