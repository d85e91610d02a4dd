"""Documents cut into windows that a model can see at once, and windows gathered into batches. Pure,
no torch.

Every token of a document is predicted exactly once, its first one too where the tokenizer puts a
token before a text: every window stands behind it, those that begin within a document as well, for
a model that was trained behind `<s>` knows little without it. Where nothing stands before a text
nothing predicts its first token. A document's first window predicts `length` tokens. Each further
one begins `stride` tokens later and predicts what no window before it did, so that a token has the
document's last `length` − `stride` tokens before it at least, as far as there are so many
(transformers' guide "Perplexity of fixed-length models").
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

# Windows of so many batches are sorted by their length before they are batched: little is padded
# then.
_BATCHES_AHEAD = 16


@dataclass(frozen=True)
class Window:
    """A run of a document's tokens, of which the last `num_scored` count."""

    document: int
    ids: Sequence[int]
    num_scored: int


def windows(
    document: int, ids: Sequence[int], length: int, stride: int, *, is_first_scored: bool = True
) -> Iterator[Window]:
    """The windows of a document of these token ids, of which the first counts or does not.

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
    """Windows of similar length together: at most `max_tokens` of them once padded, or one
    window.
    """
    held: list[Window] = []
    size = 0
    for window in source:
        held.append(window)
        size += len(window.ids)
        if size >= _BATCHES_AHEAD * max_tokens:
            yield from _batched(held, max_tokens)
            held, size = [], 0
    yield from _batched(held, max_tokens)


def _batched(held: list[Window], max_tokens: int) -> Iterator[list[Window]]:
    batch: list[Window] = []
    # the first is the longest of its batch
    for window in sorted(held, key=lambda window: -len(window.ids)):
        if batch and (len(batch) + 1) * len(batch[0].ids) > max_tokens:
            yield batch
            batch = []
        batch.append(window)
    if batch:
        yield batch
