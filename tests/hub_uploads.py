"""The stand-in Hub with repos that huggingface_hub can write to, without Xet.

Small files are part of the commit. Large ones are uploaded as LFS objects before it: announced in a
batch, put to another origin without the token (in parts if they are larger than a part), and kept
even without a commit.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import shutil
import tempfile
import threading
from dataclasses import dataclass, field, replace
from fnmatch import fnmatch
from http import HTTPStatus
from http.server import ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import yaml
from hub_server import (
    LFS_SUFFIXES,
    READER,
    StandInHub,
    StandInRepo,
    _Answer,
    _entry,
    _Handler,
    _json,
    _RefusedError,
    commit_of,
)

WRITER = "hf_writer"  # the token of the user "writer", who may write to "org" and "writer"


@dataclass
class WritableHub(StandInHub):
    """A stand-in that takes uploads, which change `repos`.

    Attributes:
        objects: the LFS objects by their SHA-256.
        uploads_left: after this many objects the connection is cut for all further ones.
        gate: until it is set, objects that `arrived` get no answer.
        put: the objects that were taken.
        part_size: larger objects are uploaded in parts.
        refusals: the number of requests that match a pattern and get 503.
        corrupts: the file of a commit that is stored with other content.
    """

    repos: dict[str, StandInRepo] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    parts: dict[tuple[str, int], bytes] = field(default_factory=dict)
    uploads_left: int | None = None
    counter: threading.Lock = field(default_factory=threading.Lock)
    refusals: dict[str, int] = field(default_factory=dict)
    part_size: int = 1 << 30
    gate: threading.Event = field(default_factory=threading.Event)
    put: list[str] = field(default_factory=list)
    arrived: threading.Event = field(default_factory=threading.Event)
    corrupts: str | None = None
    commits: int = 0

    def __enter__(self) -> WritableHub:  # noqa: PYI034  (Self is not in Python 3.10)
        self._folder = tempfile.TemporaryDirectory()
        self.gate.set()
        handler = type("Handler", (_Uploads,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._thread = threading.Thread(
            target=self._server.serve_forever, kwargs={"poll_interval": 0.02}
        )
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.gate.set()
        super().__exit__()
        self._folder.cleanup()

    def admits(self) -> bool:
        """Whether one more object is accepted."""
        with self.counter:
            if self.uploads_left is None:
                return True
            self.uploads_left -= 1
            return self.uploads_left >= 0

    def refuses(self, request: str) -> bool:
        """Whether to refuse this request, counted by `refusals`."""
        for pattern, count in self.refusals.items():
            if count and fnmatch(request, pattern):
                self.refusals[pattern] -= 1
                return True
        return False

    def commit(self, repo_id: str, branch: str, folder: Path) -> str:
        """Make a folder's files the next commit of a branch."""
        self.commits += 1
        oid = commit_of(f"{repo_id} {branch} {self.commits}")
        repo = self.repos[repo_id]
        commits, revisions = {**repo.commits, oid: folder}, {**repo.revisions, branch: oid}
        self.repos[repo_id] = replace(repo, commits=commits, revisions=revisions)
        return oid

    def create(self, repo_id: str, *, private: bool = False) -> None:
        """Create an empty repo as the Hub does, with one commit of .gitattributes."""
        self.repos[repo_id] = StandInRepo({}, {}, private=private)
        folder = self.new_folder()
        (folder / ".gitattributes").write_text(
            "*.safetensors filter=lfs diff=lfs merge=lfs -text\n"
        )
        self.commit(repo_id, "main", folder)

    def new_folder(self, like: Path | None = None) -> Path:
        folder = Path(tempfile.mkdtemp(dir=self._folder.name))
        if like is not None:
            shutil.copytree(like, folder, dirs_exist_ok=True)
        return folder

    def files(self, repo_id: str, branch: str = "main") -> dict[str, bytes]:
        """The files of a branch, without .gitattributes."""
        repo = self.repos[repo_id]
        folder = repo.commits[repo.revisions[branch]]
        paths = [
            path for path in folder.rglob("*") if path.is_file() and path.name != ".gitattributes"
        ]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


