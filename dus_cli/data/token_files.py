"""Text to token files, with the model's own tokenizer, in memory that does not grow with the text.

A part is a folder:

- `train.bin`, `heldout.bin`: token ids, uint16 or uint32, document after document. A document
  begins with the special tokens that the model's tokenizer puts before a text, and ends with those
  that it puts after one and with one end-of-text.
- `train.idx`, `heldout.idx`: uint64, the token offset at which each document ends.
- `hashes.bin`: uint64, the hash of each document of evaluation data; else empty.
- `meta.json`: counts, from which the sizes of the files follow.

A document that occurs several times (`--weight-field`) is in its place once; its copies follow
after the part's last document, so that they are apart.

While one batch is tokenised (by the tokenizer's own threads, without Python's lock) a thread reads
the next.
"""

from __future__ import annotations

import json
import math
import os
from array import array
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dus_cli.common.files import sync_file, writing
from dus_cli.data.documents import ReadCounts, Reading, records
from dus_cli.data.holdout import EVERYTHING, HASH_BITS, Split, num_copies, text_hash
from dus_cli.data.remote import StoreFile
from dus_cli.data.texts import Document, Fields, OfValue, Record
from dus_cli.data.tokeniser import Tokeniser, pieces_of

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

FORMAT = 2

# Bytes of text tokenised at a time: enough for every core; the tokenizer's memory is about 40 times
# as much.
_BATCH = min(os.cpu_count() or 1, 16) << 20

# Tokens copied at a time.
_COPIED = 1 << 20


def token_dtype(vocab_size: int) -> type[np.uint16 | np.uint32]:
    """The smallest integer type that holds every id."""
    return np.uint16 if vocab_size <= 1 << 16 else np.uint32


@dataclass
class Summary:
    """Results of building a part, written to meta.json. `lowest_hash` and `highest_hash` are of the
    documents that were not left out.
    """

    skipped: dict[str, int] = field(default_factory=dict)
    highest_id: int = 0
    lowest_hash: int = 2**HASH_BITS
    highest_hash: int = -1


class _Piece(NamedTuple):
    """A document, or a piece of a long text: whether it is held out, how often it occurs, and
    whether it is the first and the last piece. A document of token ids is always one piece.
    """

    text: Document
    is_held_out: bool
    num_copies: int
    is_first: bool
    is_last: bool


class _Batch(NamedTuple):
    pieces: list[_Piece]
    num_source_bytes: int


class TextPlace(NamedTuple):
    """A place between two documents of several files: the number of the file, and how many
    documents of it were read.
    """

    file: int = 0
    documents: int = 0


class Reader:
    """The documents of several files in a row, read in portions.

    Args:
        files: read in this order.
        reading: the fields, and what to do with bad lines.
        of_value: makes a document from the field's value; None if the value is the text.
        start: where reading begins; None is the first file's beginning.

    Attributes:
        place: behind the last document that was read.
        position: how many bytes of the files were read.
        is_at_end: no document follows; known after an attempt to read one.
        skipped: how many lines and documents were left out, by reason.
    """

    def __init__(
        self,
        files: Sequence[Path | StoreFile],
        reading: Reading,
        of_value: OfValue | None = None,
        start: TextPlace | None = None,
    ) -> None:
        self._files, self._reading, self._of_value = files, reading, of_value
        self.place, self.position, self.is_at_end = start or TextPlace(), 0, False
        self.skipped: Counter[str] = Counter()
        self._records = self._all()

    def portion(self, size: float = math.inf) -> Iterator[Record]:
        """The next documents, until they have `size` characters together. A token id counts as
        four.

        Raises:
            DataError: a file cannot be read, or has a bad line.
        """
        for record in self._records:
            yield record
            document = record.document
            size -= len(document) if isinstance(document, str) else 4 * len(document)
            if size <= 0:
                return

    def _all(self) -> Iterator[Record]:
        first, num_before = self.place
        reading = self._reading
        fields = Fields(reading.text_field, self._of_value, reading.weight_field)
        for number, file in enumerate(self._files):
            start, size = self.position, file.stat().st_size
            if number >= first:
                counts = ReadCounts(skipped=self.skipped)
                found = records(file, fields, reading.on_bad_line, counts)
                if number == first and num_before:
                    for _ in islice(found, num_before):
                        pass
                    self.skipped.clear()  # counted by whoever read these documents
                for record in found:
                    self.place = TextPlace(number, counts.documents)
                    self.position = start + min(counts.position, size)
                    yield record
            self.position = start + size
        self.is_at_end = True


