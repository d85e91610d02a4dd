"""A stand-in for the Hub on the loopback interface, with a log of requests and of the bytes sent.

It answers huggingface_hub's requests for a model (commit, list of files, files), for a data set,
whose repo is named "datasets/org/name" here, and for a bucket, "buckets/org/name", whose files are
those of the repo's `main`. As on the real Hub, a file under LFS redirects to a
signed address on another origin, where the token must not be sent; a gated repo shows its list of
files to everyone; a private repo does not exist for strangers.

Files are read and sent in pieces. The sha256 of a file that is a hole, as
`write_checkpoint(fill=None)` writes it, is made up, so that the shape of a 7B model costs nothing.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from fnmatch import fnmatch
from functools import cache
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

import pytest

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth", ".onnx", ".parquet", ".gz")
READER, STRANGER = "hf_reader", "hf_stranger"  # the tokens that the Hub knows
_REPO = r"((?:datasets/|buckets/)?[^/]+/[^/]+)"
_BUCKET = r"(buckets/[^/]+/[^/]+)"
_CREATED = "2026-02-06T17:37:57.000Z"  # every bucket and its files
_PIECE = 64 << 10
_BURST, _SILENCE = 0.1, 3.0  # seconds
HANG_UP = 0  # in the place of an HTTP status: the connection is closed without an answer


def commit_of(text: str) -> str:
    """A commit hash, the same for the same text."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class StandInRepo:
    """A model repo: a folder of files for each commit, and the branches and tags of commits.

    READER may read a private repo, and the files of a gated one. With `xet` the weights are
    announced on another service, which does not exist. Without `lfs` the Hub itself serves every
    file.
    """

    commits: Mapping[str, Path]
    revisions: Mapping[str, str]
    private: bool = False
    gated: bool = False
    xet: bool = False
    lfs: bool = True


@contextmanager
def only_hub(
    repos: Mapping[str, StandInRepo], home: Path, monkeypatch: pytest.MonkeyPatch
) -> Iterator[StandInHub]:
    """Run a stand-in as the only Hub that dus can reach, with an empty cache in `home` and no
    token.
    """
    for name in list(os.environ):
        if name.startswith(("HF_", "HUGGING", "TRANSFORMERS_")) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    monkeypatch.setenv("HF_HOME", str(home))
    monkeypatch.setenv("HF_HUB_DISABLE_TELEMETRY", "1")
    with StandInHub(repos) as running:
        monkeypatch.setenv("HF_ENDPOINT", running.endpoint)
        yield running


class Request(NamedTuple):
    """An answered request. `num_sent` is the size of the answer's body, `client` the client's
    port.
    """

    method: str
    path: str
    byte_range: str | None
    num_sent: int
    client: int


@dataclass
class Faults:
    """The speed and the faults of files served from signed addresses.

    Attributes:
        bytes_per_second: of all connections together.
        broken_after: an answer breaks off after this many bytes.
        signed_for: an address is valid for this many answers, then gives 403.
        busy: the status (429 or 503) of the next answers, sent with `retry_after`.
        stalls: this many of the next answers stall after their first piece.
        flipped: the byte of a file, by the file's name, in which a bit is flipped.
        ranges: whether Range headers are supported.
    """

    bytes_per_second: float | None = None
    broken_after: int | None = None
    signed_for: int | None = None
    busy: list[int] = field(default_factory=list)
    retry_after: str | None = None
    stalls: int = 0
    flipped: dict[str, int] = field(default_factory=dict)
    ranges: bool = True
    sent: int = 0
    started: float = 0.0
    signatures: list[int] = field(default_factory=list)
    lock: Any = field(default_factory=threading.Lock)

    def wait(self, num_bytes: int) -> None:
        """Wait as long as it takes to send this many more bytes."""
        if self.bytes_per_second is None:
            return
        with self.lock:
            late = time.monotonic() - self.started - self.sent / self.bytes_per_second
            # unused time is lost, as on a real line, except for a burst from its buffers
            if late > _BURST:
                self.started += late - _BURST
            self.sent += num_bytes
            due = self.started + self.sent / self.bytes_per_second
        time.sleep(max(0.0, due - time.monotonic()))

    def sign(self) -> int:
        with self.lock:
            self.signatures.append(0)
            return len(self.signatures) - 1

    def is_signed(self, signature: str) -> bool:
        """Count a use of a signature; return whether it is still valid."""
        with self.lock:
            self.signatures[int(signature)] += 1
            return self.signed_for is None or self.signatures[int(signature)] <= self.signed_for


