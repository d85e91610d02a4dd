"""Fetch a model from the Hub into huggingface_hub's cache.

huggingface_hub is imported only when a Hub id is used: it takes longer to import than a reflinked
upscale takes to run. It reads HF_HOME, HF_HUB_CACHE, HF_TOKEN, HF_ENDPOINT and HF_HUB_OFFLINE
itself.
"""

from __future__ import annotations

import sys
import threading
import warnings
from enum import Enum
from pathlib import Path
from typing import Any

from dus_cli import __version__
from dus_cli.common.reference import ModelRef
from dus_cli.common.workers import workers
from dus_cli.errors import CheckpointError, DusError, shown, shown_list
from dus_cli.hub.cache import check_snapshot, not_cached
from dus_cli.hub.errors import LIBRARY, answered, hub_errors, prepare
from dus_cli.hub.remote import HubFile, pause, wait_before
from dus_cli.progress import NoProgress, Progress
from dus_cli.source.base_card import NAME as CARD_NAME
from dus_cli.source.belonging import DECIDING
from dus_cli.source.checkpoint import CONFIG_NAME, read_config
from dus_cli.source.files import OTHER_FORMAT_FOLDERS, WEIGHT_PATTERNS
from dus_cli.source.headers import Header, header_length, parse_header
from dus_cli.source.pickles import parse_pickled
from dus_cli.source.weights import (
    IN_ORDER,
    INDEX_NAME,
    choose_weights,
    is_index,
    is_pickled,
    read_index,
    regular_files,
)

# Most headers fit: one request then gives the length and the JSON (huggingface_hub does the same).
_FIRST_BYTES = 100_000
_HEADERS_AT_ONCE = 8

# Attempts to fetch a snapshot, with waits of up to 1, 2, 4 and 8 seconds in between:
# huggingface_hub itself waits 23 s each time for its lists.
_ATTEMPTS = 5


class Fetch(Enum):
    """Which files of a model are fetched: all; all but weights; or those that a plan needs."""

    weights = "weights"
    files = "files"
    headers = "headers"


def fetch_small_files(
    ref: ModelRef, *, fetch: Fetch = Fetch.files, quiet: bool = False
) -> tuple[Path, str]:
    """Fetch all files but the weights, and the index of the weights.

    The index of pickled weights is fetched only if there are no safetensors. With `Fetch.headers`,
    only config, card, index and the files that decide which others are carried over: a tokenizer
    may have 30 MB.

    The revision is resolved here, once.

    Returns:
        The snapshot's folder, and the commit.

    Raises:
        ModelNotFoundError: the Hub does not provide the model; each reason has its own message.
    """
    silence(quiet=quiet)
    ignored = [
        case for p in WEIGHT_PATTERNS if p != "*.safetensors.index.json" for case in (p, p.upper())
    ]
    ignored += [f"{folder}/*" for folder in OTHER_FORMAT_FOLDERS]
    only = [CONFIG_NAME, CARD_NAME, INDEX_NAME, *DECIDING] if fetch is Fetch.headers else None
    # no bars, even if HF_HUB_DISABLE_PROGRESS_BARS=0
    bar = _silent_bar(NoProgress()) if quiet else None
    folder = _snapshot(ref, ref.revision, only=only, ignored=ignored, bar=bar)
    check_snapshot(ref, folder)
    config, _ = read_config(folder)
    chosen = choose_weights(_names(ref, folder.name, folder), config)
    if chosen is None:
        raise _no_weights(ref, folder.name, folder)
    if is_index(chosen) and not (folder / chosen).exists():
        _snapshot(ref, folder.name, only=[chosen])
    return folder, folder.name


def absent_files(ref: ModelRef, commit: str, folder: Path) -> dict[str, int]:
    """Paths and sizes in bytes of the commit's files that are not in the cache."""
    listed = listed_files(ref, commit) or {}
    return {name: size for name, size in listed.items() if not (folder / name).exists()}


def listed_files(ref: ModelRef, commit: str) -> dict[str, int] | None:
    """Paths and sizes in bytes of a commit's files, by the list in the cache; None without a list.

    huggingface_hub fetches the list whenever it reaches the Hub. If there is none, another program
    filled the cache, and the Hub cannot be reached.
    """
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError

    assert ref.repo_id is not None
    try:
        return {file.path: file.size for file in get_cached_repo_tree(ref.repo_id, revision=commit)}
    except CachedRepoTreeNotFoundError:
        return None


