"""Documents cut into windows of the context length, and windows gathered into batches.

Every token of a document is predicted exactly once. If the tokenizer puts tokens before a text,
they come before every window, also before one that begins within a document, because a model
trained with `<s>` predicts badly without it; else a document's first token is not predicted. A
document's first window predicts `length` tokens. Each further window begins `stride` tokens later
and predicts the tokens that no earlier window did. So every token has at least `length` − `stride`
tokens of context, as far as the document has so many before it (transformers' guide "Perplexity of
fixed-length models").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# The windows of this many batches are sorted by length before they are batched, so that little is
# padded.
_BATCHES_AHEAD = 16


@dataclass(frozen=True)
class Window:
    """Consecutive tokens of a document, of which the last `num_scored` are predicted."""

    document: int
    ids: Sequence[int]
    num_scored: int


def windows(
    document: int, ids: Sequence[int], length: int, stride: int, *, is_first_scored: bool = True
) -> Iterator[Window]:
    """The windows of a document. `is_first_scored` says whether its first token is predicted.

    >>> cut = windows(0, range(7), length=4, stride=2)
    >>> [(list(window.ids), window.num_scored) for window in cut]
    [([0, 1, 2, 3], 4), ([2, 3, 4, 5], 2), ([4, 5, 6], 1)]
    """
    end = 0 if is_first_scored else 1
    if len(ids) <= end:
        return
    for start in range(0, len(ids), stride):
        stop = min(start + length, len(ids))
        yield Window(document, ids[start:stop], stop - end)
        end = stop
        if end == len(ids):
            return


def batches(source: Iterable[Window], max_tokens: int) -> Iterator[list[Window]]:
    """Batches of windows of similar length: at most `max_tokens` tokens with padding, or a single
    window.
    """
    pending: list[Window] = []
    size = 0
    for window in source:
        pending.append(window)
        size += len(window.ids)
        if size >= _BATCHES_AHEAD * max_tokens:
            yield from _batched(pending, max_tokens)
            pending, size = [], 0
    yield from _batched(pending, max_tokens)


def _batched(pending: list[Window], max_tokens: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    # the first window of a batch is its longest
    for window in sorted(pending, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > max_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
