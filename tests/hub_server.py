"""A stand-in for the Hub on the loopback interface, with a log of what was asked of it and what it sent.

It answers what huggingface_hub asks for a model: its commit, its list of files, its files. As on the real
Hub, a file under LFS redirects to a signed address on another origin, where the token must not follow; a
gated repo shows its list of files to everyone; a private one does not exist for strangers.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote, unquote, urlsplit

LFS_SUFFIXES = (".safetensors", ".bin", ".gguf", ".pth", ".onnx")
READER, STRANGER = "hf_reader", "hf_stranger"  # the tokens that the Hub knows
HANG_UP = 0  # a failure that is no HTTP status: the connection ends without an answer


def commit_of(text: str) -> str:
    """A commit hash, the same for the same text."""
    return hashlib.sha1(text.encode(), usedforsecurity=False).hexdigest()


@dataclass(frozen=True)
class StandInRepo:
    """A model repo: a folder of files for each commit, and the branches and tags that name commits.

    READER may read a private one, and the files of a gated one. The weights of one on `xet` come from
    another service, which is announced and not there.
    """

    commits: Mapping[str, Path]
    revisions: Mapping[str, str]
    private: bool = False
    gated: bool = False
    xet: bool = False


class Request(NamedTuple):
    """A request that was answered. `num_sent` counts the bytes of the answer's body."""

    method: str
    path: str
    byte_range: str | None
    num_sent: int