@dataclass
class StandInHub:
    """The server, running while its context is open.

    Attributes:
        failures: the HTTP status, or HANG_UP, for requests that match a pattern. A request is
            matched as "GET /org/name/resolve/main/config.json whole", with its Range header, if it
            has one, instead of "whole".
        faults: of files served from signed addresses.
        num_served: bytes of weights sent, also in answers that broke off.
        busy: the status of the next answers to requests for a commit.
        cdn: the origin of another server that serves /cdn/REPO/COMMIT/FILE.
    """

    repos: Mapping[str, StandInRepo]
    failures: dict[str, int] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)
    num_served: int = 0
    busy: list[int] = field(default_factory=list)
    faults: Faults = field(default_factory=Faults)
    cdn: str | None = None

    def __enter__(self) -> StandInHub:  # noqa: PYI034  (Self is not in Python 3.10)
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Stop answering and close the port."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    @property
    def port(self) -> int:
        return self._server.server_port

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def files_asked_for(self) -> set[str]:
        """The files of all repos that were requested, also by HEAD."""
        matches = (
            re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", request.path) for request in self.log
        )
        return {match[1] for match in matches if match}

    def num_sent(self, pattern: str) -> int:
        """The bytes sent for all paths that match."""
        return sum(request.num_sent for request in self.log if fnmatch(request.path, pattern))


@dataclass
class _Answer:
    """`body`, or the bytes of `file` from `start` on, `length` of them."""

    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    file: Path | None = None
    start: int = 0
    length: int = 0


