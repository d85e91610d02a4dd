"""Write the segments of growing streams (`growing`): the first of each before the run begins, the
others while it trains, in a process of their own.

Without weights all sources are one stream; with weights each is a stream of its own. The documents
that are measured are those that the hash holds out of the first segments; documents that it holds
out of later ones are not trained on either.
"""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from itertools import count, takewhile
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from dus_cli.common.files import writing
from dus_cli.common.locks import this_process
from dus_cli.common.reports import public_address
from dus_cli.data.growing import (
    PLACE,
    GrowingRows,
    GrowingStream,
    TokenSegment,
    read_segment,
    segment_key,
)
from dus_cli.data.holdout import Split
from dus_cli.data.remote import StoreFile
from dus_cli.data.shelf import (
    Shelf,
    built,
    check_there_is_training,
    digest_of,
    evaluation_of,
    hashes_in,
    is_of_a_part,
    prepared_from,
    share_that_holds_some,
    stamp_of,
    try_lock,
    unread_in,
)
from dus_cli.data.sources import Source
from dus_cli.data.streams import Growing, Prepared, PreparedSource
from dus_cli.data.token_files import FORMAT, Reader, is_whole, token_dtype, write_part
from dus_cli.errors import DataError, shown_list
from dus_cli.writing.staging import Staging

if TYPE_CHECKING:
    from typing_extensions import Self  # in typing from Python 3.11 on

# The folder of a stream begins with this.
PREFIX = "stream-"

# Characters of a segment's text, about four million tokens: some seconds of tokenising. A segment
# is never larger than a window of as many tokens.
_SEGMENT = 16 << 20
_CHARACTERS_PER_TOKEN = 4

# Seconds between two looks at what another process writes.
_POLL = 0.25


def begin(
    shelf: Shelf,
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    *,
    holdout: float,
    window_tokens: int,
    wait: bool,
    say: Callable[[str], object],
) -> Prepared:
    """Tokenise the evaluation data, and the first segment of each stream that is not there yet.

    If the share `holdout` holds out none of their documents, it is doubled until it does, up to a
    half.

    Args:
        shelf: where the tokens are kept, and how they are made.
        sources: training data.
        eval_sources: evaluation data; may be empty.
        holdout: the share of documents held out; ignored with `eval_sources`.
        window_tokens: tokens within which rows are shuffled, of all streams together.
        wait: whether to wait for another run that tokenises the evaluation data.
        say: called with a line of text for a person.

    Raises:
        DataError: there is nothing to train on; a file, the tokenizer or an id is not usable.
        OutputError: the disk is full, or failed.
    """
    paths = [path for source in eval_sources for path in source.paths]
    evaluation = built(shelf, lambda: evaluation_of(shelf, eval_sources), paths, wait=wait, say=say)
    share = 0.0 if eval_sources else holdout
    growths = _growths(shelf, sources, evaluation.keys, share, window_tokens)
    shelf.expect(sum(min(growth.num_bytes, _segment_size(window_tokens)) for growth in growths))
    segments = [_first(growth, say) for growth in growths]
    if share and not any(segment.part.num_heldout_documents for segment in segments):
        share = share_that_holds_some([segment.meta for segment in segments], share)
        if share:
            growths = _growths(shelf, sources, evaluation.keys, share, window_tokens)
            segments = [_first(growth, say) for growth in growths]
    metas = [segment.meta for segment in segments]
    if all(segment.is_last for segment in segments):
        check_there_is_training(metas, sources)
    is_weighted = len(growths) == len(sources)
    named = [
        PreparedSource(
            public_address(source.text),
            source.weight,
            (segments[number].part,) if is_weighted or not number else (),
        )
        for number, source in enumerate(sources)
    ]
    keys, weights = [growth.stream.key for growth in growths], _weights(sources)
    prepared = prepared_from(
        named,
        metas,
        evaluation,
        holdout=share,
        content=[keys, weights, window_tokens, evaluation.digested()],
        unread=unread_in([*sources, *eval_sources]),
    )
    growing = _growing(growths, segments, weights, window_tokens)
    return replace(prepared, growing=growing)