@dataclass
class StandInHub:
    """The server, running while its context is open.

    `failures` maps patterns of requests to the HTTP status that they get, or HANG_UP. A request reads
    "GET /org/name/resolve/main/config.json whole", with the Range header in the place of "whole".
    """

    repos: Mapping[str, StandInRepo]
    failures: dict[str, int] = field(default_factory=dict)
    log: list[Request] = field(default_factory=list)

    def __enter__(self) -> StandInHub:  # noqa: PYI034  (Self is not in Python 3.10)
        handler = type("Handler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """No more answers; its port is closed."""
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
        """The files of any repo that were asked for, be it only for their size."""
        matches = (re.fullmatch(r"/[^/]+/[^/]+/resolve/[^/]+/(.+)", request.path) for request in self.log)
        return {match[1] for match in matches if match}

    def num_sent(self, pattern: str) -> int:
        """Bytes sent for all paths that match."""
        return sum(request.num_sent for request in self.log if fnmatch(request.path, pattern))


@dataclass
class _Answer:
    status: int
    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""


class _RefusedError(Exception):
    """An answer that says no, as huggingface_hub reads it: from X-Error-Code."""

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        body = json.dumps({"error": message}).encode()
        self.answer = _Answer(status, {"X-Error-Code": code, "X-Error-Message": message}, body)


class _Handler(BaseHTTPRequestHandler):
    hub: StandInHub
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # headers and body are two packets; the second must not wait for the first

    def do_GET(self) -> None:
        url = urlsplit(self.path)
        path = unquote(url.path)
        request = f"{self.command} {path} {self.headers.get('Range', 'whole')}"
        for pattern, status in self.hub.failures.items():
            if fnmatch(request, pattern):
                self._send(path, _Answer(status))
                return
        try:
            if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/revision/(.+))?", path):
                answer = self._model(match[1], match[2] or "main")
            elif match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/tree/([^/]+)", path):
                answer = self._tree(match[1], match[2], recursive="recursive=true" in url.query.lower())
            elif re.fullmatch(r"/api/models/([^/]+/[^/]+)/xet-read-token/([^/]+)", path):
                service = {"X-Xet-Cas-Url": f"{self.hub.endpoint}/cas", "X-Xet-Access-Token": "of the service"}
                answer = _Answer(HTTPStatus.OK, service | {"X-Xet-Token-Expiration": "4000000000"})
            elif match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path):
                answer = self._resolve(match[1], match[2], match[3])
            elif match := re.fullmatch(r"/cdn/([^/]+/[^/]+)/([^/]+)/(.+)", path):
                answer = self._cdn(match[1], match[2], match[3])
            else:
                answer = _Answer(HTTPStatus.NOT_FOUND)
        except _RefusedError as refused:
            answer = refused.answer
        self._send(path, answer)

    do_HEAD = do_GET  # noqa: N815  (http.server calls it by this name)

    def _model(self, repo_id: str, revision: str) -> _Answer:
        commit, folder = self._commit(repo_id, revision)
        files = [{"rfilename": path} for path in _files(folder)]
        answer = _json({"id": repo_id, "sha": commit, "tags": [], "siblings": files})
        answer.headers["X-HF-Warning"] = "unauthenticated; Set a HF_TOKEN for higher rate limits."
        return answer

    def _tree(self, repo_id: str, revision: str, *, recursive: bool) -> _Answer:
        _, folder = self._commit(repo_id, revision)
        paths = _files(folder) if recursive else [path.name for path in sorted(folder.iterdir())]
        return _json([_entry(folder, path) for path in paths])

    def _resolve(self, repo_id: str, revision: str, path: str) -> _Answer:
        commit, folder = self._commit(repo_id, revision)
        repo = self.hub.repos[repo_id]
        if repo.gated and self._token != READER:
            status = HTTPStatus.FORBIDDEN if self._token else HTTPStatus.UNAUTHORIZED
            raise _RefusedError(status, "GatedRepo", f"Access to model {repo_id} is restricted.")
        if not (folder / path).is_file():
            raise _RefusedError(HTTPStatus.NOT_FOUND, "EntryNotFound", "Entry not found")
        entry, headers = _entry(folder, path), {"X-Repo-Commit": commit}
        if not path.endswith(LFS_SUFFIXES):
            return _Answer(HTTPStatus.OK, headers | {"ETag": f'"{entry["oid"]}"'}, (folder / path).read_bytes())
        headers |= {"X-Linked-Etag": f'"{entry["lfs"]["oid"]}"', "X-Linked-Size": str(entry["size"])}
        if repo.xet:
            route = f"{self.hub.endpoint}/api/models/{repo_id}/xet-read-token/{commit}"
            headers |= {"X-Xet-Hash": entry["lfs"]["oid"], "X-Xet-Refresh-Route": route}
        headers["Location"] = f"http://localhost:{self.hub.port}/cdn/{repo_id}/{commit}/{quote(path)}?signature"
        return _Answer(HTTPStatus.FOUND, headers)

    def _cdn(self, repo_id: str, commit: str, path: str) -> _Answer:
        if self._token:  # an address is signed or a request has a token; S3 refuses both at once
            return _Answer(HTTPStatus.BAD_REQUEST)
        body = (self.hub.repos[repo_id].commits[commit] / path).read_bytes()
        if not (match := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))):
            return _Answer(HTTPStatus.OK, {}, body)
        start, end = int(match[1]), min(int(match[2] or len(body)), len(body) - 1)
        headers = {"Content-Range": f"bytes {start}-{end}/{len(body)}"}
        return _Answer(HTTPStatus.PARTIAL_CONTENT, headers, body[start : end + 1])

    def _commit(self, repo_id: str, revision: str) -> tuple[str, Path]:
        token, repo = self._token, self.hub.repos.get(repo_id)
        if repo is None or (repo.private and token != READER):
            if not token:  # strangers are not told whether there is such a repo
                raise _RefusedError(HTTPStatus.UNAUTHORIZED, "RepoNotFound", "Invalid username or password.")
            raise _RefusedError(HTTPStatus.NOT_FOUND, "RepoNotFound", "Repository not found")
        commit = repo.revisions.get(revision, revision)
        if commit not in repo.commits:
            raise _RefusedError(HTTPStatus.NOT_FOUND, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit, repo.commits[commit]

    @property
    def _token(self) -> str:
        token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if token not in ("", READER, STRANGER):
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "", "Invalid credentials in Authorization header")
        return token

    def _send(self, path: str, answer: _Answer) -> None:
        if answer.status == HANG_UP:
            self.close_connection = True
            return
        body = b"" if self.command == "HEAD" else answer.body
        # Logged before it is sent, so that whoever has the answer finds it in the log.
        self.hub.log.append(Request(self.command, path, self.headers.get("Range"), len(body)))
        self.send_response(answer.status)
        for name, value in {**answer.headers, "Content-Length": str(len(answer.body))}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing on stderr: tests read `StandInHub.log`."""


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _entry(folder: Path, path: str) -> dict[str, Any]:
    """A file or folder as the Hub lists it."""
    if (folder / path).is_dir():
        return {"type": "directory", "path": path, "size": 0, "oid": commit_of(path)}
    raw = (folder / path).read_bytes()
    entry: dict[str, Any] = {"type": "file", "path": path, "size": len(raw)}
    entry["oid"] = hashlib.sha1(b"blob %d\0" % len(raw) + raw, usedforsecurity=False).hexdigest()
    if path.endswith(LFS_SUFFIXES):
        entry["lfs"] = {"oid": hashlib.sha256(raw).hexdigest(), "size": len(raw), "pointerSize": 134}
    return entry


def _json(value: object) -> _Answer:
    return _Answer(HTTPStatus.OK, {"Content-Type": "application/json"}, json.dumps(value).encode())
