"""Token files as a run reads them: parts in a row as one stream, the stream in rows.

`prepare` makes the files and says in `Prepared` which they are. A row is `seq_length` inputs and their
next tokens; rows follow each other without a gap, so every token of the stream but its first is
predicted once in an epoch, and less than a row is left over at the end.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt

from dus_cli.errors import shown
from dus_cli.heal.corpus import DataError
from dus_cli.heal.order import Order

Ids = npt.NDArray[np.int64]

# What the loss passes over.
IGNORED = -100

# Parts kept open at a time, by two files each: well below the 1,024 that a process commonly may open.
_MOST_OPEN = 128


@dataclass(frozen=True)
class Part:
    """A folder below `tokens/` by its key. Counts of tokens include the end-of-text of each document."""

    key: str
    num_train_tokens: int
    num_train_documents: int
    num_heldout_tokens: int
    num_heldout_documents: int


@dataclass(frozen=True)
class PreparedSource:
    """A source as typed on the command line, and its parts in reading order."""

    name: str
    weight: float | None
    parts: tuple[Part, ...]

    @property
    def num_train_tokens(self) -> int:
        return sum(part.num_train_tokens for part in self.parts)


@dataclass(frozen=True)
class Prepared:
    """All of a run's data.

    Attributes:
        sources: where training rows come from.
        eval_parts: evaluation data of its own; empty where held-out documents are a share of the sources.
        holdout: the share that was held out. More than asked for where that held no document; 0 where none is.
        dtype: of the ids in the files: uint16 or uint32.
        eos: the end-of-text id.
        skipped: lines, and documents left out, by reason.
        content_key: a digest of all tokens and of the way they were split; with it a resumed run knows its data.
    """

    sources: tuple[PreparedSource, ...]
    eval_parts: tuple[Part, ...]
    holdout: float
    dtype: str
    eos: int
    skipped: dict[str, int]
    content_key: str

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for source in self.sources for part in source.parts)

    @property
    def num_train_tokens(self) -> int:
        return sum(part.num_train_tokens for part in self.parts)

    @property
    def num_train_documents(self) -> int:
        return sum(part.num_train_documents for part in self.parts)

    @property
    def num_heldout_tokens(self) -> int:
        return sum(part.num_heldout_tokens for part in (*self.parts, *self.eval_parts))

    @property
    def num_heldout_documents(self) -> int:
        return sum(part.num_heldout_documents for part in (*self.parts, *self.eval_parts))

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Prepared:
        sources = tuple(
            PreparedSource(source["name"], source["weight"], tuple(Part(**part) for part in source["parts"]))
            for source in data["sources"]
        )
        eval_parts = tuple(Part(**part) for part in data["eval_parts"])
        return cls(**{**data, "sources": sources, "eval_parts": eval_parts})


class Tokens(Protocol):
    """Tokens of documents one behind the other, wherever they are kept."""

    def read(self, start: int, stop: int) -> Ids: ...

    def document_starts(self, start: int, stop: int) -> Ids: ...


class Stream:
    """The training or the held-out tokens of several parts, one behind the other. Files are opened when needed.

    Raises:
        DataError: from `read` and `document_starts`, where a file does not measure what it should.
    """

    def __init__(
        self, folder: Path, parts: Sequence[Part], name: Literal["train", "heldout"], dtype: str | np.dtype[Any]
    ) -> None:
        counts = [
            (part.key, part.num_train_tokens, part.num_train_documents)
            if name == "train"
            else (part.key, part.num_heldout_tokens, part.num_heldout_documents)
            for part in parts
        ]
        self._folder, self._name, self._dtype = folder, name, np.dtype(dtype)
        self._counts = [count for count in counts if count[1]]
        self._starts = np.array([0, *accumulate(tokens for _, tokens, _ in self._counts)], np.int64)
        self._open: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Ids:
        """Tokens start…stop − 1, int64."""
        found = [ids[begin:end] for _, ids, _, begin, end in self._overlaps(start, stop)]
        return np.concatenate(found).astype(np.int64) if found else np.empty(0, np.int64)

    def document_starts(self, start: int, stop: int) -> Ids:
        """Positions in start…stop − 1 at which a document begins, ascending, int64."""
        found = [np.empty(0, np.int64)]
        for offset, _, ends, begin, end in self._overlaps(start, stop):
            if begin == 0:
                found.append(np.array([offset], np.int64))
            first, last = np.searchsorted(ends, [max(begin, 1), end])
            found.append(ends[first:last].astype(np.int64) + offset)
        return np.concatenate(found)

    def _overlaps(self, start: int, stop: int) -> list[tuple[int, npt.NDArray[Any], npt.NDArray[Any], int, int]]:
        """Each part that has some of the tokens: its start in the stream, ids, ends, and which of its tokens."""
        assert 0 <= start <= stop <= self.num_tokens
        overlaps = []
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while index < len(self._counts) and self._starts[index] < stop:
            offset, end = int(self._starts[index]), int(self._starts[index + 1])
            ids, ends = self._files(index)
            overlaps.append((offset, ids, ends, max(start, offset) - offset, min(stop, end) - offset))
            index += 1
        return overlaps

    def _files(self, index: int) -> tuple[npt.NDArray[Any], npt.NDArray[Any]]:
        files = self._open.pop(index, None)
        if files is None:
            key, num_tokens, num_documents = self._counts[index]
            while len(self._open) >= _MOST_OPEN:
                del self._open[next(iter(self._open))]  # the one that was not used for longest
            folder = self._folder / key
            files = (
                _mapped(folder / f"{self._name}.bin", self._dtype, num_tokens),
                _mapped(folder / f"{self._name}.idx", np.dtype(np.uint64), num_documents),
            )
        self._open[index] = files
        return files


def _mapped(path: Path, dtype: np.dtype[Any], length: int) -> npt.NDArray[Any]:
    try:
        size = path.stat().st_size
        if size == length * dtype.itemsize:
            return np.memmap(path, dtype, mode="r", shape=(length,))
        reason = f"{size} bytes instead of {length * dtype.itemsize}"
    except OSError as error:
        reason = error.strerror or str(error)
    raise DataError(
        f"the token file {path.name} in {shown(path.parent)} is damaged ({reason}); start again, which builds it anew"
    )


class Row(NamedTuple):
    """int64, all of the row's length. Labels are next tokens, IGNORED where none counts."""

    input_ids: Ids
    labels: Ids
    position_ids: Ids