def _growing(
    growths: Sequence[Growth],
    segments: Sequence[TokenSegment],
    weights: Sequence[float],
    window_tokens: int,
) -> Growing:
    """The streams, with their sizes as the first segments let expect them."""
    times = [
        1.0 if segment.is_last else growth.num_bytes / max(1, segment.position)
        for growth, segment in zip(growths, segments, strict=True)
    ]
    tokens = [segment.part.num_train_tokens for segment in segments]
    documents = [segment.part.num_train_documents for segment in segments]
    return Growing(
        cache=None,
        keys=tuple(growth.stream.key for growth in growths),
        weights=tuple(weights),
        window_tokens=window_tokens,
        num_train_tokens=tuple(
            round(number * more) for number, more in zip(tokens, times, strict=True)
        ),
        num_train_documents=tuple(
            round(number * more) for number, more in zip(documents, times, strict=True)
        ),
        is_estimate=not all(segment.is_last for segment in segments),
    )


def go_on(
    shelf: Shelf, sources: Sequence[Source], prepared: Prepared, rows: GrowingRows, num_rows: int
) -> None:
    """Write segments until every row of a run is known, or its stream has ended. Another process
    may write them, too: each stream has one writer at a time.

    Args:
        shelf: where the tokens are kept, and how they are made.
        sources: as they were given to `begin`.
        prepared: what `begin` returned.
        rows: the run's.
        num_rows: how many rows it reads.

    Raises:
        DataError: a source changed, cannot be read or has a bad line.
        OutputError: the disk is full, or failed.
    """
    growing = prepared.growing
    assert growing is not None
    growths = _growths(
        shelf,
        sources,
        [part.key for part in prepared.eval_parts],
        prepared.holdout,
        growing.window_tokens,
    )
    if tuple(growth.stream.key for growth in growths) != growing.keys:
        raise DataError("--data changed after the run was started; start again")
    with ExitStack() as closing:
        for growth in growths:
            closing.enter_context(growth)
        _write_in_turn(growths, growing.weights, rows, num_rows)


def _write_in_turn(
    growths: Sequence[Growth], weights: Sequence[float], rows: GrowingRows, num_rows: int
) -> None:
    """Write the next segment of the stream that is furthest behind, until none needs more."""
    needed = rows.tokens_needed(num_rows)
    unfinished = set(range(len(growths)))
    while unfinished:
        for number in sorted(unfinished, key=lambda i: growths[i].stream.num_tokens / weights[i]):
            growth = growths[number]
            growth.stream.refresh()
            if growth.stream.has_ended or growth.stream.num_tokens >= needed[number]:
                rows.check_not_empty()
                growth.close()
                unfinished.remove(number)
                break
            if growth.write():
                break
        else:
            time.sleep(_POLL)


def _weights(sources: Sequence[Source]) -> list[float]:
    """The weights of the streams."""
    weights = [source.weight for source in sources if source.weight is not None]
    return weights or [1.0]


def _growths(
    shelf: Shelf,
    sources: Sequence[Source],
    eval_keys: Sequence[str],
    share: float,
    window_tokens: int,
) -> list[Growth]:
    """A growth for each stream."""
    split = Split(share, hashes_in(shelf.folder, eval_keys))
    groups = [[path for source in sources for path in source.paths]]
    if sources[0].weight is not None:
        groups = [list(source.paths) for source in sources]
    size = _segment_size(window_tokens)
    growths = [Growth(shelf, files, split, eval_keys, size) for files in groups]
    for growth in growths:
        growth.keys = [each.stream.key for each in growths]
    return growths


def _segment_size(window_tokens: int) -> int:
    """The characters of a segment."""
    return min(_SEGMENT, window_tokens * _CHARACTERS_PER_TOKEN)


def _first(growth: Growth, say: Callable[[str], object]) -> TokenSegment:
    """The first segment of a stream; it is written if it is missing."""
    has_said = False
    with growth:
        growth.repair()
        while True:
            segment = read_segment(growth.folder, segment_key(growth.stream.key, 0))
            if segment is not None:
                return segment
            if not growth.write():
                if not has_said:
                    say(f"waiting for another run to begin with the data ({growth.owner()})")
                has_said = True
                time.sleep(_POLL)


