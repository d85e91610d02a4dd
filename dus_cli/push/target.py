"""The Hub as the target of a push: what would stop it, what a commit holds, errors in one line."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from dus_cli import __version__
from dus_cli.common.reference import ModelRef
from dus_cli.errors import PushError, UsageError, shown
from dus_cli.hub import errors as hub_errors
from dus_cli.hub import fetching

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

# Seconds to wait for an answer: the Hub takes minutes for a commit of many files.
_LONGEST_WAIT = 300.0

# HTTP statuses of a Hub that is busy, and the seconds to wait before each retry.
_RETRIED = (408, 429, 500, 502, 503, 504)
_WAITS = (1.0, 3.0, 10.0)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Target:
    """Where to push: a repo and its branch. With `private` the repo is created as a private one;
    an existing public one is refused.
    """

    repo_id: str
    branch: str = "main"
    private: bool = False
    token: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def parse(
        cls,
        text: str,
        *,
        branch: str | None = None,
        private: bool = False,
        token: str | None = None,
    ) -> Target:
        """Parse `org/name` or `org/name@branch`, also after hf://.

        Raises:
            UsageError: the text is not a Hub id, or git does not allow the branch.
        """
        try:
            ref = ModelRef.parse(text, revision=branch, token=token)
        except UsageError as error:
            raise UsageError(
                str(error)
                .replace("--revision", "--branch")
                .replace("names a revision", "names one")
            ) from None
        name = (ref.repo_id or "").rpartition("/")[2]
        # The Hub's own rules (huggingface_hub's validate_repo_id), before anything is written.
        if (
            ref.repo_id is None
            or re.search(r"--|\.\.|[-.]$|\.git$|\.ipynb$", name)
            or len(ref.repo_id) > 96
        ):
            raise UsageError(f"{shown(text)} is not a valid id of a repo on the Hub; give org/name")
        return cls(ref.repo_id, ref.revision or "main", private, token)

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        tree = "" if self.branch == "main" else f"/tree/{self.branch}"
        return f"{constants.ENDPOINT}/{self.repo_id}{tree}"


@dataclass(frozen=True)
class Remote:
    """The state of the target before a push.

    Attributes:
        exists: the repo exists.
        private: it is private; None if it does not exist.
        head: the branch's commit; None if there is no such branch or repo.
        parent: the commit that a push adds to: `head`, or main's if the branch does not exist.
        can_write: whether the token may push there; None if the Hub does not say.
    """

    exists: bool
    private: bool | None
    head: str | None
    parent: str | None
    can_write: bool | None


# --- before a push -------------------------------------------------------------------------------


def look(target: Target) -> Remote:
    """Check with the Hub that a push is possible, before gigabytes are written, summed or sent.

    Raises:
        PushError: there is no token, or it may not write there; the repo is public and `private`
            is set; the Hub cannot be reached.
    """
    from huggingface_hub import get_token

    fetching.silence(quiet=False)
    with push_errors(target):
        if target.token is None and get_token() is None:
            raise PushError(
                f"no token to push to {target.repo_id} with; give --token, set HF_TOKEN or run "
                "`hf auth login`"
            )
        hub_errors.check_token(target.token)
        user = patiently(lambda: _user(client(target)))
        remote = patiently(lambda: _remote(client(target), user, target))
    if target.private and remote.private is False:
        raise PushError(
            f"{target.repo_id} exists and is public, and --private is for new repos; change it in "
            "its settings, or choose another name"
        )
    if remote.can_write is False:
        raise PushError(
            f"the token may not write to {target.repo_id}: it reads only, or "
            f"{shown(user.get('name', 'its owner'))} is "
            "in no organisation of that name; give one that may, with --token or HF_TOKEN"
        )
    return remote


def _user(api: HfApi) -> dict[str, Any]:
    """The Hub's /whoami-v2 for the token; empty after a 429, as when many jobs share a token."""
    from huggingface_hub import errors

    try:
        return api.whoami()
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 429:
            return {}
        raise


def _remote(api: HfApi, user: Mapping[str, Any], target: Target) -> Remote:
    from huggingface_hub import errors

    try:
        info = api.model_info(target.repo_id)
    except errors.RepositoryNotFoundError:
        return Remote(
            exists=False, private=None, head=None, parent=None, can_write=_may_create(user, target)
        )
    head = info.sha if target.branch == "main" else _head(api, target)
    return Remote(True, info.private, head, head or info.sha, _may_write(api, user, target))


def _may_create(user: Mapping[str, Any], target: Target) -> bool | None:
    """Whether the token may create a repo under this owner; None if /whoami-v2 does not say."""
    space = target.repo_id.partition("/")[0]
    role = _role(user)
    if role == "fineGrained":
        scopes = user["auth"]["accessToken"].get("fineGrained", {}).get("scoped", [])
        owned = [s for s in scopes if s.get("entity", {}).get("name") == space]
        return (
            True if any("repo.write" in scope.get("permissions", []) for scope in owned) else None
        )
    roles = {org.get("name"): org.get("roleInOrg") for org in user.get("orgs", [])}
    is_ours = space == user.get("name") or (space in roles and roles[space] != "read")
    return None if role is None else role != "read" and is_ours


def _may_write(api: HfApi, user: Mapping[str, Any], target: Target) -> bool | None:
    """Whether the token may push to an existing repo; None if the Hub does not say."""
    from huggingface_hub import errors

    try:
        api.auth_check(target.repo_id, write=True)
    except errors.HfHubHTTPError as error:  # 404 from a Hub without this endpoint
        if error.response.status_code in (401, 403):
            return False
    except TypeError:  # huggingface_hub 1.0 has no `write`
        pass
    else:
        return True
    return False if _role(user) == "read" else None


