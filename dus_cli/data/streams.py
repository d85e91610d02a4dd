"""Token files as streams, and streams as rows for training and measuring.

`shelf.prepare` writes the files and lists them in `Prepared`. A row is `seq_length` inputs and
their next tokens. Rows follow each other without a gap, so every token of the stream but the first
is predicted once in an epoch, and less than a row is left over at the end.

If the tokenizer puts tokens before a text (`before`), a row that begins within a document begins
with them too, because a model trained with `<s>` predicts badly without it. Each row keeps places
for them, so that row i is found without reading the rows before it. They are never predicted.
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

# The label that the loss ignores.
IGNORED = -100

# Parts kept open at a time, two files each; a process may commonly open 1,024 files.
_MOST_OPEN = 128


@dataclass(frozen=True)
class Part:
    """A folder below `tokens/`, named `key`. Token counts include the special tokens."""

    key: str
    num_train_tokens: int
    num_train_documents: int
    num_heldout_tokens: int
    num_heldout_documents: int

    @classmethod
    def of(cls, key: str, meta: dict[str, Any]) -> Part:
        """The part in the folder `key`, by its meta.json."""
        tokens, documents = meta["num_tokens"], meta["num_documents"]
        return cls(
            key, tokens["train"], documents["train"], tokens["heldout"], documents["heldout"]
        )


@dataclass(frozen=True)
class PreparedSource:
    """A source as typed on the command line, without the query of a web address, and its parts in
    reading order.
    """

    name: str
    weight: float | None
    parts: tuple[Part, ...]

    @property
    def num_train_tokens(self) -> int:
        return sum(part.num_train_tokens for part in self.parts)


@dataclass(frozen=True)
class Growing:
    """Streams whose token files are still made while they are read.

    Attributes:
        cache: the folder that has the streams; None if it is `tokens/`.
        keys: the name of each stream's folder.
        weights: of the streams in the mixture.
        window_tokens: tokens within which rows are shuffled, of all streams together.
        num_train_tokens, num_train_documents: of each stream; if `is_estimate`, by its first
            segment.
    """

    cache: str | None
    keys: tuple[str, ...]
    weights: tuple[float, ...]
    window_tokens: int
    num_train_tokens: tuple[int, ...]
    num_train_documents: tuple[int, ...]
    is_estimate: bool


@dataclass(frozen=True)
class Prepared:
    """All of a run's data.

    Attributes:
        sources: the training data.
        eval_parts: the parts of --eval-data; empty if a share of the sources is held out.
        holdout: the share that was held out: larger than requested if that held out no document, 0
            if nothing is held out.
        dtype: the type of the ids in the files: uint16 or uint32.
        eos: the end-of-text id.
        before: the ids with which each document and each row begins.
        skipped: how many lines and documents were left out, by reason.
        unread: files of folders and patterns that look like data and were not read: `count`, and
            some `names`.
        eval_names: the held-out set that each of `eval_parts` belongs to; empty if they are one
            set without a name.
        content_key: a digest of all tokens and of the split, by which a resumed run recognises its
            data.
        growing: the streams if the text is still tokenised while the run trains; `sources` then
            have the first segment of each.
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
    growing: Growing | None = None

    @property
    def heldout_sets(self) -> dict[str, tuple[Part, ...]]:
        """The parts with the held-out documents of each set, by the set's name ("" if it has
        none).
        """
        if not self.eval_names:
            return {"": (*self.parts, *self.eval_parts)}
        pairs = list(zip(self.eval_names, self.eval_parts, strict=True))
        return {
            name: tuple(part for part_name, part in pairs if part_name == name)
            for name in dict.fromkeys(self.eval_names)
        }

    @property
    def parts(self) -> tuple[Part, ...]:
        return tuple(part for source in self.sources for part in source.parts)

    @property
    def num_train_tokens(self) -> int:
        if self.growing is not None:
            return sum(self.growing.num_train_tokens)
        return sum(part.num_train_tokens for part in self.parts)

    @property
    def num_train_documents(self) -> int:
        if self.growing is not None:
            return sum(self.growing.num_train_documents)
        return sum(part.num_train_documents for part in self.parts)

    @property
    def num_heldout_tokens(self) -> int:
        return sum(part.num_heldout_tokens for part in (*self.parts, *self.eval_parts))

    @property
    def num_heldout_documents(self) -> int:
        return sum(part.num_heldout_documents for part in (*self.parts, *self.eval_parts))

    def to_json(self) -> dict[str, Any]:
        record = asdict(self)
        if self.growing is None:
            del record["growing"]
        return record

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> Prepared:
        sources = tuple(
            PreparedSource(
                source["name"], source["weight"], tuple(Part(**part) for part in source["parts"])
            )
            for source in data["sources"]
        )
        eval_parts = tuple(Part(**part) for part in data["eval_parts"])
        parsed: dict[str, Any] = {"sources": sources, "eval_parts": eval_parts}
        if "growing" in data:
            fields: dict[str, Any] = {
                name: tuple(value) if isinstance(value, list) else value
                for name, value in data["growing"].items()
            }
            parsed["growing"] = Growing(**fields)
        ids_and_names = {name: tuple(data.get(name, ())) for name in ("before", "eval_names")}
        return cls(**{**data, **parsed, **ids_and_names})


