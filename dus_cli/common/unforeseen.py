"""One line for any exception: the message of a known failure, or the likely cause of another."""

from __future__ import annotations

import linecache
import os
import re
import traceback
from collections.abc import Iterator

from dus_cli.common.libraries import broken_import
from dus_cli.errors import DusError, reason_of, shown

# Python's message for a text that is not a number.
_NOT_A_NUMBER = re.compile(
    r"(?:invalid literal for int\(\) with base \d+|could not convert string to float): (.*)",
    re.DOTALL,
)

_QUOTED_NAME = re.compile(r"""["']([A-Za-z_][A-Za-z0-9_]*)["']""")

# Variables with an address or a file that network libraries read, and the forms they must have.
_ENDPOINT = re.compile(r"https?://[^/:\s]+(:\d+)?(/.*)?")
_PROXY = re.compile(
    r"((https?|socks5h?)://)?([^@/\s]*@)?([^/:\s]+|\[[^\]\s]+\])(:\d+)?/?", re.IGNORECASE
)
_PROXIES = ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY", "http_proxy", "https_proxy", "all_proxy")
_FILES = ("SSL_CERT_FILE", "SSL_CERT_DIR")
_NETWORK = ("httpx", "httpcore", "ssl")


def explained(error: Exception) -> str:
    """What is missing or set wrong, if that can be found out; else that dus did not foresee it."""
    blame = blamed_variable(error)
    if blame is not None:
        return blame
    if isinstance(error, DusError):
        return str(error)
    if isinstance(error, ImportError):
        return str(broken_import(error))
    if isinstance(error, MemoryError):
        return "out of memory; nothing was left behind"
    if isinstance(error, OSError):  # whatever the operating system refuses
        where = f"{shown(error.filename)}: " if error.filename else ""
        return f"{where}{error.strerror or error}; check the path, its permissions and the disk"
    return (
        f"{type(error).__name__}: {reason_of(error)}; dus did not foresee this: "
        "run it again with DUS_DEBUG=1, and report what it prints"
    )


def blamed_variable(error: BaseException | None) -> str | None:
    """The message if an exception comes from an environment variable with a bad value; else None.

    A bad number, which a library reads at import, is traced to its variable by the source line that
    failed, or else by its value. Addresses and files are checked after a network library failed.
    """
    for cause in _causes(error):
        match = _NOT_A_NUMBER.search(str(cause))
        if match is None:
            blame = _unusable_address() if _is_of_the_network(cause) else None
            if blame is not None:
                return blame
            continue
        by_name = [
            name for name in _names_in_lines(cause) if repr(os.environ.get(name)) == match[1]
        ]
        by_value = [name for name, value in os.environ.items() if value and repr(value) == match[1]]
        names = by_name or by_value
        if names:
            return (
                f"the environment variable {' or '.join(names)} is {shown(match[1])}, and a "
                "library reads it as a number; set it to one, or unset it"
            )
    return None


def _is_of_the_network(error: BaseException) -> bool:
    modules = {kind.__module__.partition(".")[0].rstrip("2") for kind in type(error).__mro__}
    places = {frame.filename for frame in traceback.extract_tb(error.__traceback__)}
    is_inside = any(
        f"{os.sep}{name}" in place
        for place in places
        for name in ("httpx", "httpcore", "huggingface_hub")
    )
    return not modules.isdisjoint(_NETWORK) or (
        is_inside and isinstance(error, (ValueError, OSError))
    )


def _unusable_address() -> str | None:
    """The message for the first variable that holds no valid address, proxy or file; else None."""
    environment = os.environ
    endpoint = environment.get("HF_ENDPOINT")
    if endpoint and not _ENDPOINT.fullmatch(endpoint):
        return (
            f"the environment variable HF_ENDPOINT is {shown(endpoint)!r}, and must begin with "
            "https:// or http://"
        )
    for name in _PROXIES:
        if environment.get(name) and not _PROXY.fullmatch(environment[name]):
            return (  # the value is not shown: it may hold a password
                f"the environment variable {name} is no address of a proxy, such as "
                "http://host:3128 or socks5://host:1080; correct it, or unset it"
            )
    for name in _FILES:
        if environment.get(name) and not os.path.exists(environment[name]):  # noqa: PTH110  (as ssl asks it)
            return (
                f"the environment variable {name} is {shown(environment[name])!r}, which does not "
                "exist; unset it"
            )
    return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An exception and its causes, the first cause first."""
    seen: list[BaseException] = []
    while error is not None and error not in seen:
        seen.append(error)
        error = error.__cause__ or error.__context__
    yield from reversed(seen)


def _names_in_lines(error: BaseException) -> list[str]:
    """Environment variables named in the statements of a traceback, innermost first."""
    names: list[str] = []
    for frame in reversed(traceback.extract_tb(error.__traceback__)):
        first = frame.lineno or 1
        last = getattr(frame, "end_lineno", None) or first  # since Python 3.11
        text = "".join(
            linecache.getline(frame.filename, number) for number in range(first, last + 1)
        )
        names += [name for name in _QUOTED_NAME.findall(text) if name in os.environ]
    return list(dict.fromkeys(names))
