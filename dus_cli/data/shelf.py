"""Token files kept from run to run: the first run builds them, concurrent runs wait, later runs
find them.

Below `tokens/`:

- `<key>/`: a part, see `token_files`. A large file is one part; small files of a source share one,
  in order. The key is a digest of everything that the tokens depend on: content, tokenizer, field
  and split.
- `sources.jsonl`: the SHA-256 of each file by path, size, time and inode, so that a second run need
  not read the file.
- `.lock`: held while parts are built (flock: the kernel releases it however the process ends).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import json
import os
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from dus_cli.common.files import writing
from dus_cli.common.locks import holder, this_process
from dus_cli.common.reports import public_address
from dus_cli.common.units import counted
from dus_cli.common.workers import PIECE
from dus_cli.data.columns import document_of
from dus_cli.data.documents import Column, Reading
from dus_cli.data.holdout import EVERYTHING, Split
from dus_cli.data.remote import StoreFile
from dus_cli.data.sources import Source, Unread, kind_of
from dus_cli.data.streams import Part, Prepared, PreparedSource
from dus_cli.data.token_files import FORMAT, Reader, TextPlace, is_whole, token_dtype, write_part
from dus_cli.data.tokeniser import UNKNOWN_VOCABULARY, Tokeniser, open_tokeniser, tokenizer_identity
from dus_cli.errors import DataError, shown, shown_list
from dus_cli.writing.replacing import remove_claimed
from dus_cli.writing.staging import MARK, Staging

# Small files share a part up to this many bytes.
_SHARED_PART = 64 << 20
# Seconds between two attempts at the lock.
_POLL = 0.25
# Texts without weights.
_PLAIN = Reading()
_T = TypeVar("_T")
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK, errno.EINVAL)


def prepare(
    shelf: Shelf,
    sources: Sequence[Source],
    eval_sources: Sequence[Source],
    *,
    holdout: float = 0.005,
    wait: bool = True,
    say: Callable[[str], object] = lambda _: None,
) -> Prepared:
    """Tokenise the data that is not tokenised yet.

    If the share `holdout` holds out no document, it is doubled until it does, up to a half. The
    sets are nested: a document that a share holds out is held out by every larger share. With
    `eval_sources` all their documents are held out, and left out of the training data.

    Args:
        shelf: where the tokens are kept, and how they are made.
        sources: training data.
        eval_sources: evaluation data; may be empty.
        holdout: the share of documents held out; ignored with `eval_sources`.
        wait: whether to wait for another run that builds; otherwise that is an error.
        say: called with a line of text for a person, such as what is waited for.

    Raises:
        DataError: there are no documents to train on; a file, the tokenizer or an id is not usable;
            another run is building.
        OutputError: the disk is full, or failed.
    """
    paths = [path for source in (*sources, *eval_sources) for path in source.paths]
    return built(
        shelf, lambda: _assemble(shelf, sources, eval_sources, holdout), paths, wait=wait, say=say
    )


def built(
    shelf: Shelf,
    assemble: Callable[[], _T],
    paths: Sequence[Path | StoreFile],
    *,
    wait: bool,
    say: Callable[[str], object],
) -> _T:
    """What `assemble` makes of a shelf's parts. If parts are missing, it is called again under the
    lock and makes them.

    Args:
        shelf: has the parts.
        assemble: asks the shelf for parts.
        paths: the files that are read for them.
        wait: whether to wait for another run that builds; otherwise that is an error.
        say: called with a line of text for a person.

    Raises:
        DataError, OutputError: as `prepare`.
    """
    try:  # without the lock: after the first run nothing is missing
        return assemble()
    except _MissingError:
        with writing(shelf.folder.name):
            shelf.folder.mkdir(parents=True, exist_ok=True)
        with _locked(shelf.folder, wait=wait, say=say), contextlib.closing(shelf):
            shelf.start_building(paths)
            return assemble()


@dataclass(frozen=True)
class Evaluation:
    """The parts of evaluation data, and the name of each one's held-out set; no names if they are
    one set without a name.
    """

    parts: tuple[tuple[Part, dict[str, Any]], ...]
    names: tuple[str, ...]

    @property
    def keys(self) -> list[str]:
        return [part.key for part, _ in self.parts]

    def digested(self) -> list[Any]:
        """What identifies it."""
        return [self.keys, *([list(self.names)] if self.names else [])]


def evaluation_of(shelf: Shelf, sources: Sequence[Source]) -> Evaluation:
    """The parts of evaluation data.

    Raises:
        DataError: a held-out set has no document.
    """
    if any(source.weight is not None for source in sources):
        raise DataError("evaluation data has no mixture; leave the weights of --eval-data out")
    groups = [shelf.parts([source], Split(EVERYTHING), "") for source in sources]
    if sources:
        _check_there_is_evaluation(sources, groups)
    return Evaluation(
        tuple(chain.from_iterable(groups)),
        tuple(
            source.name
            for source, group in zip(sources, groups, strict=True)
            for _ in group
            if source.name
        ),
    )


def _assemble(
    shelf: Shelf, sources: Sequence[Source], eval_sources: Sequence[Source], holdout: float
) -> Prepared:
    evaluation = evaluation_of(shelf, eval_sources)
    if eval_sources:
        holdout = 0.0
    split_by = evaluation.keys

    def split_at(share: float) -> list[list[tuple[Part, dict[str, Any]]]]:
        split = Split(share, shelf.hashes(split_by))
        return [shelf.parts([source], split, split_by) for source in sources]

    groups = split_at(holdout)
    metas = [meta for group in groups for _, meta in group]
    if holdout and not any(meta["num_documents"]["heldout"] for meta in metas):
        holdout = share_that_holds_some(metas, holdout)
        if holdout:
            groups = split_at(holdout)
            metas = [meta for group in groups for _, meta in group]
    check_there_is_training(metas, sources)
    named = [
        PreparedSource(public_address(source.text), source.weight, tuple(part for part, _ in group))
        for source, group in zip(sources, groups, strict=True)
    ]
    keys = [[part.key for part in source.parts] for source in named]
    return prepared_from(
        named,
        metas,
        evaluation,
        holdout=holdout,
        content=[keys, *evaluation.digested()],
        unread=unread_in([*sources, *eval_sources]),
    )


def prepared_from(
    sources: Sequence[PreparedSource],
    metas: Sequence[dict[str, Any]],
    evaluation: Evaluation,
    *,
    holdout: float,
    content: object,
    unread: dict[str, Any],
) -> Prepared:
    """All of a run's data.

    Args:
        sources: the training data.
        metas: the meta.json of each of their parts.
        evaluation: the evaluation data.
        holdout: the share that was held out.
        content: what identifies all tokens and the split, as JSON.
        unread: the files that are not read.
    """
    return Prepared(
        sources=tuple(sources),
        eval_parts=tuple(part for part, _ in evaluation.parts),
        eval_names=evaluation.names,
        holdout=holdout,
        dtype=metas[0]["dtype"],
        eos=metas[0]["eos"],
        before=tuple(metas[0]["before"]),
        skipped=skipped_in([*metas, *(meta for _, meta in evaluation.parts)]),
        content_key=digest_of(content),
        unread=unread,
    )


def skipped_in(metas: Sequence[dict[str, Any]]) -> dict[str, int]:
    """How many lines and documents of some parts were left out, by reason."""
    skipped: Counter[str] = Counter()
    for meta in metas:
        skipped.update(meta["skipped"])
    return dict(sorted(skipped.items()))


def unread_in(sources: Sequence[Source]) -> dict[str, Any]:
    """The files of some sources that are not read, as JSON."""
    return sum((source.unread for source in sources), Unread()).to_json()


def share_that_holds_some(metas: Sequence[dict[str, Any]], share: float) -> float:
    """The share, doubled until it holds out some documents but not all; 0 if no share up to a half
    does.
    """
    lowest = min((meta["lowest_hash"] for meta in metas), default=0)
    highest = max((meta["highest_hash"] for meta in metas), default=0)
    while share < 0.5:
        share = min(2 * share, 0.5)
        if Split(share).holds_out(lowest):
            return 0.0 if Split(share).holds_out(highest) else share
    return 0.0


def _check_there_is_evaluation(
    sources: Sequence[Source], groups: Sequence[list[tuple[Part, dict[str, Any]]]]
) -> None:
    """Check that each held-out set has a document."""
    for name in dict.fromkeys(source.name for source in sources):
        of_set = [
            (source, group)
            for source, group in zip(sources, groups, strict=True)
            if source.name == name
        ]
        metas = [meta for _, group in of_set for _, meta in group]
        if not any(meta["num_documents"]["heldout"] for meta in metas):
            raise DataError(
                f"{_names([source for source, _ in of_set])} has no documents to evaluate on; "
                "choose other data"
            )


def check_there_is_training(metas: Sequence[dict[str, Any]], sources: Sequence[Source]) -> None:
    if any(meta["num_documents"]["train"] for meta in metas):
        return
    num_held_out = sum(meta["num_documents"]["heldout"] for meta in metas)
    left_out = [f"{count} {reason}" for reason, count in skipped_in(metas).items()]
    if left_out:
        left_out += [f"{num_held_out} held out"] if num_held_out else []
        why = f"left out: {shown_list(left_out)}; check the data"
    elif num_held_out:
        why = (
            f"the held-out set has all of them ({counted(num_held_out, 'document')}); lower "
            "--holdout, or give --eval-data"
        )
    else:
        why = "the files are empty; choose others"
    raise DataError(f"{_names(sources)} has no documents to train on: {why}")


def _names(sources: Sequence[Source]) -> str:
    return shown_list([public_address(source.text) for source in sources])


def digest_of(content: object) -> str:
    """A digest of JSON, for names of folders."""
    return hashlib.sha256(json.dumps(content).encode()).hexdigest()[:32]


class _MissingError(Exception):
    """A part or digest is missing, and `start_building` was not called."""


class Shelf:
    """The parts below a folder. Missing parts are built after `start_building` was called.

    Args:
        folder: `tokens/`; created if missing.
        tokenizer_folder: the model's.
        vocab_size: the model's; every id must be below it. None if its config gives none.
        reading: the text field, the field of weights, and what to do with bad lines.
        on_progress: called with bytes done and bytes in all. A file with an unknown digest counts
            twice: it is read for the digest, then for its text.
        special_tokens: whether documents get the tokenizer's special tokens.
        column: what the field holds.
        make_room: called with the names of a run's streams while a segment of one has been written
            and does not have its name yet; raises DataError if the folder has no room for it.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer_folder: Path,
        vocab_size: int | None,
        *,
        reading: Reading = _PLAIN,
        on_progress: Callable[[int, int], object] = lambda _done, _total: None,
        special_tokens: bool = True,
        column: Column = Column.text,
        make_room: Callable[[Sequence[str]], object] = lambda _: None,
    ) -> None:
        self.make_room = make_room
        self.special_tokens, self.column = special_tokens, column
        self.folder, self.tokenizer_folder = folder, tokenizer_folder
        self.vocab_size, self.reading = vocab_size or UNKNOWN_VOCABULARY, reading
        self.identity = tokenizer_identity(tokenizer_folder)
        self.digests = _Digests(folder / "sources.jsonl", self.advance)
        self.tokeniser: Tokeniser | None = None
        self.may_build = False
        self._on_progress, self._done, self._total = on_progress, 0, 0

    def start_building(self, paths: Sequence[Path | StoreFile]) -> None:
        """Allow building, and remove what killed runs left. The caller must hold the lock."""
        self.may_build = True
        for left in self.folder.glob(".*.partial"):
            remove_claimed(left, lambda name: name == MARK or is_of_a_part(name))
        self.digests.start_recording()
        self._total = sum(stamp_of(path)[0] for path in paths if not self.digests.knows(path))

    def close(self) -> None:
        self.digests.close()

    def expect(self, num_bytes: int) -> None:
        """Report that so many bytes more will be read."""
        self._total += num_bytes

    def advance(self, num_bytes: int) -> None:
        """Report that so many bytes more are done."""
        self._done += num_bytes
        self._on_progress(self._done, self._total)

    def parts(
        self, sources: Sequence[Source], split: Split, split_by: object
    ) -> list[tuple[Part, dict[str, Any]]]:
        """The parts of these sources, and their meta.json. `split_by` stands for `split.left_out`
        in the key.
        """
        if self.may_build:
            self._total += sum(stamp_of(path)[0] for source in sources for path in source.paths)
        return [
            self._part(files, split, split_by)
            for source in sources
            for files in _groups(source.paths)
        ]

    def settings(self, split: Split) -> list[Any]:
        """What the tokens of a text depend on besides the text and the split."""
        dtype = np.dtype(token_dtype(self.vocab_size)).name
        reading = self.reading
        settings = [self.identity, self.special_tokens, dtype]
        settings += [reading.text_field, reading.on_bad_line]
        if self.column is not Column.text:  # keys of texts must stay those of earlier versions
            settings += [self.column.value, _template_digest(self.tokenizer_folder)]
        if reading.weight_field is not None and split.share != EVERYTHING:
            settings += ["weight", reading.weight_field]
        return settings

    def reader(
        self, files: Sequence[Path | StoreFile], split: Split, start: TextPlace | None = None
    ) -> Reader:
        """A reader of the documents in these files, from `start` on.

        Raises:
            DataError: the tokenizer cannot be loaded.
        """
        reading = self.reading
        if split.share == EVERYTHING:  # evaluation data have no weights
            reading = replace(reading, weight_field=None)
        return Reader(files, reading, document_of(self.column, self.load()), start)

    def _part(
        self, files: Sequence[Path | StoreFile], split: Split, split_by: object
    ) -> tuple[Part, dict[str, Any]]:
        stamps = [stamp_of(path) for path in files]
        digests = [self.digests.get(path) for path in files]
        # Of a file's name only the kind matters: the same bytes may be .txt here and .jsonl there.
        kinds = [kind_of(path.name) for path in files]
        key = digest_of([FORMAT, digests, kinds, *self.settings(split), split.share, split_by])
        meta = self._stored(key)
        if meta is None:
            meta = self._build(key, files, split)
            if stamps != [stamp_of(path) for path in files]:
                shutil.rmtree(self.folder / key)
                raise DataError(
                    f"{shown_list([p.name for p in files])} changed while it was read; start again"
                )
        elif self.may_build:
            self.advance(sum(stamp_of(path)[0] for path in files))
        if max(meta["highest_id"], meta["eos"]) >= self.vocab_size:
            self.load().check_ids(max(meta["highest_id"], meta["eos"]))
        return Part.of(key, meta), meta

    def _stored(self, key: str) -> dict[str, Any] | None:
        """The meta.json of a part; None if the part is missing or damaged."""
        try:
            meta: dict[str, Any] = json.loads((self.folder / key / "meta.json").read_bytes())
            return meta if is_whole(self.folder / key, meta) else None
        except (OSError, ValueError):
            return None

    def _build(self, key: str, files: Sequence[Path | StoreFile], split: Split) -> dict[str, Any]:
        if not self.may_build:
            raise _MissingError
        tokeniser = self.load()
        # overwrite: a damaged part is replaced
        with Staging(self.folder / key, overwrite=True, claim=is_of_a_part) as staging:
            reader = self.reader(files, split)
            meta = write_part(staging.folder, reader, split, tokeniser, self.advance)
            staging.publish()
        return meta

    def load(self) -> Tokeniser:
        """The model's tokenizer, loaded once."""
        if self.tokeniser is None:
            self.tokeniser = open_tokeniser(
                self.tokenizer_folder, self.vocab_size, special_tokens=self.special_tokens
            )
        return self.tokeniser

    def hashes(self, keys: Sequence[str]) -> frozenset[int]:
        """The hashes of all documents in parts of evaluation data; only read to build parts."""
        return hashes_in(self.folder, keys) if self.may_build else frozenset()