class Tokens(Protocol):
    """The tokens of consecutive documents, in memory or in files."""

    def read(self, start: int, stop: int) -> Ids: ...

    def document_starts(self, start: int, stop: int) -> Ids: ...


class Stream:
    """The training or the held-out tokens of several parts in a row. Files are opened when needed.

    Raises:
        DataError: from `read` and `document_starts`, if a file does not have the expected size.
    """

    def __init__(
        self,
        folder: Path,
        parts: Sequence[Part],
        name: Literal["train", "heldout"],
        dtype: str | np.dtype[Any],
    ) -> None:
        self._folder, self._name, self._dtype = folder, name, np.dtype(dtype)
        self._counts = [count for part in parts if (count := self._count(part))[1]]
        self._starts = np.array([0, *accumulate(tokens for _, tokens, _ in self._counts)], np.int64)
        self._open: dict[int, tuple[npt.NDArray[Any], npt.NDArray[Any]]] = {}

    def _count(self, part: Part) -> tuple[str, int, int]:
        """The part's key, and its tokens and documents in this stream."""
        if self._name == "train":
            return part.key, part.num_train_tokens, part.num_train_documents
        return part.key, part.num_heldout_tokens, part.num_heldout_documents

    def append(self, part: Part) -> None:
        """Add a part at the end."""
        count = self._count(part)
        if count[1]:
            self._counts.append(count)
            self._starts = np.append(self._starts, self._starts[-1] + count[1])

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    def read(self, start: int, stop: int) -> Ids:
        """The tokens start…stop − 1, int64."""
        pieces = [ids[begin:end] for _, ids, _, begin, end in self._overlaps(start, stop)]
        return np.concatenate(pieces).astype(np.int64) if pieces else np.empty(0, np.int64)

    def document_starts(self, start: int, stop: int) -> Ids:
        """Positions in start…stop − 1 at which a document begins, ascending, int64."""
        positions = [np.empty(0, np.int64)]
        for offset, _, ends, begin, end in self._overlaps(start, stop):
            if begin == 0:
                positions.append(np.array([offset], np.int64))
            first, last = np.searchsorted(ends, [max(begin, 1), end])
            positions.append(ends[first:last].astype(np.int64) + offset)
        return np.concatenate(positions)

    def _overlaps(
        self, start: int, stop: int
    ) -> list[tuple[int, npt.NDArray[Any], npt.NDArray[Any], int, int]]:
        """For each part with some of these tokens: its start in the stream, its ids, its document
        ends, and the range of its tokens.
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
                del self._open[next(iter(self._open))]  # the least recently used
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
        f"the token file {path.name} in {shown(path.parent)} is damaged ({reason}); start again "
        "to rebuild it"
    )


class Row(NamedTuple):
    """Three arrays, int64 of shape (seq_length,). Labels are next tokens, or IGNORED."""

    input_ids: Ids
    labels: Ids
    position_ids: Ids


@dataclass(frozen=True)
class Packing:
    """How a stream is cut into rows.

    Attributes:
        seq_length: tokens in a row.
        eos: pads the last row.
        before: the ids with which a document or row begins.
        document_mask: whether the documents of a row are kept apart.

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
                f"a row of {self.seq_length} tokens has no place after the {len(self.before)} with "
                "which the tokenizer begins a text; choose a larger --seq-length, or "
                "--no-special-tokens"
            )

    @property
    def stride(self) -> int:
        """Tokens of the stream from one row to the next."""
        return self.seq_length - len(self.before)

    def num_rows(self, num_tokens: int) -> int:
        """The whole rows in a stream of so many tokens; the last token is a label only."""
        return max(0, num_tokens - 1) // self.stride

    @property
    def num_unpredicted(self) -> int:
        """Tokens at the beginning of each document that are not predicted."""
        return len(self.before) or int(self.document_mask)

    def lead(self, tokens: Tokens, start: int) -> int:
        """How many ids of `before` are put in front of a row that begins at token `start`: those
        that the stream does not have there already.
        """
        if not self.before:
            return 0
        begins = tokens.document_starts(max(0, start - len(self.before) + 1), start + 1)
        return start - int(begins[-1]) if len(begins) else len(self.before)

    def uncut_starts(self, tokens: Tokens, stop: int) -> list[int]:
        """The tokens before `stop` at which rows begin if no document that fits a row is cut.

        A cut document would be measured with `before` in its midst, where the model has never seen
        it.
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
        """The row that begins at token `start`. From token `stop` on it is padded with eos, without
        labels.

        A row has `stride` tokens of the stream or, if it `is_full`, as many as fit. With the
        document mask a document's last token predicts nothing, and positions restart at 0 with each
        document.
        """
        lead = self.lead(tokens, start)
        most = self.seq_length - lead if is_full else self.stride
        ids = tokens.read(start, min(start + most + 1, stop))
        end = lead + len(ids) - 1
        input_ids, labels = (
            np.full(self.seq_length, self.eos, np.int64),
            np.full(self.seq_length, IGNORED, np.int64),
        )
        input_ids[:lead], input_ids[lead:end], labels[lead:end] = (
            self.before[:lead],
            ids[:-1],
            ids[1:],
        )
        # Where documents begin, counted in inputs of this row. A document that began just before
        # the row may still have ids of `before` among the row's labels.
        first = max(0, start + 1 - max(0, len(self.before) - 1))
        begins = tokens.document_starts(first, start + len(ids)) - start + lead
        for offset in range(self.num_unpredicted):
            places = begins + offset - 1  # of the labels
            labels[places[(places >= lead) & (places < end)]] = IGNORED
        positions = np.arange(self.seq_length, dtype=np.int64)
        if self.document_mask:
            inner = begins[(begins > lead) & (begins < end)]
            if end < self.seq_length:
                inner = np.append(inner, end)  # the padding is a document of its own
            origins = np.zeros(self.seq_length, np.int64)
            origins[inner] = inner
            positions -= np.maximum.accumulate(origins)
        return Row(input_ids, labels, positions)


class Rows:
    """The training rows in the order of a run with this seed.

    Without weights all sources are one stream; with weights each source is a stream of its own, so
    that a row is of one source.

    Raises:
        DataError: there are too few tokens for a row; from `row`, a token file is damaged.
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
        self.num_rows = tuple(self.packing.num_rows(each.num_tokens) for each in self._streams)
        if weights and 0 in self.num_rows:
            name = prepared.sources[self.num_rows.index(0)].name
            raise DataError(
                f"{shown(name)} has too few tokens for one row of {seq_length}; leave it out of "
                "the mixture, add data, or choose a smaller --seq-length"
            )
        self.order = Order(self.num_rows, weights or None, seed)

    @property
    def rows_per_epoch(self) -> int:
        return self.order.rows_per_epoch

    def row(self, index: int) -> Row:
        """The run's row `index` = 0, 1, …, without end."""
        source, start = self.place(index)
        stream = self._streams[source]
        return self.packing.row(stream, start, stream.num_tokens)

    def place(self, index: int) -> tuple[int, int]:
        """The source of the run's row `index`, and the token of the source at which it begins."""
        source, place = self.order.locate(index)
        return source, place * self.packing.stride