def _names(ref: ModelRef, commit: str, folder: Path) -> set[str]:
    """The files among which the weights are chosen: the commit's; offline, those in the cache."""
    from huggingface_hub import constants

    listed = None if constants.HF_HUB_OFFLINE else listed_files(ref, commit)
    return regular_files(folder) | set(listed or ())


def _snapshot(
    ref: ModelRef,
    revision: str | None,
    *,
    only: list[str] | None = None,
    ignored: list[str] | None = None,
    bar: type[Any] | None = None,
) -> Path:
    """Fetch the matching files into the cache, and return the snapshot's folder. `bar` replaces
    the library's progress bar.

    huggingface_hub does not retry its requests for a commit and for a file; this does.
    """
    from huggingface_hub import errors, snapshot_download

    assert ref.repo_id is not None
    failures = 0
    with hub_errors(ref), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about a disk that may be too small; if it is, that raises
        while True:
            prepare(ref)
            try:
                folder = snapshot_download(
                    ref.repo_id,
                    revision=revision,
                    allow_patterns=only,
                    ignore_patterns=ignored,
                    token=ref.token,
                    library_name=LIBRARY,
                    library_version=__version__,
                    tqdm_class=bar,
                )
                return Path(folder)
            except (errors.HfHubHTTPError, errors.LocalEntryNotFoundError) as error:
                answer = answered(error)
                if answer is None:
                    raise
                failures += 1
                pause(wait_before(answer, failures, _ATTEMPTS))


def _silent_bar(progress: Progress, total: int = 0) -> type[Any]:
    """A tqdm class that draws nothing and reports the bytes written to `progress`.

    It reports at most `total` bytes, because a retry may write some of them again.
    snapshot_download makes three bars: of bytes received, of bytes written, and of files.
    """
    from tqdm import tqdm

    left, lock = total, threading.Lock()

    class SilentBar(tqdm):  # type: ignore[misc]  # tqdm has no types
        def __init__(self, *arguments: Any, **options: Any) -> None:
            self._counts = options.get("unit") == "B" and str(options.get("desc")).startswith(
                "Reconstructing"
            )
            super().__init__(*arguments, **(options | {"disable": True}))

        def update(self, n: float | None = 1) -> bool | None:
            nonlocal left
            if self._counts and n:
                with lock:
                    num_bytes = min(int(n), left)
                    left -= num_bytes
                progress.advance(num_bytes)
            return None

    return SilentBar


def _lacking_bytes(ref: ModelRef, commit: str, folder: Path, names: list[str]) -> int:
    """Bytes of these files that the cache lacks, by the commit's list; 0 without a list."""
    listed = listed_files(ref, commit) or {}
    return sum(listed.get(name, 0) for name in set(names) if not (folder / name).exists())


def fetch_weights(
    ref: ModelRef, folder: Path, commit: str, progress: Progress | None = None
) -> None:
    """Fetch the shards that the index names, or the single file of weights, unless they are cached.

    `progress` receives the bytes, unless it is live: then huggingface_hub draws its own bars.

    No other pickle is fetched, such as training_args.bin or an optimizer's state.

    Raises:
        ModelNotFoundError: the Hub does not provide them.
        CheckpointError: the repo has neither safetensors nor pickled weights.
    """
    # raises if this is not a decoder, before gigabytes are fetched
    config, _ = read_config(folder)
    chosen = choose_weights(_names(ref, commit, folder), config)
    if chosen is None:
        raise _no_weights(ref, commit, folder)
    names = read_index(folder, chosen).shard_names if is_index(chosen) else [chosen]
    _snapshot(ref, commit, only=names, bar=_weights_bar(ref, commit, folder, names, progress))
    if lacking := [name for name in names if not (folder / name).exists()]:
        raise _not_there(ref, commit, folder, lacking, chosen)


def _weights_bar(
    ref: ModelRef, commit: str, folder: Path, names: list[str], progress: Progress | None
) -> type[Any] | None:
    """The bar that reports to `progress`, whose stage it starts if weights must be fetched; None
    if huggingface_hub draws its own.
    """
    if progress is None or progress.is_live:
        return None
    lacking = _lacking_bytes(ref, commit, folder, names)
    if not lacking:
        return _silent_bar(NoProgress())
    progress.start("fetching", lacking)
    return _silent_bar(progress, lacking)