def _role(user: Mapping[str, Any]) -> str | None:
    access = user.get("auth", {}).get("accessToken", {})
    return access.get("role") if isinstance(access, dict) else None


def _head(api: HfApi, target: Target) -> str | None:
    from huggingface_hub import errors

    try:
        return api.model_info(target.repo_id, revision=target.branch).sha
    except errors.RevisionNotFoundError:
        return None


# --- the client ----------------------------------------------------------------------------------


def client(target: Target) -> HfApi:
    """huggingface_hub's client with the target's token and a time limit for requests. Make one for
    each attempt: after a broken connection the library makes a new session.
    """
    from huggingface_hub import HfApi, get_session

    hooks = get_session().event_hooks["request"]
    hooks[:] = [hook for hook in hooks if hook not in (hub_errors.limit_time, _limit_time)] + [
        _limit_time
    ]
    return HfApi(token=target.token, library_name=hub_errors.LIBRARY, library_version=__version__)


def _limit_time(request: Any) -> None:
    hub_errors.limit_time(request, _LONGEST_WAIT)


def listed(target: Target, commit: str) -> dict[str, RepoFile]:
    """Every file of a commit, by its path."""
    from huggingface_hub.hf_api import RepoFile

    def fetched() -> dict[str, RepoFile]:
        tree = client(target).list_repo_tree(target.repo_id, recursive=True, revision=commit)
        return {entry.path: entry for entry in tree if isinstance(entry, RepoFile)}

    return patiently(fetched)


def patiently(work: Callable[[], _Result]) -> _Result:
    """Call `work` and return its result; call it again if the Hub is busy or the connection broke.

    huggingface_hub itself retries uploads, but neither queries nor commits.
    """
    from huggingface_hub import errors

    for wait in _WAITS:
        try:
            return work()
        except (errors.HTTPError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]  # httpx's
            if not _may_pass(error):
                raise
            time.sleep(wait)
    return work()


def _may_pass(error: BaseException) -> bool:
    """Whether a retry may succeed: the Hub is busy, or the connection broke."""
    from huggingface_hub import errors

    causes = list(_causes(error))
    if (
        answer := next((e for e in causes if isinstance(e, errors.HfHubHTTPError)), None)
    ) is not None:
        return answer.response.status_code in _RETRIED
    is_offline = any(isinstance(e, errors.OfflineModeIsEnabled) for e in causes)
    return not is_offline and any(isinstance(e, errors.HTTPError) for e in causes)  # type: ignore[attr-defined]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and its causes: huggingface_hub wraps a thread's error in one without a message."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def push_errors(target: Target) -> Iterator[None]:
    """Turn an error of huggingface_hub into one line.

    Raises:
        PushError: in place of it.
    """
    from huggingface_hub import errors

    started = time.monotonic()
    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:  # type: ignore[attr-defined]
        causes = list(_causes(error))
        answer = next((e for e in causes if isinstance(e, errors.HfHubHTTPError)), None)
        if any(isinstance(e, errors.OfflineModeIsEnabled) for e in causes):
            message = (
                f"HF_HUB_OFFLINE is set, and a push to {target.repo_id} needs the Hub; unset it"
            )
        elif isinstance(error, ValueError) and "metadata" in str(error):
            message = (
                f"the Hub refuses README.md: {shown(' '.join(str(error).split()))}; correct its "
                "metadata"
            )
        elif answer is not None:
            message = _status_message(
                target,
                answer.response.status_code,
                answer.server_message,
                hub_errors.tried(started),
            )
        elif isinstance(error, FileNotFoundError):
            message = (
                f"{shown(error.filename)} vanished during the push; let nothing write to the "
                "folder, and push again"
            )
        elif isinstance(error, errors.HFValidationError):
            message = (
                f"{shown(target.repo_id)} is not a valid id of a repo on the Hub: {shown(error)}"
            )
        elif isinstance(error, (ValueError, KeyError)):
            message = (
                f"the Hub's answer for {target.repo_id} is not valid: {shown(repr(error))}; "
                "check HF_ENDPOINT"
            )
        else:
            reason = shown(str(causes[-1] if str(causes[-1]) else error).rstrip("."))
            message = (
                "the connection to the Hub failed for "
                f"{target.repo_id}{hub_errors.tried(started)}: {reason}; check "
                "the network and HF_ENDPOINT, and run the same command again: it continues"
            )
        raise PushError(message) from error


def _status_message(target: Target, status: int, server_message: str | None, tried: str) -> str:
    """The message for an HTTP status, with the Hub's own message if there is one."""
    reason = f" ({shown(' '.join(server_message.split()))})" if server_message else ""
    if status == 401:
        return (
            f"the Hub does not know this token{reason}; renew it: --token, HF_TOKEN or `hf auth "
            "login`"
        )
    if status == 403:
        return (
            f"the token may not write to {target.repo_id}{reason}; give one with write permission "
            f"for {target.repo_id.partition('/')[0]}"
        )
    if status == 404:
        return (
            f"{target.repo_id} or its owner is not on the Hub, or the token may not see "
            f"it{reason}; check the name"
        )
    if status in _RETRIED:
        return (
            f"the Hub answered {status} for {target.repo_id}{tried}{reason}; run the same command "
            "later: it continues"
        )
    return f"the Hub answered {status} for {target.repo_id}{reason}; nothing more was pushed"