def write_part(
    folder: Path,
    reader: Reader,
    split: Split,
    tokeniser: Tokeniser,
    on_bytes: Callable[[int], object] = lambda _: None,
    *,
    size: float = math.inf,
) -> dict[str, Any]:
    """Tokenise text into an empty folder and sync it; return the content of meta.json.

    Args:
        folder: where the part is written.
        reader: of the text.
        split: which documents are held out or left out.
        tokeniser: the model's.
        on_bytes: called with the bytes of the files done since the last call.
        size: the characters after which the part ends with a document.

    Raises:
        DataError: a file cannot be read, or an id is beyond the model's vocabulary.
        OutputError: writing failed.
    """
    summary = Summary()
    hashes = array("Q")
    dtype = token_dtype(tokeniser.vocab_size)
    with ExitStack() as closing:
        train = closing.enter_context(_TokenFile(folder, "train", dtype))
        heldout = closing.enter_context(_TokenFile(folder, "heldout", dtype))
        for batch in _read_ahead(_batches(reader, size, split, summary, hashes)):
            for piece, ids in zip(batch.pieces, _encoded(batch, tokeniser), strict=True):
                target = heldout if piece.is_held_out else train
                if piece.is_first and not _begins(piece, ids, tokeniser):
                    target.add(tokeniser.before)
                target.add(ids)
                if piece.is_last:
                    if isinstance(piece.text, str) or ids[-1] != tokeniser.eos:
                        target.add(tokeniser.ending)
                    target.end_document(piece.num_copies)
            for target in (train, heldout):
                summary.highest_id = max(summary.highest_id, target.highest_id)
                tokeniser.check_ids(target.highest_id)
                target.flush()
            on_bytes(batch.num_source_bytes)
        train.add_copies()
    with writing("hashes.bin"):
        (folder / "hashes.bin").write_bytes(hashes.tobytes())
    meta = {
        "format": FORMAT,
        "dtype": np.dtype(dtype).name,
        "eos": tokeniser.eos,
        "before": tokeniser.before,
        "num_tokens": {"train": train.num_tokens, "heldout": heldout.num_tokens},
        "num_documents": {"train": train.num_documents, "heldout": heldout.num_documents},
        "num_hashes": len(hashes),
        **vars(summary),
    }
    with writing("meta.json"):
        (folder / "meta.json").write_text(json.dumps(meta, indent=1) + "\n")
    for path in folder.iterdir():
        sync_file(path)
    return meta


def _encoded(batch: _Batch, tokeniser: Tokeniser) -> Iterator[Sequence[int]]:
    """The ids of each piece: of a text by the tokenizer, of token ids as they are."""
    encoded = iter(tokeniser.encode([p.text for p in batch.pieces if isinstance(p.text, str)]))
    for piece in batch.pieces:
        yield next(encoded) if isinstance(piece.text, str) else piece.text.tolist()


def _begins(piece: _Piece, ids: Sequence[int], tokeniser: Tokeniser) -> bool:
    """Whether a document of token ids already begins with the tokenizer's special tokens."""
    before = tokeniser.before
    return not isinstance(piece.text, str) and tuple(ids[: len(before)]) == tuple(before)


def is_whole(folder: Path, meta: dict[str, Any]) -> bool:
    """Whether the files of a part have the sizes that its meta.json implies."""
    try:
        size = np.dtype(meta["dtype"]).itemsize
        return (folder / "hashes.bin").stat().st_size == meta["num_hashes"] * 8 and all(
            (folder / f"{name}.bin").stat().st_size == meta["num_tokens"][name] * size
            and (folder / f"{name}.idx").stat().st_size == meta["num_documents"][name] * 8
            for name in ("train", "heldout")
        )
    except (OSError, KeyError, TypeError):
        return False


def _read_ahead(batches: Iterator[_Batch]) -> Iterator[_Batch]:
    """The same batches; a thread reads the next one while the caller works on one."""
    with ThreadPoolExecutor(1) as pool:
        ahead = pool.submit(next, batches, None)
        while (batch := ahead.result()) is not None:
            ahead = pool.submit(next, batches, None)
            yield batch


