"""Parts of a file over HTTP, read from the socket into memory that is there already.

The standard library's client, because httpx makes a dozen Python objects of each 64 KiB: 1.8 CPU
seconds for a gigabyte from loopback, where this takes 0.35. It knows no proxies, no other
certificates than the system's, and no second try: whoever asks has another way for what does not
come.
"""

from __future__ import annotations

import contextlib
import http
import http.client
import re
import ssl
import threading
from collections.abc import Iterator
from functools import cache
from urllib.parse import urlsplit
from urllib.request import getproxies

from dus_cli import __version__
from dus_cli.hub.errors import LIBRARY

# Between two looks at whether to stop. What came of one that broke off is asked for again.
_AT_ONCE = 256 << 10


class Connections:
    """Connections to whoever serves a file, kept for the next part of it. Threads may share it."""

    def __init__(self) -> None:
        self._idle: list[tuple[str, http.client.HTTPConnection]] = []
        self._lock = threading.Lock()
        self._is_useless = False  # the server was not reached, or does not do as it is asked

    def read_into(self, url: str, start: int, view: memoryview, stop: threading.Event) -> int:
        """Ask once for the bytes from `start` on; returns how many of them are in `view`.

        They are fewer once `stop` is set, or where the server cannot be reached like this, breaks
        off, or answers with anything but these bytes.
        """
        parts = urlsplit(url)
        if self._is_useless or parts.scheme not in ("http", "https") or parts.hostname is None:
            return 0
        proxies = getproxies()
        if proxies.get(parts.scheme) or proxies.get("all"):
            return 0
        origin = f"{parts.scheme}://{parts.netloc}"
        connection = self._take(origin)
        is_new = connection is None
        connection = connection or _connect(parts.scheme, parts.hostname, parts.port)
        filled = 0
        try:
            with _part(connection, url[len(origin) :], start, start + len(view)) as answer:
                while filled < len(view) and not stop.is_set():
                    count = answer.readinto(view[filled : filled + _AT_ONCE])
                    if count == 0:
                        break
                    filled += count
        except _RefusedError as refused:
            self._is_useless = refused.status < http.HTTPStatus.BAD_REQUEST
        except (OSError, http.client.HTTPException):
            # One that was kept may have been ended meanwhile, and that says nothing.
            self._is_useless = is_new and filled == 0
        if filled == len(view):
            self._keep(origin, connection)
        else:
            connection.close()
        return filled

    def close(self) -> None:
        """End all that are kept."""
        with self._lock:
            idle, self._idle = self._idle, []
        for _, connection in idle:
            connection.close()

    def _take(self, origin: str) -> http.client.HTTPConnection | None:
        with self._lock:
            at = next((i for i, (to, _) in enumerate(self._idle) if to == origin), None)
            return None if at is None else self._idle.pop(at)[1]

    def _keep(self, origin: str, connection: http.client.HTTPConnection) -> None:
        with self._lock:
            self._idle.append((origin, connection))


class _RefusedError(Exception):
    """An answer without the bytes that were asked for."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _connect(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    """A connection that is made with the first request."""
    from huggingface_hub import constants

    seconds = constants.HF_HUB_DOWNLOAD_TIMEOUT
    if scheme == "http":
        return http.client.HTTPConnection(host, port, timeout=seconds)
    return http.client.HTTPSConnection(host, port, timeout=seconds, context=_tls())


@cache
def _tls() -> ssl.SSLContext:
    return ssl.create_default_context()


@contextlib.contextmanager
def _part(
    connection: http.client.HTTPConnection, path: str, start: int, end: int
) -> Iterator[http.client.HTTPResponse]:
    """An answer with just these bytes of a file. No token goes along."""
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it exports lazily

    headers = build_hf_headers(token=False, library_name=LIBRARY, library_version=__version__)
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    connection.request("GET", path or "/", headers=headers)
    answer = connection.getresponse()
    said = re.fullmatch(r"bytes (\d+)-(\d+)/(?:\d+|\*)", answer.headers.get("Content-Range", ""))
    is_it = said is not None and (int(said[1]), int(said[2])) == (start, end - 1)
    if (
        answer.status != http.HTTPStatus.PARTIAL_CONTENT
        or not is_it
        or answer.length != end - start
    ):
        raise _RefusedError(answer.status)
    yield answer
