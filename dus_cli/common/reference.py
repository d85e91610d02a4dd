"""`ModelRef`: a directory, or `org/name@revision` on the Hub."""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import unquote

from dus_cli.errors import ModelNotFoundError, UsageError, encodable, shown

_NAME = r"[A-Za-z0-9][\w.-]*"
_HUB_ID = re.compile(rf"(?P<repo>{_NAME}/{_NAME})(?:@(?P<revision>[\w./+%-]+))?", re.ASCII)

# huggingface_hub's URIs (utils/_hf_uris.py); of their types only models matter here.
_URI, _URI_OF_A_MODEL = "hf://", "models/"

# What no branch, tag or commit has in its name (git-check-ref-format(1)). The name becomes a path
# in the Hub's cache.
_NO_REVISION = re.compile(r"[\0-\x20\x7f~^:?*\[\\]|\.\.|//|@\{|^[/-]|[/.]$|^$")


def user_path(text: str | Path) -> Path:
    """A typed path, with `~` and `~name` expanded: a shell does not expand them in --output=~/out.

    Raises:
        UsageError: the text cannot be a path, or there is no such user.
    """
    if not str(text) or "\0" in str(text):
        raise UsageError(f"{shown(str(text))!r} is no path; give one, or ./ for this folder")
    try:
        return Path(text).expanduser()
    except RuntimeError:
        raise UsageError(
            f"{shown(text)}: there is no such user; write ./{shown(text)} for a name with ~"
        ) from None


def model_text(model: str | Path) -> str:
    """The text that a user would type for a model. A relative path gets "./", so that it is not
    read as a Hub id.
    """
    return str(model) if isinstance(model, str) or model.is_absolute() else f"./{model}"


@dataclass(frozen=True)
class ModelRef:
    """Where a model is: exactly one of `path` and `repo_id` is set.

    `text` is what the user typed, with bytes that are not UTF-8 as escapes; reports and lineage
    repeat it. `token` is the Hub access token for this model, which is never printed; without one
    huggingface_hub uses HF_TOKEN or the stored login.
    """

    text: str
    path: Path | None = None
    repo_id: str | None = None
    revision: str | None = None
    token: str | None = field(default=None, repr=False, compare=False)

    @classmethod
    def parse(cls, text: str, *, revision: str | None = None, token: str | None = None) -> ModelRef:
        """Tell a Hub id from a directory by its form alone, so that a command means the same on
        every machine.

        `org/name`, `org/name@revision` and either of them after `hf://` are Hub ids, even if a
        directory of that name exists: write `./org/name` for the directory. Everything else is a
        directory.

        >>> ModelRef.parse("mistralai/Mistral-7B-v0.1@main").revision
        'main'
        >>> ModelRef.parse("hf://mistralai/Mistral-7B-v0.1", revision="main").repo_id
        'mistralai/Mistral-7B-v0.1'
        >>> ModelRef.parse("./models/base").repo_id is None
        True

        Args:
            text: what the user typed.
            revision: branch, tag or commit, if `text` has none.
            token: Hub access token.

        Raises:
            ModelNotFoundError: the text is empty, cannot be a path, or is another kind of address.
            UsageError: a directory has a revision, or a Hub id has two or one that git does not
                allow; the token has characters that no token has.
        """
        if token is not None and re.fullmatch(r"[!-~]+", token) is None:
            raise UsageError(
                "--token is empty or holds characters that no token has; it is not shown here"
            )
        id_text = (
            text.removeprefix(_URI).removeprefix(_URI_OF_A_MODEL) if text.startswith(_URI) else text
        )
        match = _HUB_ID.fullmatch(id_text)
        if match is not None:
            own_revision = match["revision"]
            if own_revision is not None and revision is not None:
                raise UsageError(
                    f"--revision {shown(revision)}: {shown(text)} names a revision already; give "
                    "one"
                )
            revision = unquote(own_revision) if own_revision is not None else revision
            if revision is not None and _NO_REVISION.search(revision):
                raise UsageError(
                    f"{shown(revision)!r} cannot be a revision; give a branch, a tag or a commit"
                )
            return cls(text, repo_id=match["repo"], revision=revision, token=token)
        if "://" in text:
            raise ModelNotFoundError(
                f"{shown(text)} is no address of a model; give hf://org/name, "
                "hf://org/name@revision or org/name"
            )
        if not text or "\0" in text:
            raise ModelNotFoundError(
                f"MODEL is {shown(text)!r}; give a directory or a Hub id such as org/name"
            )
        if revision is not None:
            raise UsageError(
                f"--revision is for a Hub id such as org/name, and {shown(text)} is a directory"
            )
        return cls(encodable(text), path=user_path(text))

    @property
    def name(self) -> str:
        """The model's name without owner or folders, such as Mistral-7B-v0.1."""
        if self.repo_id is not None:
            return self.repo_id.split("/")[1]
        assert self.path is not None
        return encodable(self.path.resolve().name)

    def __str__(self) -> str:
        """For messages: a directory as typed, org/name or org/name@revision."""
        if self.repo_id is None:
            return self.text
        return self.repo_id if self.revision is None else f"{self.repo_id}@{self.revision}"
