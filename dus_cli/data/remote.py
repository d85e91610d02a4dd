"""Files in other stores, read in parts as they are needed: nothing of them is kept on the disk.

`hf://` is listed by huggingface_hub's file system and pinned to a commit; that and `https://` are
read by huggingface_hub's session. Every other store (`s3://`, `gs://`) is one that fsspec knows.
A part that does not come is asked for again, from where the connection broke.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO, NamedTuple, TypeVar, cast
from urllib.parse import urlsplit

from dus_cli import __version__
from dus_cli.common.libraries import broken_import, require
from dus_cli.errors import DataError, DusError, shown, shown_list
from dus_cli.hub.errors import LIBRARY, check_token, limit_requests, tried
from dus_cli.hub.fetching import silence
from dus_cli.hub.remote import ATTEMPTS, is_the_hubs, pause, wait_before

if TYPE_CHECKING:
    from huggingface_hub import HfFileSystem

# Bytes that are asked for at a time: few where reading begins, twice as many each time it goes on.
_FIRST_PART, _LONGEST_PART = 256 << 10, 8 << 20

# The package that knows a store, where fsspec itself does not.
_CLIENTS = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs"}

# What an object store says of an object that changes with its content.
_VERSIONS = ("ETag", "etag", "md5Hash", "generation", "LastModified", "mtime", "ino")

# What passes with no further try.
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

# How a file's or folder's name tells its split, to `datasets` too, where a card tells of none.
_SPLIT_WORDS = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_T = TypeVar("_T")
Chunks = Callable[[int, int], Iterator[bytes]]


class FileStatus(NamedTuple):
    """As of a file on a disk: what changes when its content does."""

    st_size: int
    st_mtime_ns: int
    st_ino: int


@dataclass(frozen=True)
class RemoteFile:
    """A file in another store, which stands where a path of a local one does.

    Attributes:
        url: as it is shown, without a query.
        size: in bytes.
        version: changes with the content; the content's SHA-256 where the store knows it.
        chunks: the bytes from a start up to an end, as they come; may break off.
        version_now: asks the store again; None where the content cannot change.
    """

    url: str
    size: int
    version: str
    chunks: Chunks = field(compare=False, repr=False)
    version_now: Callable[[], str] | None = field(default=None, compare=False, repr=False)

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
        """By which its tokens are known: of a file under LFS the SHA-256 of its content, as of a
        local one.
        """
        if re.fullmatch(r"[0-9a-f]{64}", self.version):
            return self.version
        return hashlib.sha256(f"{self.size} {self.version}".encode()).hexdigest()

    def stat(self) -> FileStatus:
        return FileStatus(self.size, int(self.digest[:15], 16), 0)

    def open(self, _mode: str = "rb", buffering: int = io.DEFAULT_BUFFER_SIZE) -> BinaryIO:
        """Its bytes as a file that can be read and sought.

        Raises:
            DataError: from reading, where the store does not give them after several tries.
        """
        return cast("BinaryIO", io.BufferedReader(_Stream(self), buffering))

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`.

        Raises:
            DataError: the store does not give them, after several tries.
        """
        found, failures = bytearray(), 0
        with store_errors(self.url):
            while len(found) < end - start:
                before = len(found)
                try:
                    for chunk in self.chunks(start + len(found), end):
                        found += chunk
                    if len(found) == before:
                        raise OSError(f"none of the bytes {start}-{end - 1} came")
                except (*_FINAL, DusError):
                    raise
                except Exception as error:  # noqa: BLE001  each store's client has errors of its own
                    failures = 1 if len(found) > before else failures + 1
                    _wait(error, failures)
        return bytes(found)

    def check_unchanged(self) -> None:
        """Check that it is still what it was when it was found.

        Raises:
            DataError: it is not.
        """
        if self.version_now is None:
            return
        with store_errors(self.url):
            if _persisting(self.version_now) != self.version:
                raise DataError(f"{shown(self.url)} changed while it was read; start again")


class _Stream(io.RawIOBase):
    """A remote file as a stream that keeps one part in memory."""

    def __init__(self, file: RemoteFile) -> None:
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
        found = self._part[offset : offset + len(target)]
        target[: len(found)] = found
        self._at += len(found)
        return len(found)


# --- what there is --------------------------------------------------------------------------------


def remote_files(url: str) -> tuple[list[RemoteFile], list[str]]:
    """The files behind a URL (a file, a folder, a pattern, or a split of a data set), in a fixed
    order; and the names of those beside them that another split has.

    Raises:
        DataError: nothing there, no permission, or the store does not answer after several tries.
        MissingExtraError: the package that knows the store is not installed.
    """
    scheme = url.partition("://")[0].lower()
    silence(quiet=True)
    limit_requests()
    with store_errors(url):
        if scheme in {"http", "https"}:
            return [_persisting(lambda: _web_file(url))], []
        if scheme == "hf":
            check_token(None)
            return _persisting(lambda: _hub_files(url))
        if scheme in _CLIENTS:
            require(f"reading {scheme}://", _CLIENTS[scheme])
        return _persisting(lambda: _store_files(url)), []


