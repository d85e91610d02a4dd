"""Read parts of a file over HTTP from the socket into a buffer of the caller.

This uses the standard library's client, because httpx makes a dozen Python objects of each 64 KiB:
a gigabyte from loopback takes 1.8 CPU seconds with httpx and 0.35 here. It supports no proxies,
only the system's certificates, and no retries: the caller fetches in another way what is missing.
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

# Bytes per read. `stop` is checked between two reads.
_BYTES_PER_READ = 256 << 10


class Connections:
    """Connections to the servers of files, kept open for the next part. Threads may share it."""

    def __init__(self) -> None:
        self._idle: list[tuple[str, http.client.HTTPConnection]] = []
        self._lock = threading.Lock()
        self._is_useless = False  # no server was reached, or one ignored the range request

    def read_into(self, url: str, start: int, view: memoryview, stop: threading.Event) -> int:
        """Request the bytes from `start` on once, and return how many of them are now in `view`.

        They are fewer than `view` holds if `stop` is set, if the server cannot be reached in this
        way, if it breaks off, or if it answers with anything but these bytes.
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
                    count = answer.readinto(view[filled : filled + _BYTES_PER_READ])
                    if count == 0:
                        break
                    filled += count
        except _RefusedError as refused:
            self._is_useless = refused.status < http.HTTPStatus.BAD_REQUEST
        except (OSError, http.client.HTTPException):
            # The server may have closed a kept connection meanwhile: only a new one is evidence.
            self._is_useless = is_new and filled == 0
        if filled == len(view):
            self._keep(origin, connection)
        else:
            connection.close()
        return filled

    def close(self) -> None:
        """Close every idle connection."""
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
    """A response without the requested bytes."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


def _connect(scheme: str, host: str, port: int | None) -> http.client.HTTPConnection:
    """A connection, not yet opened: its first request opens it."""
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
    """A response with exactly the bytes from `start` to `end`. No token is sent.

    Raises:
        _RefusedError: the response holds anything else.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it exports lazily

    headers = build_hf_headers(token=False, library_name=LIBRARY, library_version=__version__)
    headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
    connection.request("GET", path or "/", headers=headers)
    answer = connection.getresponse()
    given = re.fullmatch(r"bytes (\d+)-(\d+)/(?:\d+|\*)", answer.headers.get("Content-Range", ""))
    has_range = given is not None and (int(given[1]), int(given[2])) == (start, end - 1)
    if (
        answer.status != http.HTTPStatus.PARTIAL_CONTENT
        or not has_range
        or answer.length != end - start
    ):
        raise _RefusedError(answer.status)
    yield answer