class RowsInOrder(Sequence[Row]):
    """The first `stop` tokens as rows in stored order, read on access. The last row is padded.

    If the tokenizer puts tokens before a text, rows begin so that no document that fits a row is
    cut.
    """

    def __init__(self, tokens: Tokens, stop: int, packing: Packing) -> None:
        self.tokens, self.packing = tokens, packing
        last = max(0, stop - 1)  # the last token is a label only, not an input
        starts = (
            packing.uncut_starts(tokens, stop)
            if packing.before and last
            else range(0, last, packing.stride)
        )
        self._starts: list[int] = [*starts, last]
        self._documents = tokens.document_starts(0, last)

    def __len__(self) -> int:
        return len(self._starts) - 1

    @property
    def num_documents(self) -> int:
        """The number of documents with a token in some row."""
        return len(self._documents)

    @property
    def num_labels(self) -> int:
        """The number of tokens that are predicted."""
        return sum(int((row.labels != IGNORED).sum()) for row in self)

    def start(self, index: int) -> int:
        """The token at which row `index` begins."""
        return self._starts[index]

    def label_documents(self, index: int) -> Ids:
        """The number of the document, counted from 0, that each label of row `index` is of; int64
        of shape (seq_length,).
        """
        first = self._starts[index] - self.packing.lead(self.tokens, self._starts[index]) + 1
        places = first + np.arange(self.packing.seq_length, dtype=np.int64)
        return np.maximum(np.searchsorted(self._documents, places, side="right") - 1, 0)

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
    """The rows of each held-out set, by its name. The sets share `max_tokens` equally; what a
    smaller set does not use goes to the others.
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
