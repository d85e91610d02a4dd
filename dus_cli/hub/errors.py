"""huggingface_hub's errors, one line each; and what holds before a request to the Hub."""

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

LIBRARY = "dus"  # who asks, in the Hub's logs

# What an HTTP client waits for, by the names in httpx's requests.
_WAITS = ("connect", "read", "write", "pool")


def check_token(token: str | None) -> None:
    """Refuse a token, given or at hand, whose text an HTTP library would show in its own error.

    Raises:
        ModelNotFoundError: the token of the environment, or the stored one, is damaged.
    """
    from huggingface_hub.utils import build_hf_headers  # type: ignore[attr-defined]  # it exports lazily

    found = build_hf_headers(token=token).get("authorization", "").removeprefix("Bearer ")
    if not (found.isascii() and found.isprintable()):
        raise ModelNotFoundError(
            "the Hub's token has characters that no token has: set HF_TOKEN, or log in, again"
        )


def prepare(ref: ModelRef) -> None:
    """Before a request: look at the token, and limit the time.

    Raises:
        ModelNotFoundError: as `check_token`.
    """
    check_token(ref.token)
    limit_requests()


def limit_requests() -> None:
    """Let no request of huggingface_hub's session wait for ever."""
    from huggingface_hub import get_session

    hooks = get_session().event_hooks["request"]
    if limit_time not in hooks:
        hooks.append(limit_time)


def limit_time(request: Any, seconds: float | None = None) -> None:
    """Let no request wait for ever, as huggingface_hub's for a commit and for a list of files
    would.
    """
    from huggingface_hub import constants

    limit = constants.HF_HUB_ETAG_TIMEOUT if seconds is None else seconds
    limits = request.extensions.get("timeout", {})
    request.extensions["timeout"] = {
        what: limit if limits.get(what) is None else limits[what] for what in _WAITS
    }


def tried(started: float) -> str:
    """How long it was tried, where that was more than a moment."""
    seconds = time.monotonic() - started
    return f" (tried for {seconds:.0f} s)" if seconds > 2 else ""


def answered(error: Exception) -> HfHubHTTPError | None:
    """The Hub's own answer behind an error; None where it gave none.

    After a bad answer snapshot_download looks into the cache, and then says only that it is not
    there.
    """
    from huggingface_hub.errors import HfHubHTTPError

    answer = error if isinstance(error, HfHubHTTPError) else error.__cause__
    return answer if isinstance(answer, HfHubHTTPError) else None


@contextmanager
def hub_errors(ref: ModelRef) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line each."""
    from huggingface_hub import constants, errors

    started = time.monotonic()
    here = (
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
            f"not read it: give --token, set HF_TOKEN or run `hf auth login`{here}"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelNotFoundError(
            f"{ref.repo_id} has no revision {shown(ref.revision)}; see its branches"
        ) from error
    except errors.HFValidationError as error:
        raise ModelNotFoundError(
            f"{shown(ref)} is not a valid Hub id: {shown(error)}{here}"
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
                f"{way_out(tried(started))}{here}"
            ) from error
        status = answer.response.status_code
        advice = (
            "renew the token: --token, HF_TOKEN or `hf auth login`"
            if status == 401
            else "try again later"
        )
        raise ModelNotFoundError(
            f"the Hub answered {status} for {ref}{tried(started)}; {advice}{here}"
        ) from error
    except OSError as error:
        if error.errno == errno.ENOSPC:
            raise ModelNotFoundError(
                f"the disk of the Hub's cache is full while fetching {ref}; free some space or "
                "set HF_HOME elsewhere"
            ) from error
        if error.filename is not None:  # of the cache: the disk's, not the Hub's
            raise ModelNotFoundError(
                f"cannot fetch {ref} into the Hub's cache: {shown(error.filename)}: "
                f"{error.strerror}; check its owner and its mode, or set HF_HOME elsewhere"
            ) from error
        raise ModelNotFoundError(
            f"cannot fetch {ref} from the Hub: {shown(error)}{here}"
        ) from error
    except (errors.HTTPError, RuntimeError) as error:  # type: ignore[attr-defined]  # httpx's; hf_xet's
        raise ModelNotFoundError(
            f"the connection to the Hub failed for {ref}{tried(started)}: "
            f"{shown(error).rstrip('.')}; try again, or check HF_ENDPOINT{here}"
        ) from error
    except (struct.error, ValueError) as error:
        raise ModelNotFoundError(
            f"the Hub's answer for {ref} makes no sense: {shown(error)}{here}"
        ) from error