class _Uploads(_Handler):
    hub: WritableHub

    def do_GET(self) -> None:  # noqa: N802  (http.server calls it by this name)
        path = unquote(urlsplit(self.path).path)
        if self.hub.refuses(f"{self.command} {path} whole"):
            self._send(path, _Answer(HTTPStatus.SERVICE_UNAVAILABLE))
        elif path == "/api/whoami-v2" or path.endswith("/auth-check/write"):
            self._reply(
                path, lambda: self._whoami() if path == "/api/whoami-v2" else self._auth_check(path)
            )
        else:
            super().do_GET()

    do_HEAD = do_GET  # noqa: N815  (http.server calls it by this name)

    def do_POST(self) -> None:  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        body = self._body()
        self._reply(path, lambda: self._posted(path, body))

    def do_PUT(self) -> None:  # noqa: N802
        path = unquote(urlsplit(self.path).path)
        self.hub.arrived.set()
        if not self.hub.admits():
            self.close_connection = True
            return
        body = self._body()
        self.hub.gate.wait()
        self._reply(path, lambda: self._put(path, body))

    def _reply(self, path: str, work: Any) -> None:
        request = f"{self.command} {path} whole"
        for pattern, status in self.hub.failures.items():
            if fnmatch(request, pattern):
                self._send(path, _Answer(status))
                return
        if self.hub.refuses(request):
            self._send(path, _Answer(HTTPStatus.SERVICE_UNAVAILABLE))
            return
        try:
            answer = work()
        except _RefusedError as refused:
            answer = refused.answer
        self._send(path, answer)

    @property
    def _token(self) -> str:
        """The token; WRITER may read what READER may."""
        is_writer = self.headers.get("Authorization") == f"Bearer {WRITER}"
        return READER if is_writer else super()._token

    def _model(self, repo_id: str, revision: str) -> _Answer:
        answer = super()._model(repo_id, revision)
        info = json.loads(answer.body) | {"private": self.hub.repos[repo_id].private}
        return replace(answer, body=json.dumps(info).encode())

    def _check_writer(self, repo_id: str) -> None:
        if not self._token:
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        if self.headers.get("Authorization") != f"Bearer {WRITER}" or repo_id.partition("/")[
            0
        ] not in (
            "org",
            "writer",
        ):
            raise _RefusedError(
                HTTPStatus.FORBIDDEN, "", f"You don't have the rights to write to {repo_id}."
            )

    def _whoami(self) -> _Answer:
        if not self._token:
            raise _RefusedError(HTTPStatus.UNAUTHORIZED, "", "Invalid username or password.")
        role = "write" if self.headers.get("Authorization") == f"Bearer {WRITER}" else "read"
        access = {"type": "access_token", "accessToken": {"displayName": "ci", "role": role}}
        orgs = [{"name": "org", "roleInOrg": "write"}, {"name": "readonly", "roleInOrg": "read"}]
        return _json({"type": "user", "name": "writer", "orgs": orgs, "auth": access})

    def _auth_check(self, path: str) -> _Answer:
        repo_id = path.removeprefix("/api/models/").removesuffix("/auth-check/write")
        self._commit(repo_id, "main")
        self._check_writer(repo_id)
        return _json({})

    def _posted(self, path: str, body: bytes) -> _Answer:
        if path == "/api/validate-yaml":
            return self._validate(json.loads(body)["content"])
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/branch/(.+)", path):
            return self._branch(match[1], match[2])
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/preupload/(.+)", path):
            return self._preupload(match[1], match[2], json.loads(body))
        if match := re.fullmatch(r"/api/models/([^/]+/[^/]+)/commit/(.+)", path):
            return self._committed(match[1], match[2], body)
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            return self._batch(match[1], json.loads(body))
        if match := re.fullmatch(r"/lfs-complete/([0-9a-f]{64})", path):
            return self._complete(match[1], json.loads(body))
        return _Answer(HTTPStatus.NOT_FOUND)

    def _validate(self, card: str) -> _Answer:
        """A mapping of YAML in front, whose fields have the types that the Hub's own schema
        gives them.
        """
        front = re.match(r"---\n(.*?\n)---\n", card, re.DOTALL)
        problems = []
        try:
            fields = yaml.safe_load(front[1]) if front else {}
        except yaml.YAMLError as error:
            fields, problems = {}, [str(error)]
        texts = (
            "license",
            "license_name",
            "license_link",
            "library_name",
            "pipeline_tag",
            "base_model_relation",
        )
        problems += [
            f'"{name}" must be a string'
            for name in texts
            if not isinstance(fields.get(name, ""), str)
        ]
        if not isinstance(fields.get("tags", []), list):
            problems.append('"tags" must be an array')
        if problems:
            answer = _json(
                {"errors": [{"message": problem} for problem in problems], "warnings": []}
            )
            return replace(answer, status=HTTPStatus.BAD_REQUEST)
        return _json({"errors": [], "warnings": []})

    def _create(self, asked: dict[str, Any]) -> _Answer:
        repo_id = f"{asked.get('organization') or 'writer'}/{asked['name']}"
        self._check_writer(repo_id)
        if repo_id in self.hub.repos:
            return replace(
                _json({"url": f"{self.hub.endpoint}/{repo_id}"}), status=HTTPStatus.CONFLICT
            )
        self.hub.create(repo_id, private=asked.get("visibility") == "private")
        return _json({"url": f"{self.hub.endpoint}/{repo_id}", "name": repo_id})

    def _branch(self, repo_id: str, branch: str) -> _Answer:
        self._check_writer(repo_id)
        repo = self.hub.repos[repo_id]
        if branch in repo.revisions:
            raise _RefusedError(HTTPStatus.CONFLICT, "", "Reference already exists")
        revisions = {**repo.revisions, branch: repo.revisions["main"]}
        self.hub.repos[repo_id] = replace(repo, revisions=revisions)
        return _json({})

    def _preupload(self, repo_id: str, branch: str, asked: dict[str, Any]) -> _Answer:
        self._check_writer(repo_id)
        _, folder = self._commit(repo_id, branch)

        def answer(name: str) -> dict[str, Any]:
            found: dict[str, Any] = {"path": name, "shouldIgnore": False}
            found["uploadMode"] = "lfs" if name.endswith(LFS_SUFFIXES) else "regular"
            if (folder / name).is_file():
                entry = _entry(folder, name)
                found["oid"] = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
            return found

        return _json({"files": [answer(file["path"]) for file in asked["files"]]})

    def _batch(self, repo_id: str, asked: dict[str, Any]) -> _Answer:
        self._check_writer(repo_id)
        origin = f"http://localhost:{self.hub.port}"

        def answer(thing: dict[str, Any]) -> dict[str, Any]:
            oid, size = thing["oid"], thing["size"]
            found: dict[str, Any] = {"oid": oid, "size": size}
            if oid in self.hub.objects:
                return found
            upload: dict[str, Any] = {"href": f"{origin}/lfs/{oid}/0"}
            if size > self.hub.part_size:
                count = -(-size // self.hub.part_size)
                urls = {
                    str(number): f"{origin}/lfs/{oid}/{number}" for number in range(1, count + 1)
                }
                upload = {"href": f"{self.hub.endpoint}/lfs-complete/{oid}"}
                upload["header"] = {"chunk_size": str(self.hub.part_size), **urls}
            return found | {"actions": {"upload": upload}}

        return _json(
            {"transfer": "basic", "objects": [answer(thing) for thing in asked["objects"]]}
        )

    def _put(self, path: str, body: bytes) -> _Answer:
        if self._token:  # a signed address refuses a token
            return _Answer(HTTPStatus.BAD_REQUEST)
        match = re.fullmatch(r"/lfs/([0-9a-f]{64})/(\d+)", path)
        if match is None:
            return _Answer(HTTPStatus.NOT_FOUND)
        oid, number = match[1], int(match[2])
        if number:
            self.hub.parts[oid, number] = body
            return _Answer(HTTPStatus.OK, {"ETag": f'"{number}"'})
        return self._store(oid, body)

    def _complete(self, oid: str, asked: dict[str, Any]) -> _Answer:
        body = b"".join(self.hub.parts.pop((oid, part["partNumber"])) for part in asked["parts"])
        return self._store(oid, body)

    def _store(self, oid: str, body: bytes) -> _Answer:
        if hashlib.sha256(body).hexdigest() != oid:
            return _Answer(HTTPStatus.BAD_REQUEST)
        self.hub.objects[oid] = body
        self.hub.put.append(oid)
        return _Answer(HTTPStatus.OK)

    def _committed(self, repo_id: str, branch: str, body: bytes) -> _Answer:
        self._check_writer(repo_id)
        _, parent = self._commit(repo_id, branch)
        folder = self.hub.new_folder(like=parent)
        for line in body.splitlines():
            operation = json.loads(line)
            key, value = operation["key"], operation["value"]
            path = folder / value.get("path", "")
            path.parent.mkdir(parents=True, exist_ok=True)
            if key == "file":
                content = base64.b64decode(value["content"])
                path.write_bytes(content + b"!" if value["path"] == self.hub.corrupts else content)
            elif key == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise _RefusedError(
                        HTTPStatus.BAD_REQUEST, "", f"LFS object {value['oid']} was not uploaded"
                    )
                path.write_bytes(self.hub.objects[value["oid"]])
            elif key == "deletedFile":
                path.unlink()
        oid = self.hub.commit(repo_id, branch, folder)
        return _json(
            {
                "success": True,
                "commitOid": oid,
                "commitUrl": f"{self.hub.endpoint}/{repo_id}/commit/{oid}",
            }
        )

    def _body(self) -> bytes:
        """The request's body, of a given length or in chunks."""
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body
