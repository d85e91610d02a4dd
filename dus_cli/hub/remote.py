"""Read a file on the Hub by range requests; after a failure, continue from where the connection
broke.

This uses huggingface_hub's session, headers and errors, but not its downloads, which fetch whole
files into its cache. Weights are served from another origin, at a signed address that expires; the
token is sent to the Hub only.

Large ranges are first requested on one of `connections`, which takes a fifth of the session's CPU
time. Bytes that do not arrive that way, for whatever reason, are requested by the session, whose
errors say why.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterator
from email.utils import parsedate_to_datetime
from random import SystemRandom
from typing import TYPE_CHECKING
from urllib.parse import urlsplit

from dus_cli import __version__
from dus_cli.common.reference import ModelRef
from dus_cli.errors import ModelNotFoundError, shown
from dus_cli.hub.connections import Connections
from dus_cli.hub.errors import LIBRARY, hub_errors, prepare

if TYPE_CHECKING:
    from huggingface_hub.errors import HTTPError  # type: ignore[attr-defined]  # httpx's

# Attempts without receiving a byte in between. The waits are between half of and all of 1, 2, 4, …
# seconds: one to two minutes in all.
ATTEMPTS = 8
FIRST_WAIT, LONGEST_WAIT = 1.0, 60.0

# The longest Retry-After that is waited for, in seconds.
LONGEST_ASKED = 600.0

# HTTP statuses after which a retry may succeed: time-outs, too many requests, server errors.
_RETRIED = frozenset([408, 425, 429, 500, 502, 503, 504])

# HTTP statuses of a signed address that may have expired: then a new one is requested from the Hub,
# at most _MAX_SIGNATURES times. If the address was not the cause, the Hub's answer has the error.
_EXPIRED = frozenset([400, 401, 403, 404, 410])
_MAX_SIGNATURES = 3

_HUB = "https://huggingface.co"  # mirrors may redirect to it for files that are not under LFS

_random = SystemRandom()


class HubFile:
    """A file of a repo at a commit, safe to share between threads.

    `size` is in bytes; `sha256` is the Hub's, hexadecimal, or None for a file that is not under
    LFS.
    """

    def __init__(self, ref: ModelRef, commit: str, name: str) -> None:
        self.ref, self.commit, self.name = ref, commit, name
        self.size = 0
        self.sha256: str | None = None
        self._url: str | None = None
        self._lock = threading.Lock()
        self._connections = Connections()

    @classmethod
    def open(cls, ref: ModelRef, commit: str, name: str) -> HubFile | None:
        """Ask the Hub for the file's size and address; None if the repo has no such file.

        Raises:
            ModelNotFoundError: the Hub does not provide it, after several attempts.
        """
        file, failures, never = cls(ref, commit, name), 0, threading.Event()
        with hub_errors(ref):
            from huggingface_hub.errors import EntryNotFoundError

            while file._url is None:
                try:
                    file._resolve()
                except EntryNotFoundError:
                    return None
                except _http_error() as error:
                    failures += 1
                    file._wait(error, None, failures, never)
        return file

    def read(self, start: int, end: int) -> bytes:
        """The bytes from `start` up to `end`, exclusive.

        Raises:
            ModelNotFoundError: the Hub does not provide them, after several attempts.
        """
        raw = bytearray(end - start)
        self._fill(start, memoryview(raw), threading.Event(), 0)
        return bytes(raw)

    def read_into(self, start: int, view: memoryview, stop: threading.Event) -> None:
        """Fill `view` with the bytes from `start`. Once `stop` is set, it returns early.

        Raises:
            ModelNotFoundError: the Hub does not provide them, after several attempts.
        """
        with hub_errors(self.ref):
            url = self._address()
        filled = 0
        if not is_the_hubs(url):
            filled = self._connections.read_into(url, start, view, stop)
        self._fill(start, view, stop, filled)

    def close(self) -> None:
        """End the connections that `read_into` keeps."""
        self._connections.close()

    def _fill(self, start: int, view: memoryview, stop: threading.Event, filled: int) -> None:
        """Fill the rest of `view`, of which some bytes are there, by huggingface_hub's session."""
        failures = 0
        with hub_errors(self.ref):
            while filled < len(view) and not stop.is_set():
                url, before = None, filled
                try:
                    url = self._address()
                    for chunk in self._chunks(url, start + filled, start + len(view)):
                        view[filled : filled + len(chunk)] = chunk
                        filled += len(chunk)
                        failures = 0
                        if stop.is_set():
                            return
                    if filled == before:
                        raise ValueError(
                            f"none of the bytes {start}-{start + len(view) - 1} arrived"
                        )
                except _http_error() as error:
                    failures += 1
                    self._wait(error, url, failures, stop)

    def _address(self) -> str:
        """The file's address; a new one if it has expired."""
        with self._lock:
            return self._url or self._resolve()

    def _resolve(self) -> str:
        from huggingface_hub import constants, get_hf_file_metadata, hf_hub_url

        prepare(self.ref)
        assert self.ref.repo_id is not None
        url = hf_hub_url(self.ref.repo_id, self.name, revision=self.commit)
        metadata = get_hf_file_metadata(
            url,
            token=self.ref.token,
            timeout=constants.HF_HUB_ETAG_TIMEOUT,
            library_name=LIBRARY,
            library_version=__version__,
        )
        if metadata.size is None or metadata.commit_hash not in (None, self.commit):
            raise ValueError(f"it has no size, or is of another commit: {self.name}")
        self.size = metadata.size
        self.sha256 = metadata.etag if re.fullmatch(r"[0-9a-f]{64}", metadata.etag or "") else None
        self._url = metadata.location
        return self._url

    def _chunks(self, url: str, start: int, end: int) -> Iterator[bytes]:
        """The bytes of a range, as they arrive."""
        from huggingface_hub import constants, get_session
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status  # type: ignore[attr-defined]

        headers = build_hf_headers(
            token=self.ref.token if is_the_hubs(url) else False,
            library_name=LIBRARY,
            library_version=__version__,
        )
        headers |= {"Range": f"bytes={start}-{end - 1}", "Accept-Encoding": "identity"}
        with get_session().stream(
            "GET", url, headers=headers, timeout=constants.HF_HUB_DOWNLOAD_TIMEOUT
        ) as response:
            hf_raise_for_status(response)
            content_range = re.fullmatch(
                r"bytes (\d+)-(\d+)/(\d+|\*)", response.headers.get("Content-Range", "")
            )
            if (
                response.status_code != 206
                or content_range is None
                or "Content-Encoding" in response.headers
            ):
                raise ModelNotFoundError(
                    f"the server of {shown(self.name)} does not support range requests; use "
                    "another HF_ENDPOINT, or fetch the model with `hf download` and give its "
                    "directory"
                )
            if int(content_range[1]) != start or int(content_range[2]) >= end:
                raise ValueError(
                    f"bytes {start}-{end - 1} were requested and {content_range[0]} arrived"
                )
            yield from response.iter_raw()

    def _wait(
        self, error: HTTPError, url: str | None, failures: int, stop: threading.Event
    ) -> None:
        """Wait before the next attempt; raise the error if another attempt cannot succeed."""
        response = getattr(error, "response", None)
        status = None if response is None else response.status_code
        if (
            url is not None
            and not is_the_hubs(url)
            and status in _EXPIRED
            and failures < _MAX_SIGNATURES
        ):
            with self._lock:
                if self._url == url:  # else another thread has already got a new address
                    self._url = None
            return
        pause(wait_before(error, failures, ATTEMPTS), stop)


