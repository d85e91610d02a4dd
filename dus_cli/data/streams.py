"""Token files as a run reads them: parts in a row as one stream, the stream in rows.

`prepare` makes the files and says in `Prepared` which they are. A row is `seq_length` inputs and
their next tokens; rows follow each other without a gap, so every token of the stream but its first
is predicted once in an epoch, and less than a row is left over at the end.

Where the tokenizer puts tokens before a text (`before`), a row that begins within a document begins
with them too, as text does wherever the model is used: a model trained behind `<s>` knows little
without it. Each row keeps places for them, so that row i is found without reading those before it.
They are never what is predicted.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from itertools import accumulate
from pathlib import Path
from typing import Any, Literal, NamedTuple, Protocol, overload

import numpy as np
import numpy.typing as npt

from dus_cli.data.order import Order
from dus_cli.data.sources import Unread
from dus_cli.errors import DataError, shown

Ids = npt.NDArray[np.int64]

# What the loss passes over.
IGNORED = -100

# Parts kept open at a time, by two files each: well below the 1,024 that a process commonly may
# open.
_MOST_OPEN = 128


@dataclass(frozen=True)
class Part:
    """A folder below `tokens/` by its key. Counts of tokens include the end-of-text of each
    document.
    """

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
        eval_parts: evaluation data of its own; empty where held-out documents are a share of the
            sources.
        holdout: the share that was held out. More than asked for where that held no document; 0
            where none is.
        dtype: of the ids in the files: uint16 or uint32.
        eos: the end-of-text id.
        before: the ids with which each document begins, and each row.
        skipped: lines, and documents left out, by reason.
        unread: files of folders and patterns that look like data and were not read: `count`, and
            some `names`.
        eval_names: the held-out set that each of `eval_parts` is of; empty where they are one set
            without a name.
        content_key: a digest of all tokens and of the way they were split; with it a resumed run
            knows its data.
    """

    sources: tuple[PreparedSource, ...]
    eval_parts: tuple[Part, ...]
    holdout: float
    dtype: str
    eos: int
    skipped: dict[str, int]
    content_key: str
    before: tuple[int, ...] = ()
    unread: dict[str, Any] = field(default_factory=lambda: Unread().to_json())
    eval_names: tuple[str, ...] = ()

    @property
    def heldout_sets(self) -> dict[str, tuple[Part, ...]]:
        """The parts that have the held-out documents of each set, by its name; "" without one."""
        if not self.eval_names:
            return {"": (*self.parts, *self.eval_parts)}
        pairs = list(zip(self.eval_names, self.eval_parts, strict=True))
        return {
            name: tuple(part for its, part in pairs if its == name)
            for name in dict.fromkeys(self.eval_names)
        }

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
            PreparedSource(
                source["name"], source["weight"], tuple(Part(**part) for part in source["parts"])
            )
            for source in data["sources"]
        )
        eval_parts = tuple(Part(**part) for part in data["eval_parts"])
        made = {"sources": sources, "eval_parts": eval_parts}
        ids_and_names = {name: tuple(data.get(name, ())) for name in ("before", "eval_names")}
        return cls(**{**data, **made, **ids_and_names})


class Tokens(Protocol):
    """Tokens of documents one behind the other, wherever they are kept."""

    def read(self, start: int, stop: int) -> Ids: ...

    def document_starts(self, start: int, stop: int) -> Ids: ...


class Stream:
    """The training or the held-out tokens of several parts, one behind the other. Files are opened
    when needed.

    Raises:
        DataError: from `read` and `document_starts`, where a file does not measure what it should.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Part],
        name: Literal["train", "heldout"],
        dtype: str | np.dtype[Any],
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

    def _overlaps(
        self, start: int, stop: int
    ) -> list[tuple[int, npt.NDArray[Any], npt.NDArray[Any], int, int]]:
        """Each part that has some of the tokens: its start in the stream, ids, ends, and which
        of its tokens.
        """
        assert 0 <= start <= stop <= self.num_tokens
        overlaps = []
        index = int(np.searchsorted(self._starts, start, side="right")) - 1
        while index < len(self._counts) and self._starts[index] < stop:
            offset, end = int(self._starts[index]), int(self._starts[index + 1])
            ids, ends = self._files(index)
            overlaps.append(
                (offset, ids, ends, max(start, offset) - offset, min(stop, end) - offset)
            )
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
        f"the token file {path.name} in {shown(path.parent)} is damaged ({reason}); start again, "
        "which builds it anew"
    )


class Row(NamedTuple):
    """int64, all of the row's length. Labels are next tokens, IGNORED where none counts."""

    input_ids: Ids
    labels: Ids
    position_ids: Ids