def hashes_in(folder: Path, keys: Sequence[str]) -> frozenset[int]:
    """The hashes of all documents in parts of evaluation data."""
    return frozenset(
        number
        for key in keys
        for number in np.fromfile(folder / key / "hashes.bin", np.uint64).tolist()
    )


def _template_digest(folder: Path) -> str:
    """Digest of chat_template.jinja. A template in tokenizer_config.json is part of the tokenizer's
    identity.
    """
    path = folder / "chat_template.jinja"
    return hashlib.sha256(path.read_bytes() if path.is_file() else b"").hexdigest()


def is_of_a_part(relative: str) -> bool:
    return relative == "meta.json" or relative.partition(".")[0] in ("train", "heldout", "hashes")


def _groups(paths: Sequence[Path | StoreFile]) -> Iterator[list[Path | StoreFile]]:
    """Consecutive files grouped up to the size of a shared part; a larger file is a group alone."""
    group: list[Path | StoreFile] = []
    size = 0
    for path in paths:
        more = stamp_of(path)[0]
        if group and size + more > _SHARED_PART:
            yield group
            group, size = [], 0
        group.append(path)
        size += more
    if group:
        yield group


def stamp_of(path: Path | StoreFile) -> tuple[int, int, int]:
    """Size, time and inode, which change if a file is written to or replaced."""
    try:
        status = path.stat()
    except OSError as error:
        raise DataError(
            f"cannot read {shown(path)}: {error.strerror}; check the disk or the network"
        ) from error
    return status.st_size, status.st_mtime_ns, status.st_ino