class _RefusedError(Exception):
    """An error answer with X-Error-Code, which huggingface_hub reads."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        body = json.dumps({"error": message}).encode()
        self.answer = _Answer(status, {"X-Error-Code": code, "X-Error-Message": message}, body)


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"
    # headers and body are two packets, and the second must not wait for the first one's ACK
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        request = f"{self.command} {path} {self.headers.get('Range', 'whole')}"
        for pattern, status in self.hub.failures.items():
            if fnmatch(request, pattern):
                self._send(path, _Answer(status))
                return
        try:
            path = path.replace("/api/datasets/", "/api/models/datasets/")
            if match := re.fullmatch(rf"/api/models/{_REPO}(?:/revision/(.+))?", path):
                answer = self._model(match[1], match[2] or "main")
            elif match := re.fullmatch(rf"/api/models/{_REPO}/tree/([^/]+)/?(.*)", path):
                recursive = "recursive=true" in url.query.lower()
                answer = self._tree(match[1], match[2], match[3], recursive=recursive)
            elif match := re.fullmatch(rf"/api/{_BUCKET}", path):
                answer = self._bucket(match[1])
            elif match := re.fullmatch(rf"/api/{_BUCKET}/tree/?(.*)", path):
                recursive = "recursive=true" in url.query.lower()
                answer = self._bucket_tree(match[1], match[2], recursive=recursive)
            elif match := re.fullmatch(rf"/{_BUCKET}/resolve/(.+)", path):
                answer = self._resolve(match[1], "main", match[2])
            elif re.fullmatch(rf"/api/models/{_REPO}/xet-read-token/([^/]+)", path):
                service = {
                    "X-Xet-Cas-Url": f"{self.hub.endpoint}/cas",
                    "X-Xet-Access-Token": "of the service",
                }
                answer = _Answer(HTTPStatus.OK, service | {"X-Xet-Token-Expiration": "4000000000"})
            elif match := re.fullmatch(rf"/{_REPO}/resolve/([^/]+)/(.+)", path):
                answer = self._resolve(match[1], match[2], match[3])
            elif match := re.fullmatch(rf"/cdn/{_REPO}/([^/]+)/(.+)", path):
                answer = self._cdn(
                    match[1], match[2], match[3], url.query.removeprefix("signature=")
                )
            else:
                answer = _Answer(HTTPStatus.NOT_FOUND)
        except _RefusedError as refused:
            answer = refused.answer
        self._send(path, answer)

    do_HEAD = do_GET  # noqa: N815  (http.server calls it by this name)

    def _model(self, repo_id: str, revision: str) -> _Answer:
        if self.hub.busy:
            return _Answer(self.hub.busy.pop(0))
        commit, folder = self._commit(repo_id, revision)
        files = [{"rfilename": path} for path in _files(folder)]
        answer = _json({"id": repo_id, "sha": commit, "tags": [], "siblings": files})
        answer.headers["X-HF-Warning"] = "unauthenticated; Set a HF_TOKEN for higher rate limits."
        return answer

    def _tree(self, repo_id: str, revision: str, below: str, *, recursive: bool) -> _Answer:
        _, folder = self._commit(repo_id, revision)
        if not (folder / below).is_dir():
            raise _RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound", f"{below} does not exist")
        found = (folder / below).rglob("*") if recursive else (folder / below).iterdir()
        paths = sorted(path.relative_to(folder).as_posix() for path in found)
        return _json([_entry(folder, path) for path in paths])

    def _bucket(self, bucket: str) -> _Answer:
        _, folder = self._commit(bucket, "main")
        sizes = [(folder / path).stat().st_size for path in _files(folder)]
        info = {"id": bucket.removeprefix("buckets/"), "private": False, "createdAt": _CREATED}
        return _json(info | {"size": sum(sizes), "totalFiles": len(sizes)})

    def _bucket_tree(self, bucket: str, prefix: str, *, recursive: bool) -> _Answer:
        """The files whose path begins with a prefix, whatever follows it; without `recursive`, the
        files and folders in that folder.
        """
        _, folder = self._commit(bucket, "main")
        begins = "" if not prefix or (folder / prefix).is_file() or recursive else "/"
        entries: dict[str, dict[str, Any]] = {}
        for path in _files(folder):
            if not path.startswith(prefix + begins):
                continue
            below = path.removeprefix(prefix + begins).partition("/")
            if below[1] and not recursive:
                name = path.removesuffix("".join(below[1:]))
                entries[name] = {"type": "directory", "path": name, "uploadedAt": _CREATED}
            else:
                entry = _entry(folder, path)
                hashed = {"xetHash": hashlib.sha256(entry["oid"].encode()).hexdigest()}
                fields = {name: entry[name] for name in ("type", "path", "size")}
                entries[path] = fields | hashed | {"uploadedAt": _CREATED}
        return _json(list(entries.values()))

    def _resolve(self, repo_id: str, revision: str, path: str) -> _Answer:
        commit, folder = self._commit(repo_id, revision)
        repo = self.hub.repos[repo_id]
        if repo.gated and self._token != READER:
            status = HTTPStatus.FORBIDDEN if self._token else HTTPStatus.UNAUTHORIZED
            raise _RefusedError(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if not (folder / path).is_file():
            raise _RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        entry, headers = _entry(folder, path), {"X-Repo-Commit": commit}
        if not (path.endswith(LFS_SUFFIXES) and repo.lfs):
            return self._file(folder / path, headers | {"ETag": f'"{entry["oid"]}"'})
        headers |= {
            "X-Linked-Etag": f'"{entry["lfs"]["oid"]}"',
            "X-Linked-Size": str(entry["size"]),
        }
        if repo.xet:
            route = f"{self.hub.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": entry["lfs"]["oid"], "X-Xet-Refresh-Route": route}
        origin = self.hub.cdn or f"http://localhost:{self.hub.port}"
        headers["Location"] = (
            f"{origin}/cdn/{repo_id}/{commit}/{quote(path)}?signature={self.hub.faults.sign()}"
        )
        return _Answer(HTTPStatus.FOUND, headers)

    def _cdn(self, repo_id: str, commit: str, path: str, signature: str) -> _Answer:
        faults = self.hub.faults
        if self._token:  # S3 refuses a request with a signed address and a token
            return _Answer(HTTPStatus.BAD_REQUEST)
        if not faults.is_signed(signature):
            return _Answer(HTTPStatus.FORBIDDEN)
        if faults.busy:
            return _Answer(
                faults.busy.pop(0),
                {} if faults.retry_after is None else {"Retry-After": faults.retry_after},
            )
        return self._file(self.hub.repos[repo_id].commits[commit] / path, {})

    def _file(self, file: Path, headers: dict[str, str]) -> _Answer:
        """A file, or the requested part of it."""
        size = file.stat().st_size
        match = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if match is None or not self.hub.faults.ranges:
            return _Answer(HTTPStatus.OK, headers, file=file, length=size)
        start, end = int(match[1]), min(int(match[2] or size), size - 1)
        headers = headers | {"Content-Range": f"bytes {start}-{end}/{size}"}
        return _Answer(
            HTTPStatus.PARTIAL_CONTENT, headers, file=file, start=start, length=end + 1 - start
        )

    def _commit(self, repo_id: str, revision: str) -> tuple[str, Path]:
        token, repo = self._token, self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token != READER):
            if not token:  # without a token the Hub does not reveal whether a repo exists
                raise _RefusedError(
                    HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password."
                )
            raise _RefusedError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            raise _RefusedError(
                HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}"
            )
        return commit, repo.commits[commit]

    @property
    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", READER, STRANGER):
            raise _RefusedError(
                HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header"
            )
        return token

    def _send(self, path: str, answer: _Answer) -> None:
        if answer.status == HANG_UP:
            self.close_connection = True
            return
        length = answer.length if answer.file is not None else len(answer.body)
        # Logged before it is sent, so that a client that has the answer finds it in the log.
        sent = 0 if self.command == "HEAD" else length
        byte_range, client = self.headers.get("Range"), self.client_address[1]
        self.hub.log.append(Request(self.command, path, byte_range, sent, client))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        try:
            for piece in self._pieces(answer):
                self.wfile.write(piece)
                if path.endswith(LFS_SUFFIXES):
                    with self.hub.faults.lock:
                        self.hub.num_served += len(piece)
        except OSError:  # the client is gone
            self.close_connection = True

    def _pieces(self, answer: _Answer) -> Iterator[bytes]:
        if answer.file is None:
            yield answer.body
            return
        faults, position = self.hub.faults, 0
        with answer.file.open("rb") as file:
            file.seek(answer.start)
            while position < answer.length:
                piece = file.read(min(_PIECE, answer.length - position))
                at = faults.flipped.get(answer.file.name, -1) - answer.start - position
                if 0 <= at < len(piece):
                    piece = piece[:at] + bytes([piece[at] ^ 1]) + piece[at + 1 :]
                if faults.broken_after is not None and position + len(piece) > faults.broken_after:
                    self.close_connection = True
                    yield piece[: faults.broken_after - position]
                    return
                faults.wait(len(piece))
                yield piece
                position += len(piece)
                if faults.stalls > 0 and position < answer.length:
                    faults.stalls -= 1
                    time.sleep(_SILENCE)
                    self.close_connection = True
                    return

    def log_message(self, *_: object) -> None:
        """Write nothing to stderr: tests read `StandInHub.log`."""


def _files(folder: Path) -> list[str]:
    return sorted(
        path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()
    )


def _entry(folder: Path, path: str) -> dict[str, Any]:
    """The Hub's listing entry of a file or folder."""
    if (folder / path).is_dir():
        return {"type": "directory", "path": path, "size": 0, "oid": commit_of(path)}
    file, is_lfs = folder / path, path.endswith(LFS_SUFFIXES)
    status = file.stat()
    oid, sha256 = _hashes(
        str(file), status.st_size, status.st_mtime_ns, status.st_blocks * 512 < status.st_size // 2
    )
    entry: dict[str, Any] = {"type": "file", "path": path, "size": status.st_size, "oid": oid}
    if is_lfs:
        entry["lfs"] = {"oid": sha256, "size": status.st_size, "pointerSize": 134}
    return entry


@cache
def _hashes(file: str, size: int, _changed: int, is_hole: bool) -> tuple[str, str]:
    """A file's git hash and its sha256."""
    if is_hole:
        return commit_of(file), hashlib.sha256(file.encode()).hexdigest()
    git, lfs = hashlib.sha1(b"blob %d\0" % size, usedforsecurity=False), hashlib.sha256()
    with open(file, "rb") as raw:
        while piece := raw.read(1 << 20):
            git.update(piece)
            lfs.update(piece)
    return git.hexdigest(), lfs.hexdigest()


def _json(value: object) -> _Answer:
    return _Answer(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(value).encode())