def _batches(
    reader: Reader, size: float, split: Split, summary: Summary, hashes: array[int]
) -> Iterator[_Batch]:
    pieces: list[_Piece] = []
    num_bytes, position = 0, reader.position
    for text, weight in reader.portion(size):
        encoded = text.encode() if isinstance(text, str) else text.tobytes()
        number = text_hash(encoded)
        if number in split.left_out:
            reader.skipped["in_eval_data"] += 1
            continue
        if split.share == EVERYTHING:
            hashes.append(number)
        summary.lowest_hash = min(summary.lowest_hash, number)
        is_held_out = split.holds_out(number)
        copies = 1 if is_held_out else num_copies(weight, number)
        if not copies:
            reader.skipped["by_weight"] += 1
            continue
        summary.highest_hash = max(summary.highest_hash, number)
        is_first = True
        whole = [(text, True)]
        for piece, is_last in pieces_of(text) if isinstance(text, str) else whole:
            pieces.append(_Piece(piece, is_held_out, copies, is_first, is_last))
            is_first = False
            num_bytes += len(encoded) * len(piece) // len(text)
            if num_bytes >= _BATCH or len(pieces) >= _BATCH >> 8:
                yield _Batch(pieces, reader.position - position)
                pieces, num_bytes, position = [], 0, reader.position
    summary.skipped.update(reader.skipped)
    reader.skipped.clear()
    yield _Batch(pieces, reader.position - position)


class _TokenFile:
    """NAME.bin and NAME.idx, written a batch at a time."""

    def __init__(self, folder: Path, name: str, dtype: type[np.uint16 | np.uint32]) -> None:
        self._folder, self._name, self._dtype = folder, name, dtype
        self._ids, self._ends = array("I"), array("Q")
        self.num_tokens = self.num_documents = self._start = 0
        self._copied = array("Q")  # for each document with copies: start, end, number of copies

    def __enter__(self) -> Self:
        with writing(f"{self._name}.bin"):
            self._bin = open(self._folder / f"{self._name}.bin", "xb", buffering=0)
            self._idx = open(self._folder / f"{self._name}.idx", "xb", buffering=0)
        return self

    def __exit__(self, *_: object) -> None:
        self._bin.close()
        self._idx.close()

    def add(self, ids: Sequence[int]) -> None:
        self._ids.extend(ids)
        self.num_tokens += len(ids)

    def end_document(self, num_copies: int = 1) -> None:
        """End a document that occurs so often; `add_copies` writes all but the first."""
        if num_copies > 1:
            self._copied.extend((self._start, self.num_tokens, num_copies - 1))
        self._start = self.num_tokens
        self._ends.append(self.num_tokens)
        self.num_documents += 1

    def add_copies(self) -> None:
        """Write each copy of the documents that occur several times: every document's second
        occurrence, then every third.
        """
        copied = np.frombuffer(self._copied, np.uint64).astype(np.int64).reshape(-1, 3)
        if not len(copied):
            return
        path = self._folder / f"{self._name}.bin"
        written = np.memmap(path, self._dtype, mode="r", shape=(self.num_tokens,))
        while len(copied):
            for start, end, _ in copied.tolist():
                self._ids.frombytes(written[start:end].astype(np.uint32).tobytes())
                self.num_tokens += end - start
                self.end_document()
                if len(self._ids) >= _COPIED:
                    self.flush()
            copied = copied[copied[:, 2] > 1] - (0, 0, 1)
        self.flush()

    @property
    def highest_id(self) -> int:
        """The highest of the ids not yet written."""
        return int(np.frombuffer(self._ids, np.uint32).max(initial=0))

    def flush(self) -> None:
        ids = np.frombuffer(self._ids, np.uint32).astype(self._dtype)
        with writing(f"{self._name}.bin"):
            _write_all(self._bin, ids.data.cast("B") if len(ids) else b"")
            _write_all(self._idx, memoryview(self._ends).cast("B"))
        self._ids, self._ends = array("I"), array("Q")


def _write_all(file: Any, content: memoryview | bytes) -> None:
    while len(content):
        content = content[file.write(content) :]