class _Digests:
    """SHA-256 by path, size, time and inode, in a file that is only appended to; a torn line is
    ignored.
    """

    def __init__(self, path: Path, on_bytes: Callable[[int], object]) -> None:
        self._path, self._on_bytes = path, on_bytes
        self._file: int | None = None
        self._load()

    def _load(self) -> None:
        self._known: dict[str, tuple[tuple[int, ...], str]] = {}
        with contextlib.suppress(OSError):
            for line in self._path.read_bytes().splitlines():
                with contextlib.suppress(ValueError, KeyError, TypeError):
                    record = json.loads(line)
                    self._known[record["path"]] = (tuple(record["stamp"]), record["sha256"])

    def start_recording(self) -> None:
        self._load()  # the run that held the lock before may have added some
        with writing(self._path.name):
            self._file = os.open(self._path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def close(self) -> None:
        if self._file is not None:
            os.close(self._file)

    def knows(self, path: Path | StoreFile) -> bool:
        if isinstance(path, StoreFile):
            return True  # its store gives the digest
        return self._known.get(str(path), (None,))[0] == stamp_of(path)

    def get(self, path: Path | StoreFile) -> str:
        if isinstance(path, StoreFile):
            return path.digest
        stamp = stamp_of(path)
        known, digest = self._known.get(str(path), (None, ""))
        if known == stamp:
            return digest
        if self._file is None:
            raise _MissingError
        digest = self._read(path)
        self._known[str(path)] = stamp, digest
        record = json.dumps({"path": str(path), "stamp": stamp, "sha256": digest})
        with writing(self._path.name):
            os.write(self._file, f"\n{record}\n".encode())
        return digest

    def _read(self, path: Path) -> str:
        digest, piece = hashlib.sha256(), memoryview(bytearray(PIECE))
        try:
            with open(path, "rb", buffering=0) as file:
                while count := file.readinto(piece):
                    digest.update(piece[:count])
                    self._on_bytes(count)
        except OSError as error:
            raise DataError(
                f"cannot read {shown(path)}: {error.strerror}; check the disk or the network"
            ) from error
        return digest.hexdigest()


@contextlib.contextmanager
def _locked(folder: Path, *, wait: bool, say: Callable[[str], object]) -> Iterator[None]:
    """Hold the lock of the folder. The lock is polled, because a blocking flock on a network file
    system may not notice that its owner died.
    """
    with writing(".lock"):
        lock = os.open(folder / ".lock", os.O_RDWR | os.O_CREAT, 0o666)
    try:
        has_said = False
        while not try_lock(lock, folder, say):
            owner = os.pread(lock, 300, 0).decode(errors="replace") or holder(lock)
            if not wait:
                raise DataError(
                    f"another run is preparing the data in {shown(folder)} ({shown(owner)}); wait "
                    "for it"
                )
            if not has_said:
                say(
                    f"waiting for another run to prepare the data in {shown(folder)} "
                    f"({shown(owner)})"
                )
                has_said = True
            time.sleep(_POLL)
        with writing(".lock"):
            os.ftruncate(lock, 0)
            os.pwrite(lock, this_process().encode(), 0)
        yield
    finally:
        os.close(lock)


def try_lock(lock: int, folder: Path, say: Callable[[str], object]) -> bool:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise DataError(
                f"cannot lock {shown(folder / '.lock')}: {error.strerror}; choose another folder"
            ) from error
        say(
            f"{shown(folder)} is on a file system without locks; start no second run until this "
            "one has its data"
        )
    return True