def _listed(fs: Any, path: str) -> dict[str, dict[str, Any]]:
    """What a store says of each file at a path, below it, or that a pattern fits; hidden names
    left out.
    """
    if any(letter in path for letter in "*?["):
        found = fs.glob(path, detail=True)
    else:
        info = fs.info(path)
        found = {info["name"]: info} if info["type"] == "file" else fs.find(path, detail=True)
    root = path.partition("*")[0]
    return {
        name: found[name]
        for name in sorted(found)
        if found[name]["type"] == "file" and "/." not in name.removeprefix(root)
    }


def _store_files(url: str) -> list[RemoteFile]:
    import fsspec  # type: ignore[import-untyped]

    fs, path = fsspec.core.url_to_fs(url)

    def version(info: Mapping[str, Any]) -> str:
        return json.dumps({key: str(info[key]) for key in _VERSIONS if key in info})

    def version_now(name: str) -> str:
        fs.invalidate_cache()
        return version(fs.info(name))

    def file(name: str, info: Mapping[str, Any]) -> RemoteFile:
        return RemoteFile(
            fs.unstrip_protocol(name),
            info["size"],
            version(info),
            lambda start, end: iter([fs.cat_file(name, start=start, end=end)]),
            lambda: version_now(name),
        )

    return [file(name, info) for name, info in _listed(fs, path).items()]


# --- the web --------------------------------------------------------------------------------------


def _web_file(url: str) -> RemoteFile:
    """A file at an address, which says its size as it sends the first byte."""
    with _part(url, 0, 1) as response:
        version = _web_version(response.headers)
        size = int(response.headers["Content-Range"].rpartition("/")[2])

    def version_now() -> str:
        with _part(url, 0, 1) as response:
            return _web_version(response.headers)

    return RemoteFile(_without_query(url), size, version, _web_chunks(url), version_now)


def _web_version(headers: Mapping[str, str]) -> str:
    said = {name: headers.get(name) for name in ("ETag", "Last-Modified", "Content-Range")}
    return json.dumps(said)


def _web_chunks(url: str) -> Chunks:
    def chunks(start: int, end: int) -> Iterator[bytes]:
        with _part(url, start, end) as response:
            yield from response.iter_raw()

    return chunks


@contextmanager
def _part(url: str, start: int, end: int) -> Iterator[Any]:
    """An answer with a part of a file. The token goes to the Hub alone, also where it redirects."""
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
        said = response.headers.get("Content-Range", "")
        if response.status_code != 206 or not re.fullmatch(rf"bytes {start}-\d+/\d+", said):
            raise DataError(
                f"the server of {shown(_without_query(url))} does not send parts of a file (no "
                "range requests); download it first (curl -LO URL), or pipe lines of JSON in: "
                "curl -L URL | dus … --data -"
            )
        yield response


def _without_query(url: str) -> str:
    """An address as it may be shown: a query may hold a signature, and a host a password."""
    parts = urlsplit(url)
    return parts._replace(query="", fragment="", netloc=parts.netloc.rpartition("@")[2]).geturl()


# --- the Hub --------------------------------------------------------------------------------------


def _hub_files(url: str) -> tuple[list[RemoteFile], list[str]]:
    """Files of a repo at the commit that its revision has now, or of a bucket."""
    from huggingface_hub import HfApi, HfFileSystem

    where, config, split = _of_split(url)
    fs = HfFileSystem(skip_instance_cache=True)
    place: Any = fs.resolve_path(where)
    root, path = place.root, place.path
    if hasattr(place, "repo_id"):
        info = HfApi().repo_info(place.repo_id, repo_type=place.repo_type, revision=place.revision)
        root = f"{root.partition('@')[0]}@{info.sha}"
    is_data_set = getattr(place, "repo_type", None) == "dataset"
    if (config or split) and (path or not is_data_set):
        raise DataError(
            f"{shown(url)}: config and split are of a whole data set: "
            "hf://datasets/ORG/NAME?config=…&split=…"
        )
    beside: list[str] = []
    if is_data_set and not path:
        found, beside = _split_files(fs, root, config, split)
    else:
        found = _listed(fs, f"{root}/{path}" if path else root)
    return [_hub_file(fs, name, info) for name, info in found.items()], beside


def _hub_file(fs: HfFileSystem, name: str, info: dict[str, Any]) -> RemoteFile:
    lfs = info.get("lfs")
    version = lfs["sha256"] if lfs else info.get("blob_id") or info.get("xet_hash") or ""
    return RemoteFile(f"hf://{name}", info["size"], version, _web_chunks(fs.url(name)))


def _of_split(url: str) -> tuple[str, str, str]:
    """A URL of the Hub without `?config=…&split=…`, and these two.

    >>> _of_split("hf://datasets/org/name?split=test&config=en")
    ('hf://datasets/org/name', 'en', 'test')
    >>> _of_split("hf://datasets/org/name/data/part-?.jsonl")
    ('hf://datasets/org/name/data/part-?.jsonl', '', '')
    """
    match = re.fullmatch(r"(.+?)\?((?:(?:config|split)=[^&=?]+&?)+)", url)
    if match is None:
        return url, "", ""
    given = dict(part.split("=", 1) for part in match[2].rstrip("&").split("&"))
    return match[1], given.get("config", ""), given.get("split", "")