@dataclass(frozen=True)
class Packing:
    """How a stream becomes rows: their length, what fills the last, what a text begins with, and
    the mask.

    Raises:
        DataError: a row has no place for text.
    """

    seq_length: int
    eos: int
    before: tuple[int, ...] = ()
    document_mask: bool = True

    def __post_init__(self) -> None:
        if self.stride < 1:
            raise DataError(
                f"a row of {self.seq_length} tokens has no place behind the {len(self.before)} "
                "with which the "
                "tokenizer begins a text; choose a larger --seq-length, or --no-special-tokens"
            )

    @property
    def stride(self) -> int:
        """Tokens of the stream from one row to the next."""
        return self.seq_length - len(self.before)

    @property
    def num_unasked(self) -> int:
        """Tokens at a document's beginning that are not predicted."""
        return len(self.before) or int(self.document_mask)

    def lead(self, tokens: Tokens, start: int) -> int:
        """How many of `before` stand in front of a row from token `start` on: as many as are not
        there already.
        """
        if not self.before:
            return 0
        begins = tokens.document_starts(max(0, start - len(self.before) + 1), start + 1)
        return start - int(begins[-1]) if len(begins) else len(self.before)

    def whole(self, tokens: Tokens, stop: int) -> list[int]:
        """The tokens at which rows begin so that no document is cut that a row can hold, as far as
        `stop`.

        A document whose beginning is in one row and its end in the next would be measured behind
        `before` in its midst, which is not how the model meets text.
        """
        begins = [*tokens.document_starts(0, stop).tolist(), stop]
        starts, place = [0], 0
        while True:
            end = place + self.seq_length - self.lead(tokens, place)
            if end >= stop - 1:
                return starts
            number = bisect_right(begins, end) - 1  # the document that the row ends in
            cut = begins[number]
            fits = place < cut and begins[number + 1] - cut <= self.seq_length
            place = cut if fits else end
            starts.append(place)

    def row(self, tokens: Tokens, start: int, stop: int, *, is_full: bool = False) -> Row:
        """The row from token `start` on. From `stop` on there are none: eos, without labels.

        A row has `stride` tokens of the stream, or as many as it has places for if it `is_full`.
        With the mask a document's last token predicts nothing, and positions begin anew with each
        document.
        """
        lead = self.lead(tokens, start)
        most = self.seq_length - lead if is_full else self.stride
        found = tokens.read(start, min(start + most + 1, stop))
        end = lead + len(found) - 1
        input_ids, labels = (
            np.full(self.seq_length, self.eos, np.int64),
            np.full(self.seq_length, IGNORED, np.int64),
        )
        input_ids[:lead], input_ids[lead:end], labels[lead:end] = (
            self.before[:lead],
            found[:-1],
            found[1:],
        )
        # Where documents begin, as inputs of this row: from before it, for what its labels still
        # have of `before`.
        first = max(0, start + 1 - max(0, len(self.before) - 1))
        begins = tokens.document_starts(first, start + len(found)) - start + lead
        for offset in range(self.num_unasked):
            places = begins + offset - 1  # of the labels
            labels[places[(places >= lead) & (places < end)]] = IGNORED
        positions = np.arange(self.seq_length, dtype=np.int64)
        if self.document_mask:
            inner = begins[(begins > lead) & (begins < end)]
            if end < self.seq_length:
                inner = np.append(inner, end)  # what fills the row is no part of the last document
            origins = np.zeros(self.seq_length, np.int64)
            origins[inner] = inner
            positions -= np.maximum.accumulate(origins)
        return Row(input_ids, labels, positions)


