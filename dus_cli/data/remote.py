"""Files in other stores, read in parts when they are needed and not kept on the disk.

huggingface_hub's file system lists `hf://` and pins it to a commit; huggingface_hub's session reads
`hf://` and `https://`. fsspec lists and reads every other store (`s3://`, `gs://`). If a connection
breaks, the rest of the part is requested again.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from dus_cli import __version__
from dus_cli.common.libraries import broken_import, require
from dus_cli.common.reports import public_address, shown_address
from dus_cli.errors import DataError, DusError, reason_of, shown, shown_list
from dus_cli.hub.errors import LIBRARY, check_token, limit_requests, tried
from dus_cli.hub.fetching import silence
from dus_cli.hub.remote import ATTEMPTS, is_the_hubs, pause, wait_before

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

# Bytes per request: few at first, then twice as many for each request that goes on from the last.
_FIRST_PART, _LONGEST_PART = 256 << 10, 8 << 20

# Failures in a row after which it is said that a store does not answer.
_SAID_AFTER = 2

# Seconds without a byte after which an object store is not tried again, because its client makes
# several attempts of its own each time.
_PATIENCE = 120.0

# The package that a store needs in addition to fsspec.
_CLIENTS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}

# The fields of an object store's listing that change with an object's content.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "ino")

# Errors that another try would not fix.
_FINAL = (
    FileNotFoundError,
    IsADirectoryError,
    NotADirectoryError,
    PermissionError,
    NotImplementedError,
    ImportError,
    TypeError,
    ValueError,
)

# Words in a file's or folder's name that name its split, as in `datasets`, if the card names none.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_T = TypeVar("_T")
Chunks = Callable[[int, int], Iterator[bytes]]
Say = Callable[[str], object]


class FileStatus(NamedTuple):
    """The fields of os.stat_result that change with a file's content, for a remote file."""

    st_size: int
    st_mtime_ns: int
    st_ino: int


