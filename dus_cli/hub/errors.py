"""Errors of huggingface_hub in one line each; token check and time limit before a request."""

from __future__ import annotations

import errno
import struct
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dus_cli.common.reference import ModelRef
from dus_cli.errors import ModelNotFoundError, shown
from dus_cli.hub.cache import missing, way_out

if TYPE_CHECKING:
    from huggingface_hub.errors import HfHubHTTPError

LIBRARY = "dus"  # the client's name in the Hub's logs

# The kinds of time-outs in httpx's requests.
_WAITS = ("connect", "read", "write", "pool")


def check_token(token: str | None) -> None:
    """Refuse a damaged token, which an HTTP library would show in its own error.

    It is `token`, or else HF_TOKEN or the stored one.

    Raises:
        ModelNotFoundError: the token has characters that no token has.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it exports lazily

    authorization = build_hf_headers(token=token).get("authorization", "").removeprefix("Bearer ")
    if not (authorization.isascii() and authorization.isprintable()):
        raise ModelNotFoundError(
            "the Hub's token has characters that no token has: set HF_TOKEN, or log in, again"
        )


def prepare(ref: ModelRef) -> None:
    """Prepare a request: check the token, and limit the time.

    Raises:
        ModelNotFoundError: as `check_token`.
    """
    check_token(ref.token)
    limit_requests()


def limit_requests() -> None:
    """Give every request of huggingface_hub's session a time limit."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if limit_time not in hooks:
        hooks.append(limit_time)


def limit_time(request: Any, seconds: float | None = None) -> None:
    """Give a request a time limit; huggingface_hub's for a commit or a list of files have none.

    Args:
        request: httpx's; changed in place.
        seconds: HF_HUB_ETAG_TIMEOUT by default.
    """
    from huggingface_hub import constants

    limit = constants.HF_HUB_ETAG_TIMEOUT if seconds is None else seconds
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        kind: limit if limits.get(kind) is None else limits[kind] for kind in _WAITS
    }


def tried(started: float) -> str:
    """How long it was tried since `started`, in words; "" for at most two seconds."""
    seconds = time.monotonic() - started
    return f" (tried for {seconds:.0f} s)" if seconds > 2 else ""


def answered(error: Exception) -> HfHubHTTPError | None:
    """The Hub's answer that caused an error; None if it gave none.

    After an error of the Hub snapshot_download looks into the cache, and its own error then says
    only that the model is not there.
    """
    from huggingface_hub.errors import HfHubHTTPError

    answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
    return answer if isinstance(answer, HfHubHTTPError) else None


@contextmanager
def hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn an error of huggingface_hub into one line.

    Raises:
        ModelNotFoundError: in place of it.
    """
    from huggingface_hub import constants, errors

    started = time.monotonic()
    hint = (
        f"; a directory of that name exists here: write ./{ref.repo_id} for it"
        if Path(str(ref)).is_dir()
        else ""
    )
    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} is gated: ask for access at {constants.ENDPOINT}/{ref.repo_id}, then "
            "give --token, set HF_TOKEN or run `hf auth login`"
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} is not on the Hub, or is private and the token, if there is one, may "
            f"not read it: give --token, set HF_TOKEN or run `hf auth login`{hint}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} has no revision {shown(ref.revision)}; see its branches"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(
            f"{shown(ref)} is not a valid Hub id: {shown(error)}{hint}"
        ) from error
    except (
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
        errors.HfHubHTTPError,
    ) as error:
        answer = answered(error)
        if answer is None:
            raise ModelNotFoundError(
                f"{ref} is not (wholly) in the cache: {missing(ref)}; "
                f"{way_out(tried(started))}{hint}"
            ) from error
        status = answer.response.status_code
        advice = (
            "renew the token: --token, HF_TOKEN or `hf auth login`"
            if status == 401
            else "try again later"
        )
        raise ModelNotFoundError(
            f"the Hub answered {status} for {ref}{tried(started)}; {advice}{hint}"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelNotFoundError(
                f"the disk of the Hub's cache is full while fetching {ref}; free some space or "
                "set HF_HOME elsewhere"
            ) from error
        if error.filename is not None:  # a file of the cache: the disk failed, not the Hub
            raise ModelNotFoundError(
                f"cannot fetch {ref} into the Hub's cache: {shown(error.filename)}: "
                f"{error.strerror}; check its owner and its mode, or set HF_HOME elsewhere"
            ) from error
        raise ModelNotFoundError(
            f"cannot fetch {ref} from the Hub: {shown(error)}{hint}"
        ) from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]  # httpx's; hf_xet's
        raise ModelNotFoundError(
            f"the connection to the Hub failed for {ref}{tried(started)}: "
            f"{shown(error).rstrip('.')}; try again, or check HF_ENDPOINT{hint}"
        ) from error
    except (struct.error, ValueError) as error:
        raise ModelNotFoundError(
            f"the Hub's answer for {ref} is not valid: {shown(error)}{hint}"
        ) from error