class Rows:
    """The training rows in the order of a run with this seed.

    Without weights all sources are one stream; with weights each is its own, and only in rows do
    they mix.

    Raises:
        DataError: too few tokens for a row; from `row`, a damaged token file.
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
        self.packing = Packing(seq_length, prepared.eos, prepared.before, document_mask)
        weights = [source.weight for source in prepared.sources if source.weight is not None]
        groups = [source.parts for source in prepared.sources] if weights else [prepared.parts]
        self._streams = [Stream(folder, parts, "train", prepared.dtype) for parts in groups]
        stride = self.packing.stride
        self.num_rows = tuple(max(0, stream.num_tokens - 1) // stride for stream in self._streams)
        self.order = Order(self.num_rows, weights or None, seed)

    @property
    def rows_per_epoch(self) -> int:
        return self.order.rows_per_epoch

    def row(self, index: int) -> Row:
        """The run's row `index` = 0, 1, …, without an end."""
        source, start = self.place(index)
        stream = self._streams[source]
        return self.packing.row(stream, start, stream.num_tokens)

    def place(self, index: int) -> tuple[int, int]:
        """The source of the run's row `index`, and the token of it with which the row begins."""
        source, place = self.order.locate(index)
        return source, place * self.packing.stride


class RowsInOrder(Sequence[Row]):
    """The first `stop` tokens in rows, in stored order, read when asked for. The last one is filled
    up.

    Where the tokenizer puts tokens before a text, so is each row that would else cut a document in
    two.
    """

    def __init__(self, tokens: Tokens, stop: int, packing: Packing) -> None:
        self.tokens, self.packing = tokens, packing
        last = max(0, stop - 1)  # it is predicted, and no input
        starts = (
            packing.whole(tokens, stop)
            if packing.before and last
            else range(0, last, packing.stride)
        )
        self._starts: list[int] = [*starts, last]

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def num_documents(self) -> int:
        """Documents that some row has a token of."""
        return len(self.tokens.document_starts(0, self._starts[-1]))

    @property
    def num_labels(self) -> int:
        """Tokens that are predicted."""
        return sum(int((row.labels != IGNORED).sum()) for row in self)

    def start(self, index: int) -> int:
        """The token with which row `index` begins."""
        return self._starts[index]

    @overload
    def __getitem__(self, index: int) -> Row: ...

    @overload
    def __getitem__(self, index: slice) -> list[Row]: ...

    def __getitem__(self, index: int | slice) -> Row | list[Row]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        number = range(len(self))[index]
        start, end = self._starts[number : number + 2]
        return self.packing.row(self.tokens, start, end + 1, is_full=True)


def heldout_sets(
    prepared: Prepared,
    folder: Path,
    seq_length: int,
    *,
    document_mask: bool = True,
    max_tokens: int | None = None,
) -> dict[str, RowsInOrder]:
    """The rows of each held-out set, by its name. The sets share `max_tokens`: each has as many as
    the others, and what a smaller one leaves is theirs.
    """
    sizes = {
        name: sum(part.num_heldout_tokens for part in parts)
        for name, parts in prepared.heldout_sets.items()
    }
    shares, left = dict(sizes), max_tokens
    if left is not None:
        for number, name in enumerate(sorted(sizes, key=lambda name: sizes[name])):
            shares[name] = min(sizes[name], max(1, left // (len(sizes) - number)))
            left -= shares[name]

    def rows(name: str) -> RowsInOrder:
        most = shares[name]
        return heldout_rows(
            prepared, folder, seq_length, name=name, document_mask=document_mask, max_tokens=most
        )

    return {name: rows(name) for name in sizes}


def heldout_rows(
    prepared: Prepared,
    folder: Path,
    seq_length: int,
    *,
    name: str = "",
    document_mask: bool = True,
    max_tokens: int | None = None,
) -> RowsInOrder:
    """The first `max_tokens` tokens (all of them if None) of a held-out set as rows."""
    stream = Stream(folder, prepared.heldout_sets[name], "heldout", prepared.dtype)
    stop = stream.num_tokens if max_tokens is None else min(stream.num_tokens, max_tokens + 1)
    return RowsInOrder(
        stream, stop, Packing(seq_length, prepared.eos, prepared.before, document_mask)
    )