@dataclass(frozen=True)
class StoreFile:
    """A file in another store, usable in the place of a local path.

    Attributes:
        url: the address as shown, without its query.
        size: bytes.
        version: changes with the content; the content's SHA-256 if the store tells it.
        chunks: yields the bytes from a start up to an end; may break off.
        version_now: requests the version again; None if the content cannot change.
        say: called with a line for a person if the store does not answer and is tried again.
    """

    url: str
    size: int
    version: str
    chunks: Chunks = field(compare=False, repr=False)
    version_now: Callable[[], str] | None = field(default=None, compare=False, repr=False)
    say: Say = field(default=lambda _: None, compare=False, repr=False)

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return PurePosixPath(self.url).name

    @property
    def suffix(self) -> str:
        return PurePosixPath(self.url).suffix

    @property
    def digest(self) -> str:
        """Identifies the content in the keys of token files: its SHA-256 if the store knows it, as
        for a local file; else a digest of size and version.
        """
        if re.fullmatch(r"[0-9a-f]{64}", self.version):
            return self.version
        return hashlib.sha256(f"{self.size} {self.version}".encode()).hexdigest()

    def stat(self) -> FileStatus:
        return FileStatus(self.size, int(self.digest[:15], 16), 0)

    def open(self, _mode: str = "rb", buffering: int = io.DEFAULT_BUFFER_SIZE) -> BinaryIO:
        """Open the file for reading and seeking.

        Raises:
            DataError: from reading, if the store fails several times in a row.
        """
        return cast("BinaryIO", io.BufferedReader(_StoreStream(self), buffering))

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`.

        Raises:
            DataError: the store fails several times in a row.
        """
        content, length = bytearray(), end - start
        failures, since = 0, time.monotonic()
        with store_errors(self.url):
            while (at := start + len(content)) < end:
                failure = None
                try:
                    for chunk in self.chunks(at, min(at + length, end)):
                        content += chunk
                    if at == start + len(content):
                        raise OSError(f"none of the bytes {at}-{end - 1} came")
                except (*_FINAL, DusError):
                    raise
                except Exception as error:  # noqa: BLE001  each store's client has errors of its own
                    failure = error
                if start + len(content) > at:
                    failures, since = 0, time.monotonic()
                else:  # a client may give nothing of a part that breaks off: shorter ones now
                    length = min(length, _FIRST_PART)
                if failure is not None:
                    failures += 1
                    _wait(failure, failures, self.url, self.say, since)
        return bytes(content)

    def check_unchanged(self) -> None:
        """Check that the file's version is still the one that was listed.

        Raises:
            DataError: the file changed.
        """
        if self.version_now is None:
            return
        with store_errors(self.url):
            # Of a store that has answered before, any error may be one of the network.
            version = _with_retries(self.version_now, self.url, self.say, (Exception,))
            if version != self.version:
                raise DataError(f"{shown(self.url)} changed while it was read; start again")


class _StoreStream(io.RawIOBase):
    """A StoreFile as a stream that keeps one part in memory."""

    def __init__(self, file: StoreFile) -> None:
        self._file, self._at = file, 0
        self._part, self._start, self._length = b"", 0, _FIRST_PART

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._file.size}[whence]
        self._at = max(0, origin + offset)
        return self._at

    def readinto(self, target: Any) -> int:
        if self._at >= self._file.size:
            return 0
        if not self._start <= self._at < self._start + len(self._part):
            goes_on = self._at == self._start + len(self._part)
            self._length = min(2 * self._length, _LONGEST_PART) if goes_on else _FIRST_PART
            end = min(self._at + max(self._length, len(target)), self._file.size)
            self._start, self._part = self._at, self._file.read(self._at, end)
        offset = self._at - self._start
        piece = self._part[offset : offset + len(target)]
        target[: len(piece)] = piece
        self._at += len(piece)
        return len(piece)


# --- listing --------------------------------------------------------------------------------------


def remote_files(url: str, say: Say = lambda _: None) -> tuple[list[StoreFile], list[str]]:
    """The files at a URL (a file, a folder, a pattern, or a split of a data set), in a fixed
    order; and the names of the data set's files that are not in the split.

    Args:
        url: the address.
        say: called with a line for a person if the store does not answer and is tried again, now or
            when the files are read.

    Raises:
        DataError: there is no file, permission is missing, or the store fails several times.
        MissingExtraError: the package that the store needs is not installed.
    """
    scheme = url.partition("://")[0].lower()
    silence(quiet=True)
    limit_requests()
    with store_errors(url):
        if scheme == "hf":
            check_token(None)
        elif scheme in _CLIENTS:
            require(f"reading {scheme}://", _CLIENTS[scheme])
        find = {"http": _web_files, "https": _web_files, "hf": _hub_files}.get(scheme, _store_files)
        files, others = _with_retries(
            lambda: find(url), public_address(url), say, _network_errors(scheme)
        )
        return [replace(file, say=say) for file in files], others


def _listed(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """The store's information on each file at or below a path, or matched by a pattern, without
    hidden names.
    """
    if any(letter in path for letter in "*?["):
        infos = fs.glob(path, detail=True)
    else:
        info = fs.info(path)
        infos = {info["name"]: info} if info["type"] == "file" else fs.find(path, detail=True)
    root = path.partition("*")[0]
    return {
        name: infos[name]
        for name in sorted(infos)
        if infos[name]["type"] == "file" and "/." not in name.removeprefix(root)
    }


def _store_files(url: str) -> tuple[list[StoreFile], list[str]]:
    import fsspec  # type: ignore[import-untyped]

    logging.getLogger("gcsfs").setLevel(logging.CRITICAL)  # it logs what it also raises
    fs, path = fsspec.core.url_to_fs(url)
    # s3fs: five attempts of its own, each of five of botocore's, take minutes without a word.
    fs.retries = 1

    def version(info: Mapping[str, Any]) -> str:
        return json.dumps({key: str(info[key]) for key in _VERSIONS if key in info})

    def version_now(name: str) -> str:
        fs.invalidate_cache()
        return version(fs.info(name))

    def file(name: str, info: Mapping[str, Any]) -> StoreFile:
        return StoreFile(
            fs.unstrip_protocol(name),
            info["size"],
            version(info),
            lambda start, end: iter([fs.cat_file(name, start=start, end=end)]),
            lambda: version_now(name),
        )

    return [file(name, info) for name, info in _listed(fs, path).items()], []


# --- the web --------------------------------------------------------------------------------------


def _web_files(url: str) -> tuple[list[StoreFile], list[str]]:
    """The file at an address; its size comes with the response to a request for the first byte."""
    if not urlsplit(url).hostname:
        raise DataError("the address names no host; check it")
    size, version = _web_status(url)
    return [
        StoreFile(public_address(url), size, version, _web_chunks(url), lambda: _web_status(url)[1])
    ], []


def _web_status(url: str) -> tuple[int, str]:
    """The size of the file at an address, and what changes with its content."""
    with _part(url, 0, 1) as response:
        response.read()  # or the connection would be closed
    headers = response.headers
    names = ("ETag", "Last-Modified", "Content-Range")
    version = json.dumps({name: headers.get(name) for name in names})
    return int(headers["Content-Range"].rpartition("/")[2]), version


def _web_chunks(url: str) -> Chunks:
    def chunks(start: int, end: int) -> Iterator[bytes]:
        with _part(url, start, end) as response:
            yield from response.iter_raw()

    return chunks


@contextmanager
def _part(url: str, start: int, end: int) -> Iterator[Any]:
    """The response to a range request. The access token is sent to the Hub alone, also if the Hub
    redirects.
    """
    from huggingface_hub import constants, get_session
    from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

    headers = build_hf_headers(
        token=None if is_the_hubs(url) else False,
        library_name=LIBRARY,
        library_version=__version__,
    )
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
    with get_session().stream(
        "GET", url, headers=headers, timeout=timeout, follow_redirects=True
    ) as response:
        hf_raise_for_status(response)
        content_range = response.headers.get("Content-Range", "")
        is_part = re.fullmatch(rf"bytes {start}-\d+/\d+", content_range)
        if response.status_code != 206 or not is_part:
            raise DataError(
                f"the server of {shown_address(url)} does not send parts of a file (no "
                "range requests); download it first (curl -LO URL), or pipe lines of JSON in: "
                "curl -L URL | dus … --data -"
            )
        yield response


# --- the Hub --------------------------------------------------------------------------------------


def _hub_files(url: str) -> tuple[list[StoreFile], list[str]]:
    """The files of a bucket, or of a repo at the commit that its revision names now."""
    from huggingface_hub import HfApi, HfFileSystem

    where, config, split = _parse_split(url)
    fs = HfFileSystem(skip_instance_cache=True)
    place: Any = fs.resolve_path(where)
    root, path = place.root, place.path
    if hasattr(place, "repo_id"):
        info = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision)
        root = f"{root.partition('@')[0]}@{info.sha}"
    is_data_set = getattr(place, "repo_type", None) == "dataset"
    if (config or split) and (path or not is_data_set):
        raise DataError(
            f"{shown(url)}: config and split need the address of a whole data set: "
            "hf://datasets/ORG/NAME?config=…&split=…"
        )
    others: list[str] = []
    if is_data_set and not path:
        infos, others = _split_files(fs, root, config, split)
    else:
        infos = _listed(fs, f"{root}/{path}" if path else root)
    has_commits = hasattr(place, "repo_id")  # a bucket has none: its files may change
    return [
        _hub_file(fs, name, info, is_pinned=has_commits) for name, info in infos.items()
    ], others


def _hub_file(fs: HfFileSystem, name: str, info: dict[str, Any], *, is_pinned: bool) -> StoreFile:
    def version(info: dict[str, Any]) -> str:
        lfs = info.get("lfs")
        return lfs["sha256"] if lfs else info.get("blob_id") or info.get("xet_hash") or ""

    return StoreFile(
        f"hf://{name}",
        info["size"],
        version(info),
        _web_chunks(fs.url(name)),
        None if is_pinned else lambda: version(fs.info(name, refresh=True)),
    )


def _parse_split(url: str) -> tuple[str, str, str]:
    """A Hub URL without `?config=…&split=…`, the config and the split.

    >>> _parse_split("hf://datasets/org/name?split=test&config=en")
    ('hf://datasets/org/name', 'en', 'test')
    >>> _parse_split("hf://datasets/org/name/data/part-?.jsonl")
    ('hf://datasets/org/name/data/part-?.jsonl', '', '')
    """
    match = re.fullmatch(r"(.+?)\?((?:(?:config|split)=[^&=?]+&?)+)", url)
    if match is None:
        return url, "", ""
    query = dict(part.split("=", 1) for part in match[2].rstrip("&").split("&"))
    return match[1], query.get("config", ""), query.get("split", "")


def _split_files(
    fs: HfFileSystem, root: str, config: str, split: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The files of a configuration's split, and the names of the repo's other files.

    The data set's card says which; if it names no configurations, the names of files do. `config`
    "" is the default configuration, `split` "" is `train`.
    """
    every = _listed(fs, root)
    configs = _configs(fs, root) if f"{root}/README.md" in every else []
    if configs:
        patterns = _patterns(_config(configs, config), split)
        chosen = {
            name: info
            for pattern in patterns
            for name, info in _listed(fs, f"{root}/{pattern}").items()
        }
    elif config:
        raise DataError(
            f"its card names no configurations; leave ?config={shown(config)} out of the address"
        )
    else:
        chosen = _by_name(every, root, split)
    others = [name.removeprefix(f"{root}/") for name in every if name not in chosen]
    return {name: chosen[name] for name in sorted(chosen)}, others


def _configs(fs: HfFileSystem, root: str) -> list[dict[str, Any]]:
    from huggingface_hub import DatasetCard

    card = fs.cat_file(f"{root}/README.md").decode(errors="replace")
    data: Any = DatasetCard(card).data
    configs = data.to_dict().get("configs") or []
    return [each for each in configs if isinstance(each, dict) and each.get("data_files")]


def _config(configs: list[dict[str, Any]], name: str) -> dict[str, Any]:
    """The configuration of this name, or the default one."""
    names = [str(each.get("config_name")) for each in configs]
    if name and name not in names:
        raise DataError(f"it has no configuration {shown(name)}; choose one of {shown_list(names)}")
    default = [each for each in configs if each.get("default")]
    if name or "default" in names:
        return configs[names.index(name or "default")]
    if len(default or configs) > 1:
        raise DataError(f"choose a configuration with ?config=NAME: {shown_list(names)}")
    return (default or configs)[0]


def _patterns(config: dict[str, Any], split: str) -> list[str]:
    """The file patterns of a split in a card's configuration, which may list one unnamed split or
    several.
    """
    files = config["data_files"]
    if isinstance(files, dict):
        files = [{"split": name, "path": path} for name, path in files.items()]
    if isinstance(files, str) or not isinstance(files[0], dict):
        files = [{"split": "train", "path": files}]
    by_split = {str(each["split"]): each["path"] for each in files}
    chosen = split or (
        "train" if "train" in by_split or len(by_split) > 1 else next(iter(by_split))
    )
    if chosen not in by_split:
        raise DataError(
            f"it has no split {shown(chosen)}; choose one of {shown_list(list(by_split))}"
        )
    paths = by_split[chosen]
    folder = f"{config['data_dir'].strip('/')}/" if config.get("data_dir") else ""
    return [f"{folder}{path}" for path in ([paths] if isinstance(paths, str) else paths)]


def _by_name(every: dict[str, dict[str, Any]], root: str, split: str) -> dict[str, dict[str, Any]]:
    """The files whose path names the split; all files if none does and no split is given."""
    splits = {name: _split_of(name.removeprefix(root)) for name in every}
    if split and split not in splits.values():
        there = shown_list(sorted({each for each in splits.values() if each})) or "none"
        raise DataError(f"no file's name has the split {shown(split)}; there are {there}")
    chosen = split or ("train" if "train" in splits.values() else None)
    return {name: every[name] for name in every if chosen is None or splits[name] == chosen}


def _split_of(name: str) -> str | None:
    """The split that a file's path names; None if it names none.

    >>> [_split_of(name) for name in ("/data/train-0-of-2.parquet", "/dev/a.jsonl", "/a.json")]
    ['train', 'validation', None]
    """
    words = re.split(r"[-._ /\d]+", name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if {*known} & {*words}), None)


# --- retries and errors ---------------------------------------------------------------------------


def _network_errors(scheme: str) -> tuple[type[Exception], ...]:
    """What the client of a store raises if the network fails."""
    if _CLIENTS.get(scheme) == "s3fs":
        from botocore import exceptions  # type: ignore[import-not-found]

        return (OSError, exceptions.ConnectionError, exceptions.HTTPClientError)
    if _CLIENTS.get(scheme) == "gcsfs":
        from aiohttp import ClientError  # type: ignore[import-not-found]

        return (OSError, ClientError)
    return (OSError,)


def _with_retries(
    call: Callable[[], _T],
    place: str,
    say: Say,
    network_errors: tuple[type[Exception], ...],
) -> _T:
    """The result of a call to a store, which is repeated if the network or a server fails.

    Args:
        call: repeated.
        place: for the line that is said.
        say: called with a line for a person.
        network_errors: what is raised in such a case, besides httpx's errors.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's

    retried: tuple[type[Exception], ...] = (*network_errors, HTTPError)
    failures, since = 0, time.monotonic()
    while True:
        try:
            return call()
        except (*_FINAL, DusError):
            raise
        except retried as error:
            failures += 1
            _wait(error, failures, place, say, since)


def _wait(error: Exception, failures: int, place: str, say: Say, since: float) -> None:
    """Wait before the next try; raise the error if another try would not help. The last byte, or
    the first try, was at the time `since`.
    """
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if not isinstance(error, HTTPError):
        error = OSError(shown(error) or type(error).__name__)
        if time.monotonic() - since > _PATIENCE:
            raise error
    seconds = wait_before(error, failures, ATTEMPTS)
    if failures == _SAID_AFTER:
        say(f"{shown(place)} does not answer ({_why(error)}); trying again …")
    pause(seconds)


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Translate the errors of stores and their clients into a DataError of one line."""
    started, place = time.monotonic(), shown_address(url)
    try:
        yield
    except DataError as error:
        if place in str(error):
            raise
        raise DataError(f"{place}: {error}") from error
    except DusError:
        raise
    except ImportError as error:
        raise broken_import(error) from error
    except Exception as error:  # each store's client has errors of its own
        raise DataError(_in_a_line(place, error, started)) from error


def _in_a_line(place: str, error: Exception, started: float) -> str:
    """Say what is wrong, and what to do."""
    from huggingface_hub import errors

    login = "set HF_TOKEN or run `hf auth login`"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    if isinstance(error, errors.GatedRepoError):
        return f"{place} is gated: ask for access on its page, then {login}"
    if isinstance(cause or error, errors.RevisionNotFoundError):
        return f"{place} has no such revision; see its branches"
    if isinstance(error, PermissionError):
        return f"{place} may not be read; log in to its store, or ask its owner"
    missing = (errors.RepositoryNotFoundError, errors.EntryNotFoundError, FileNotFoundError)
    if isinstance(error, missing) or _status(error) == 404:
        private = f", or is private: {login}" if place.startswith("hf://") else ""
        return f"{place} is not there; check the address{private}"
    again = "start again later; what is tokenised is kept"
    advice = again if tried(started) else "check the address, and the network"
    return f"cannot read {place}: {_why(error)}{tried(started)}; {advice}"


def _status(error: Exception) -> int | None:
    """The HTTP status of the answer that an error is about."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _why(error: Exception) -> str:
    """What failed, without the address: its query may hold a signature."""
    status = _status(error)
    return f"its server answered {status}" if status else shown(reason_of(error)).rstrip(". ")