def row_at(stream: Tokens, start: int, length: int, stop: int, eos: int, *, document_mask: bool) -> Row:
    """Tokens start…start + length − 1 and the next ones. From `stop` on there are none: eos, without labels.

    With the mask a document's last token predicts nothing, and positions begin anew with each document.
    """
    tokens = stream.read(start, min(start + length + 1, stop))
    num_labels = len(tokens) - 1
    input_ids, labels = np.full(length, eos, np.int64), np.full(length, IGNORED, np.int64)
    input_ids[:num_labels], labels[:num_labels] = tokens[:-1], tokens[1:]
    positions = np.arange(length, dtype=np.int64)
    if document_mask:
        begins = stream.document_starts(start + 1, start + num_labels + 1) - start  # of 1…num_labels
        labels[begins - 1] = IGNORED
        inner = begins[begins < num_labels]
        if num_labels < length:
            inner = np.append(inner, num_labels)  # what fills the row is no part of the last document
        origins = np.zeros(length, np.int64)
        origins[inner] = inner
        positions -= np.maximum.accumulate(origins)
    return Row(input_ids, labels, positions)


class Rows:
    """The training rows in the order of a run with this seed.

    Without weights all sources are one stream; with weights each is its own, and only in rows do they mix.

    Raises:
        DataError: too few tokens for a row; from `row`, a damaged token file.
    """

    def __init__(
        self, prepared: Prepared, folder: Path, seq_length: int, seed: int, *, document_mask: bool = True
    ) -> None:
        self.seq_length, self.document_mask, self._eos = seq_length, document_mask, prepared.eos
        weights = [source.weight for source in prepared.sources if source.weight is not None]
        groups = [source.parts for source in prepared.sources] if weights else [prepared.parts]
        self._streams = [Stream(folder, parts, "train", prepared.dtype) for parts in groups]
        self.num_rows = tuple(max(0, stream.num_tokens - 1) // seq_length for stream in self._streams)
        self.order = Order(self.num_rows, weights or None, seed)

    @property
    def rows_per_epoch(self) -> int:
        return self.order.rows_per_epoch

    def row(self, index: int) -> Row:
        """The run's row `index` = 0, 1, …, without an end."""
        source, place = self.order.locate(index)
        stream, start = self._streams[source], place * self.seq_length
        return row_at(stream, start, self.seq_length, stream.num_tokens, self._eos, document_mask=self.document_mask)


class RowsInOrder(Sequence[Row]):
    """The first `stop` tokens in rows, in stored order, read when asked for. The last one is filled up."""

    def __init__(self, tokens: Tokens, stop: int, seq_length: int, eos: int, *, document_mask: bool) -> None:
        self._tokens, self._stop = tokens, stop
        self._seq_length, self._eos, self._document_mask = seq_length, eos, document_mask

    def __len__(self) -> int:
        return (max(1, self._stop) - 1 + self._seq_length - 1) // self._seq_length

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        start = range(len(self))[index] * self._seq_length
        return row_at(self._tokens, start, self._seq_length, self._stop, self._eos, document_mask=self._document_mask)


def heldout_rows(
    prepared: Prepared, folder: Path, seq_length: int, *, document_mask: bool = True, max_tokens: int | None = None
) -> RowsInOrder:
    """The first `max_tokens` held-out tokens (all of them if None) as rows."""
    stream = Stream(folder, (*prepared.parts, *prepared.eval_parts), "heldout", prepared.dtype)
    stop = stream.num_tokens if max_tokens is None else min(stream.num_tokens, max_tokens + 1)
    return RowsInOrder(stream, stop, seq_length, prepared.eos, document_mask=document_mask)