def _split_files(
    fs: HfFileSystem, root: str, config: str, split: str
) -> tuple[dict[str, dict[str, Any]], list[str]]:
    """The files of a split of a configuration, and the names of the repo's others.

    What the data set's card says; where it names no configurations, split by the names of files.
    Without a name it is the default configuration's, and `train`.
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
        raise DataError(f"its card names no configurations, and so not {shown(config)}")
    else:
        chosen = _by_name(every, root, split)
    beside = [name.removeprefix(f"{root}/") for name in every if name not in chosen]
    return {name: chosen[name] for name in sorted(chosen)}, beside


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
        raise DataError(f"it has no configuration {shown(name)} but {shown_list(names)}")
    default = [each for each in configs if each.get("default")]
    if name or "default" in names:
        return configs[names.index(name or "default")]
    if len(default or configs) > 1:
        raise DataError(f"choose a configuration with ?config=NAME: {shown_list(names)}")
    return (default or configs)[0]


def _patterns(config: dict[str, Any], split: str) -> list[str]:
    """The files of a split as a card has them: of one split without a name, or of several."""
    files = config["data_files"]
    if isinstance(files, dict):
        files = [{"split": name, "path": path} for name, path in files.items()]
    if isinstance(files, str) or not isinstance(files[0], dict):
        files = [{"split": "train", "path": files}]
    by_split = {str(each["split"]): each["path"] for each in files}
    wanted = split or (
        "train" if "train" in by_split or len(by_split) > 1 else next(iter(by_split))
    )
    if wanted not in by_split:
        raise DataError(f"it has no split {shown(wanted)} but {shown_list(list(by_split))}")
    paths = by_split[wanted]
    folder = f"{config['data_dir'].strip('/')}/" if config.get("data_dir") else ""
    return [f"{folder}{path}" for path in ([paths] if isinstance(paths, str) else paths)]


def _by_name(every: dict[str, dict[str, Any]], root: str, split: str) -> dict[str, dict[str, Any]]:
    """The files whose names, or their folders', tell the split; all where none tells one."""
    splits = {name: _split_of(name.removeprefix(root)) for name in every}
    if split and split not in splits.values():
        there = shown_list(sorted({found for found in splits.values() if found})) or "none"
        raise DataError(f"no file's name tells the split {shown(split)}; there are {there}")
    wanted = split or ("train" if "train" in splits.values() else None)
    return {name: every[name] for name in every if wanted is None or splits[name] == wanted}


def _split_of(name: str) -> str | None:
    """The split that a file's path tells.

    >>> [_split_of(name) for name in ("/data/train-0-of-2.parquet", "/dev/a.jsonl", "/a.json")]
    ['train', 'validation', None]
    """
    words = re.split(r"[-._ /\d]+", name.lower())
    return next((split for split, known in _SPLIT_WORDS.items() if {*known} & {*words}), None)


# --- tries and errors -----------------------------------------------------------------------------


def _persisting(call: Callable[[], _T]) -> _T:
    """What a call gives, tried again where the network or a server failed."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's

    failures = 0
    while True:
        try:
            return call()
        except (*_FINAL, DusError):
            raise
        except (OSError, HTTPError) as error:
            failures += 1
            _wait(error, failures)


def _wait(error: Exception, failures: int) -> None:
    """Wait before the next try; raise the error where none makes sense."""
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]

    if not isinstance(error, HTTPError):
        error = OSError(shown(error) or type(error).__name__)
    pause(wait_before(error, failures, ATTEMPTS))


@contextmanager
def store_errors(url: str) -> Iterator[None]:
    """Turn the errors of stores and their clients into one line each."""
    started, place = time.monotonic(), shown(_without_query(url) if "@" in url else url)
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
    """What is wrong, and what to do."""
    from huggingface_hub import errors

    login = "set HF_TOKEN or run `hf auth login`"
    cause = error.__cause__ if isinstance(error, FileNotFoundError) else None
    status = getattr(getattr(error, "response", None), "status_code", None)
    if isinstance(error, errors.GatedRepoError):
        return f"{place} is gated: ask for access on its page, then {login}"
    if isinstance(cause or error, errors.RevisionNotFoundError):
        return f"{place} has no such revision; see its branches"
    if isinstance(error, PermissionError):
        return f"{place} may not be read; log in to its store, or ask its owner"
    missing = (errors.RepositoryNotFoundError, errors.EntryNotFoundError, FileNotFoundError)
    if isinstance(error, missing) or status == 404:
        private = f", or is private: {login}" if place.startswith("hf://") else ""
        return f"{place} is not there; check the address{private}"
    why = f"its server answered {status}" if status else shown(error).rstrip(". ")
    again = "start again later, which goes on with what is tokenised"
    advice = again if tried(started) else "check the address, and the network"
    return f"cannot read {place}: {why}{tried(started)}; {advice}"