def wait_before(error: Exception, failures: int, attempts: int) -> float:
    """Seconds to wait before the next attempt, after so many failures.

    Raises:
        Exception: `error` itself, if another attempt cannot succeed.
    """
    response = getattr(error, "response", None)
    if (response is not None and response.status_code not in _RETRIED) or failures >= attempts:
        raise error
    requested = 0.0 if response is None else _requested_wait(response.headers)
    if requested > LONGEST_ASKED:
        raise error
    return max(
        requested, min(LONGEST_WAIT, FIRST_WAIT * 2.0 ** (failures - 1)) * _random.uniform(0.5, 1)
    )


def pause(seconds: float, stop: threading.Event | None = None) -> None:
    """Wait, at most until `stop` is set."""
    (stop or threading.Event()).wait(seconds)


def _http_error() -> type[HTTPError]:
    """The error of httpx that every failed request raises, by its name in huggingface_hub."""
    from huggingface_hub import errors

    return errors.HTTPError  # type: ignore[attr-defined]


def is_the_hubs(url: str) -> bool:
    """Whether the token may be sent there: to HF_ENDPOINT and the Hub, by scheme, host and port."""
    from huggingface_hub import constants

    return _origin(url) in (_origin(constants.ENDPOINT), _origin(_HUB))


def _origin(url: str) -> tuple[str, str | None, int | None]:
    parts = urlsplit(url)
    return parts.scheme, parts.hostname, parts.port or {"http": 80, "https": 443}.get(parts.scheme)


def _requested_wait(headers: dict[str, str]) -> float:
    """Seconds that a server asks to wait: in Retry-After, as a number or a date, or in the Hub's
    RateLimit header.
    """
    retry_after = headers.get("Retry-After", "").strip()
    if retry_after.isdecimal():
        return float(retry_after)
    if retry_after:
        try:
            return max(0.0, parsedate_to_datetime(retry_after).timestamp() - time.time())
        except ValueError:
            return 0.0
    limit = re.search(r";\s*r\s*=\s*0\s*;\s*t\s*=\s*(\d+)", headers.get("RateLimit", ""))
    return float(limit[1]) if limit else 0.0
