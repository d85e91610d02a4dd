"""The Hub as a place to write to: what is in the way, what a commit holds, and every refusal in
one line.
"""

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

# Seconds that a request may wait for an answer: a commit of many files takes the Hub minutes.
_LONGEST_WAIT = 300.0

# Answers that say "not now", and seconds between the times that something is tried again.
_PASSING = (408, 429, 500, 502, 503, 504)
_WAITS = (1.0, 3.0, 10.0)

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Target:
    """Where to push: a repo and a branch of it. `private` is asked for, and refused where the
    repo is public.
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
        """`org/name`, also behind hf:// or before @branch.

        Raises:
            UsageError: no Hub id, or a branch that git does not allow.
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
            raise UsageError(
                f"{shown(text)} is no id that a repo on the Hub can have; give org/name"
            )
        return cls(ref.repo_id, ref.revision or "main", private, token)

    @property
    def url(self) -> str:
        from huggingface_hub import constants

        tree = "" if self.branch == "main" else f"/tree/{self.branch}"
        return f"{constants.ENDPOINT}/{self.repo_id}{tree}"


@dataclass(frozen=True)
class Remote:
    """What the Hub says before a push. `head` is the branch's commit; None without a branch or a
    repo.

    `parent` is the commit that a push adds to: the head, or for a branch that is not there the one
    of main. `can_write`: whether the token may push there; None where the Hub does not say
    beforehand.
    """

    exists: bool
    private: bool | None
    head: str | None
    parent: str | None
    can_write: bool | None


# --- before a push -------------------------------------------------------------------------------


def look(target: Target) -> Remote:
    """Ask the Hub what would be in the way, before gigabytes are written, summed or sent.

    Raises:
        PushError: no token, one that may not write there, a public repo where a private one was
            asked for, no Hub.
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
        remote = patiently(lambda: _found(client(target), user, target))
    if target.private and remote.private is False:
        raise PushError(
            f"{target.repo_id} exists and is public, and --private makes no repo private; change "
            "it in its settings, or choose another name"
        )
    if remote.can_write is False:
        raise PushError(
            f"the token may not write to {target.repo_id}: it reads only, or "
            f"{shown(user.get('name', 'its owner'))} is "
            "in no organisation of that name; give one that may, with --token or HF_TOKEN"
        )
    return remote


def _user(api: HfApi) -> dict[str, Any]:
    """What /whoami-v2 says of the token; nothing where it is asked too often, as by many jobs of
    one token.
    """
    from huggingface_hub import errors

    try:
        return api.whoami()
    except errors.HfHubHTTPError as error:
        if error.response.status_code == 429:
            return {}
        raise


def _found(api: HfApi, user: Mapping[str, Any], target: Target) -> Remote:
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
    """Whether a token may make a repo in this name's space, as far as /whoami-v2 says."""
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
    """Whether a token may push to a repo that is there."""
    from huggingface_hub import errors

    try:
        api.auth_check(target.repo_id, write=True)
    except errors.HfHubHTTPError as error:  # a Hub that does not know the question says 404
        if error.response.status_code in (401, 403):
            return False
    except TypeError:  # a huggingface_hub that does not know it (1.0)
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
    """huggingface_hub's client with the target's token, whose requests end some time. One for each
    attempt: after a broken connection the library makes a new session.
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
    """The work's result, tried again where the Hub is busy or the connection broke: all of it may
    be done twice.

    huggingface_hub itself tries again what it uploads, but neither questions nor commits.
    """
    from huggingface_hub import errors

    for wait in _WAITS:
        try:
            return work()
        except (errors.HTTPError, OSError, RuntimeError) as error:  # type: ignore[attr-defined]  # httpx's
            if not _is_passing(error):
                raise
            time.sleep(wait)
    return work()


def _is_passing(error: BaseException) -> bool:
    """Whether it may be otherwise in a moment."""
    from huggingface_hub import errors

    causes = list(_causes(error))
    if (
        answer := next((e for e in causes if isinstance(e, errors.HfHubHTTPError)), None)
    ) is not None:
        return answer.response.status_code in _PASSING
    is_offline = any(isinstance(e, errors.OfflineModeIsEnabled) for e in causes)
    return not is_offline and any(isinstance(e, errors.HTTPError) for e in causes)  # type: ignore[attr-defined]


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    """An error and those that it came from: huggingface_hub wraps a thread's in one without a
    reason.
    """
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


@contextmanager
def push_errors(target: Target) -> Iterator[None]:
    """Turn huggingface_hub's errors into one line each."""
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
                f"the Hub does not take README.md: {shown(' '.join(str(error).split()))}; correct "
                "its metadata"
            )
        elif answer is not None:
            message = _answered(
                target,
                answer.response.status_code,
                answer.server_message,
                hub_errors.tried(started),
            )
        elif isinstance(error, FileNotFoundError):
            message = (
                f"{shown(error.filename)} is gone while it was pushed; let nothing write to the "
                "folder, and push again"
            )
        elif isinstance(error, errors.HFValidationError):
            message = (
                f"{shown(target.repo_id)} is no id that a repo on the Hub can have: {shown(error)}"
            )
        elif isinstance(error, (ValueError, KeyError)):
            message = (
                f"the Hub's answer for {target.repo_id} makes no sense: {shown(repr(error))}; "
                "check HF_ENDPOINT"
            )
        else:
            reason = shown(str(causes[-1] if str(causes[-1]) else error).rstrip("."))
            message = (
                "the connection to the Hub failed for "
                f"{target.repo_id}{hub_errors.tried(started)}: {reason}; check "
                "the network and HF_ENDPOINT, and run the same command again: it goes on"
            )
        raise PushError(message) from error


def _answered(target: Target, status: int, said: str | None, tried: str) -> str:
    reason = f" ({shown(' '.join(said.split()))})" if said else ""
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
    if status in _PASSING:
        return (
            f"the Hub answered {status} for {target.repo_id}{tried}{reason}; run the same command "
            "later: it goes on"
        )
    return f"the Hub answered {status} for {target.repo_id}{reason}; nothing more was pushed"