def _not_there(
    ref: ModelRef, commit: str, folder: Path, lacking: list[str], chosen: str
) -> DusError:
    listed = listed_files(ref, commit)
    if listed is not None and (unlisted := [name for name in lacking if name not in listed]):
        return CheckpointError(
            f"{ref} has no {shown_list(unlisted)} on the Hub, which its {chosen} names; report it "
            "to its owner"
        )
    return not_cached(ref, folder, lacking)


def _no_weights(ref: ModelRef, commit: str, folder: Path) -> DusError:
    listed = listed_files(ref, commit)
    expected = None if listed is None else choose_weights(listed, read_config(folder)[0])
    if expected is not None or listed is None:
        return not_cached(ref, folder, [expected or IN_ORDER[0]])
    return CheckpointError(
        f"{ref} has neither {IN_ORDER[0]} nor {IN_ORDER[2]} nor an index of either on the Hub; "
        "dus reads no other "
        "weights; look for a conversion (the repo's refs/pr branches often hold one)"
    )


class RemoteHeaders:
    """The headers of a repo's weights, by range request: usually at most 100 kB per shard.

    The first call fetches the headers of all shards that the index names and `folder` lacks,
    several at a time. For a pickled shard these are the zip's directory and the pickle, about as
    many bytes.
    """

    def __init__(self, ref: ModelRef, commit: str, folder: Path) -> None:
        self.names = _names(ref, commit, folder)
        self._ref, self._commit, self._folder = ref, commit, folder
        self._fetched: dict[str, Header | None] = {}

    def header(self, name: str) -> Header | None:
        if not self._fetched:
            self._fetch_all()
        if (header := self._fetched.get(name)) is None:
            raise _not_there(self._ref, self._commit, self._folder, [name], self._chosen or name)
        return header

    @property
    def _chosen(self) -> str | None:
        return choose_weights(self.names, read_config(self._folder)[0])

    def _fetch_all(self) -> None:
        from huggingface_hub import constants

        chosen = self._chosen
        assert chosen is not None  # `open_checkpoint` has chosen before it reads a header
        names = read_index(self._folder, chosen).shard_names if is_index(chosen) else [chosen]
        absent = [name for name in names if not (self._folder / name).exists()]
        if constants.HF_HUB_OFFLINE:
            raise not_cached(self._ref, self._folder, absent)
        with workers(_HEADERS_AT_ONCE) as (pool, _):
            headers = pool.map(lambda name: _read_remote(self._ref, self._commit, name), absent)
            self._fetched.update(zip(absent, headers, strict=True))


def _read_remote(ref: ModelRef, commit: str, name: str) -> Header | None:
    if is_pickled(name):
        return _read_remote_pickle(ref, commit, name)
    file = HubFile.open(ref, commit, name)
    if file is None:
        return None
    first = file.read(0, min(file.size, _FIRST_BYTES))
    length = header_length(first, file.size, shown(name))
    raw = first[8 : 8 + length]
    if len(raw) < length:
        raw += file.read(len(first), 8 + length)
    return parse_header(raw, file.size, shown(name))


def _read_remote_pickle(ref: ModelRef, commit: str, name: str) -> Header | None:
    from huggingface_hub import HfFileSystem

    with hub_errors(ref):
        prepare(ref)
        hub = HfFileSystem(token=ref.token)
        try:
            file = hub.open(f"{ref.repo_id}@{commit}/{name}", "rb", block_size=_FIRST_BYTES)
        except FileNotFoundError:
            return None
        with file:
            return parse_pickled(file, shown(name), at_hand=False)


def silence(*, quiet: bool) -> None:
    """Silence huggingface_hub's log messages; also its progress bars, if `quiet` or if stderr is
    not a terminal.
    """
    from huggingface_hub.utils import logging as hub_logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if quiet or not sys.stderr.isatty():
        # if the environment asks for bars they stay; huggingface_hub's warning about that is hidden
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            disable_progress_bars()
    hub_logging.set_verbosity_error()  # type: ignore[no-untyped-call]