class Growth:
    """The segments of a stream as they are written, under the stream's lock.

    Attributes:
        stream: what there is.
        keys: of all streams of the run.
        folder: `tokens/`.
        num_bytes: of its files.
    """

    def __init__(
        self,
        shelf: Shelf,
        files: Sequence[Path | StoreFile],
        split: Split,
        split_by: Sequence[str],
        size: int,
    ) -> None:
        self._shelf, self._files, self._split, self._size = shelf, files, split, size
        self._stamps = [stamp_of(path)[:2] for path in files]
        self.num_bytes = sum(num_bytes for num_bytes, _ in self._stamps)
        names = [[str(path), *known] for path, known in zip(files, self._stamps, strict=True)]
        key = digest_of(
            [
                FORMAT,
                names,
                *shelf.settings(split),
                shelf.vocab_size,
                split.share,
                list(split_by),
                size,
            ]
        )
        self.folder = shelf.folder
        self.stream = GrowingStream(
            self.folder, PREFIX + key, np.dtype(token_dtype(shelf.vocab_size))
        )
        self.keys = [self.stream.key]
        self._lock: int | None = None
        self._reader: Reader | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Release the lock."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = self._reader = None

    def owner(self) -> str:
        """The process that writes the stream, in words."""
        try:
            return (self.folder / self.stream.key / ".lock").read_text(errors="replace")
        except OSError:
            return "unknown"

    def write(self) -> bool:
        """Write the next segment; False if another process writes the stream.

        Raises:
            DataError: a source changed, cannot be read or has a bad line; the cache is full.
            OutputError: the disk is full, or failed.
        """
        if not self._is_locked():
            return False
        tokeniser = self._shelf.load()
        if self._reader is None:
            self.repair()
            self.stream.refresh()
            if self.stream.has_ended:
                return True
            start = None if self.stream.last is None else self.stream.last.end
            self._reader = self._shelf.reader(self._files, self._split, start)
        key = self._key(self.stream.num_segments)
        reader = self._reader
        with Staging(self.folder / key, overwrite=True, claim=is_of_a_segment) as staging:
            write_part(
                staging.folder,
                reader,
                self._split,
                tokeniser,
                self._shelf.advance,
                size=self._size,
            )
            place = {
                **reader.place._asdict(),
                "position": reader.position,
                "is_last": reader.is_at_end,
            }
            staging.write_text(PLACE, json.dumps(place) + "\n")
            self._check_unchanged(reader.place.file)
            self._shelf.make_room(self.keys)
            staging.publish()
        self.stream.refresh()
        return True

    def _is_locked(self) -> bool:
        """Whether this process holds the stream's lock; it takes it if it is free."""
        if self._lock is not None:
            return True
        folder = self.folder / self.stream.key
        with writing(folder.name):
            folder.mkdir(parents=True, exist_ok=True)
            lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
        if not try_lock(lock, folder, lambda _: None):
            os.close(lock)
            return False
        with writing(".lock"):
            os.ftruncate(lock, 0)
            os.pwrite(lock, this_process().encode(), 0)
        self._lock = lock
        return True

    def repair(self) -> None:
        """Remove the first segment that does not have its size, and those behind it, so that they
        are written again; but not while another process writes the stream.
        """
        numbers = takewhile(lambda i: (self.folder / self._key(i)).exists(), count())
        damaged = next((number for number in numbers if not self._is_whole(number)), None)
        if damaged is None or not self._is_locked():
            return
        while (folder := self.folder / self._key(damaged)).exists():
            shutil.rmtree(folder)
            damaged += 1

    def _key(self, number: int) -> str:
        return segment_key(self.stream.key, number)

    def _is_whole(self, number: int) -> bool:
        segment = read_segment(self.folder, self._key(number))
        return segment is not None and is_whole(self.folder / self._key(number), segment.meta)

    def _check_unchanged(self, file: int) -> None:
        """Check that no file up to this one has changed since the stream got its name.

        Raises:
            DataError: one has.
        """
        changed = [
            path
            for path, known in zip(self._files[: file + 1], self._stamps, strict=False)
            if stamp_of(path)[:2] != known
        ]
        current = self._files[file]
        if isinstance(current, StoreFile):
            current.check_unchanged()
        if changed:
            raise DataError(
                f"{shown_list([path.name for path in changed])} changed while it was read; start "
                "again"
            )


def is_of_a_segment(relative: str) -> bool:
    """Whether a segment's folder has a file of this name."""
    return relative == PLACE or is_of_a_part(relative)
