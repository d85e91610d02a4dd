"""Streams that grow while they are read (`--stream`), and their rows.

Below `tokens/`, `<key>/000000`, `000001`, … are the segments of a stream: parts as in
`token_files`, each with a `place.json` that says where in the text the next one begins. A segment
gets its name when it is whole, so a reader needs no lock. `segments` writes them.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from dus_cli.data.order import Order, WindowOrder
from dus_cli.data.streams import Packing, Part, Prepared, Row, Rows, Stream
from dus_cli.data.token_files import TextPlace
from dus_cli.errors import DataError, shown

PLACE = "place.json"


@dataclass(frozen=True)
class TokenSegment:
    """A finished segment.

    Attributes:
        part: its tokens.
        meta: its meta.json.
        end: where in the text it ends.
        position: bytes of the files up to there.
        is_last: no document follows.
    """

    part: Part
    meta: dict[str, Any]
    end: TextPlace
    position: int
    is_last: bool


def segment_key(stream_key: str, number: int) -> str:
    """The folder of a segment below `tokens/`.

    >>> segment_key("stream-0", 12)
    'stream-0/000012'
    """
    return f"{stream_key}/{number:06}"


def read_segment(folder: Path, key: str) -> TokenSegment | None:
    """The segment in the folder `key` below `folder`; None if it is not there."""
    try:
        meta = json.loads((folder / key / "meta.json").read_bytes())
        place = json.loads((folder / key / PLACE).read_bytes())
        return TokenSegment(
            Part.of(key, meta),
            meta,
            TextPlace(place["file"], place["documents"]),
            place["position"],
            place["is_last"],
        )
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _segments(folder: Path, key: str) -> Iterator[TokenSegment]:
    """The segments of a stream that are finished."""
    for number in count():
        segment = read_segment(folder, segment_key(key, number))
        if segment is None:
            return
        yield segment


def skipped_since(folder: Path, keys: Sequence[str]) -> Counter[str]:
    """How many lines and documents of these streams were left out behind the first segments, by
    reason.
    """
    skipped: Counter[str] = Counter()
    for key in keys:
        for segment in islice(_segments(folder, key), 1, None):
            skipped.update(segment.meta["skipped"])
    return skipped


def measured(prepared: Prepared, folder: Path) -> Prepared:
    """A run's data with their true sizes, if all of their text is tokenised by now; else with the
    estimates.
    """
    growing = prepared.growing
    if growing is None or not growing.is_estimate:
        return prepared
    streams = [list(_segments(folder, key)) for key in growing.keys]
    if not all(segments and segments[-1].is_last for segments in streams):
        return prepared
    parts = [[segment.part for segment in segments] for segments in streams]
    known = replace(
        growing,
        num_train_tokens=tuple(sum(part.num_train_tokens for part in each) for each in parts),
        num_train_documents=tuple(sum(part.num_train_documents for part in each) for each in parts),
        is_estimate=False,
    )
    return replace(prepared, growing=known)


class GrowingStream(Stream):
    """The training tokens of a stream, as many as there are.

    Attributes:
        num_segments: how many segments it has.
        last: the last of them; None before the first.
    """

    def __init__(self, folder: Path, key: str, dtype: str | np.dtype[Any]) -> None:
        super().__init__(folder, (), "train", dtype)
        self.key = key
        self.num_segments = 0
        self.last: TokenSegment | None = None

    @property
    def has_ended(self) -> bool:
        return self.last is not None and self.last.is_last

    def refresh(self) -> None:
        """Look for segments that were finished meanwhile."""
        while not self.has_ended:
            segment = read_segment(self._folder, segment_key(self.key, self.num_segments))
            if segment is None:
                return
            self.append(segment.part)
            self.last = segment
            self.num_segments += 1


class GrowingRows:
    """The training rows in the order of a run with this seed, while their tokens are still made.

    Args:
        prepared: the run's data, with `growing`.
        folder: has the streams.
        seq_length: tokens in a row.
        seed: the run's.
        document_mask: whether the documents of a row are kept apart.
    """

    def __init__(
        self,
        prepared: Prepared,
        folder: Path,
        seq_length: int,
        seed: int,
        *,
        document_mask: bool = True,
    ) -> None:
        assert prepared.growing is not None
        self._growing = growing = prepared.growing
        self.packing = Packing(seq_length, prepared.eos, prepared.before, document_mask)
        self.streams = [GrowingStream(folder, key, prepared.dtype) for key in growing.keys]
        self._names = [source.name for source in prepared.sources]
        self._token_bytes = np.dtype(prepared.dtype).itemsize
        window_rows = max(1, growing.window_tokens // self.packing.stride)
        self.order = WindowOrder(growing.weights, window_rows, seed)

    @property
    def rows_per_epoch(self) -> int:
        """The rows of an epoch, by the sizes of the streams, which may be estimates."""
        tokens = self._growing.num_train_tokens
        num_rows = [max(1, self.packing.num_rows(number)) for number in tokens]
        return Order(num_rows, self._growing.weights, self.order.seed).rows_per_epoch

    def has(self, index: int) -> bool:
        """Whether the run's row `index` can be read yet."""
        source, draw = self.order.draw(index)
        return self._has(source, draw)

    def _has(self, source: int, draw: int) -> bool:
        stream, needed = self.streams[source], self.order.num_needed(source, draw)
        if not stream.has_ended and self._num_rows(stream) < needed:
            stream.refresh()
        return stream.has_ended or self._num_rows(stream) >= needed

    def _num_rows(self, stream: Stream) -> int:
        return self.packing.num_rows(stream.num_tokens)

    def tokens_needed(self, num_rows: int) -> list[int]:
        """The tokens that each stream must have before the run's first rows are all known, unless
        it has ended.
        """
        draws = self.order.counts(num_rows)
        return [
            self.order.num_needed(source, number - 1) * self.packing.stride + 1 if number else 0
            for source, number in enumerate(draws)
        ]

    def num_bytes(self, num_rows: int) -> int:
        """About how many bytes the tokens of the run's first rows take: whole windows, or a whole
        stream by its estimated size.
        """
        pairs = zip(self.tokens_needed(num_rows), self._growing.num_train_tokens, strict=True)
        return sum(min(pair) for pair in pairs) * self._token_bytes

    def check_not_empty(self) -> None:
        """Check that every stream that has ended has a row.

        Raises:
            DataError: one has none.
        """
        for number, stream in enumerate(self.streams):
            stream.refresh()
            if stream.has_ended and not self._num_rows(stream):
                raise DataError(
                    f"{shown(self._names[number])} has too few tokens for one row of "
                    f"{self.packing.seq_length}; leave it out, add data, or choose a smaller "
                    "--seq-length"
                )

    def row(self, index: int) -> Row:
        """The run's row `index` = 0, 1, …, without end. It must be there: see `has`.

        Raises:
            DataError: its stream has no row, or a token file is damaged.
        """
        source, start = self.place(index)
        stream = self.streams[source]
        return self.packing.row(stream, start, stream.num_tokens)

    def place(self, index: int) -> tuple[int, int]:
        """The source of the run's row `index`, and the token of the source at which it begins."""
        source, draw = self.order.draw(index)
        assert self._has(source, draw)
        stream = self.streams[source]
        if stream.has_ended and not self._num_rows(stream):
            self.check_not_empty()
        known = self._num_rows(stream) if stream.has_ended else None
        return source, self.order.row(source, draw, known) * self.packing.stride


# The training rows of a run.
AnyRows: TypeAlias = Rows | GrowingRows


def open_rows(
    prepared: Prepared, folder: Path, seq_length: int, seed: int, *, document_mask: bool = True
) -> AnyRows:
    """The training rows of a run, whose tokens are all made or still grow.

    Raises:
        DataError: there are too few tokens for a row.
    """
    kind: type[AnyRows] = Rows if prepared.growing is None else GrowingRows
    return kind(prepared, folder, seq_length, seed, document_mask=document_mask)
