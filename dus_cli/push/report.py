"""The report of a push, as JSON and as text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dus_cli import __version__
from dus_cli.common.reports import SCHEMA
from dus_cli.common.units import counted, human_bytes
from dus_cli.errors import shown_list
from dus_cli.push.target import Remote, Target


@dataclass(frozen=True)
class PushReport:
    """The result of a push, or of its dry run.

    Attributes:
        target: the repo and branch.
        status: "pushed", "planned" (a dry run), or "unchanged" (the branch already held every
            file).
        remote: what the Hub held before.
        num_files: files of the output that are pushed.
        num_bytes: their bytes.
        commit: the branch's commit afterwards; None for a dry run.
        uploaded: how many files the branch did not hold; None for a dry run.
        removed: files of an earlier model that were removed.
        left_out: files in the directory that are not pushed.
        warnings: what huggingface_hub warned of.
        seconds: time of the push.
    """

    target: Target
    status: Literal["pushed", "planned", "unchanged"]
    remote: Remote
    num_files: int
    num_bytes: int
    commit: str | None = None
    uploaded: int | None = None
    removed: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    warnings: tuple[str, ...] = ()
    seconds: float = 0.0

    def to_json(self) -> dict[str, Any]:
        """The object `push` of the reports; docs/layout.md describes each field."""
        return {
            "repo_id": self.target.repo_id,
            "branch": self.target.branch,
            "url": self.target.url,
            "commit": self.commit,
            "status": self.status,
            "exists": self.remote.exists,
            "private": self.remote.private if self.remote.exists else self.target.private,
            "can_write": self.remote.can_write,
            "files": self.num_files,
            "bytes": self.num_bytes,
            "uploaded": self.uploaded,
            "removed": list(self.removed),
            "left_out": list(self.left_out),
            "compared": self.status != "planned",
            "seconds": round(self.seconds, 3),
            "warnings": list(self.warnings),
        }


def push_text(report: PushReport) -> str:
    """What was pushed, or would be, for a person."""
    target, remote = report.target, report.remote
    files = f"{counted(report.num_files, 'file')}, {human_bytes(report.num_bytes)}"
    not_pushed = (
        f"; not pushed, not dus's: {shown_list(report.left_out)}" if report.left_out else ""
    )
    if report.status == "planned":
        kind = "private " if (remote.private if remote.exists else target.private) else ""
        repo = f"the {kind}repo exists" if remote.exists else f"the {kind}repo would be created"
        branch = f", branch {target.branch}{'' if remote.head else ' would be created'}" * (
            target.branch != "main"
        )
        token = (
            "the token may write"
            if remote.can_write
            else "the push will show whether the token may write"
        )
        return f"{target.url}: {files}; {repo}{branch}; {token}{not_pushed}"
    commit = (report.commit or "")[:12]
    if report.status == "unchanged":
        these = "this" if report.num_files == 1 else "these"
        return f"{target.url} already holds {these} {files}, at commit {commit}{not_pushed}"
    removed = f"; {len(report.removed)} of an earlier model removed" if report.removed else ""
    return (
        f"{target.url} holds {files}, at commit {commit}, each compared with what was "
        f"verified{removed}{not_pushed}"
    )


def folder_push_json(output: Path, report: PushReport) -> dict[str, Any]:
    """The report of `dus push --json`; docs/layout.md describes each field."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": str(output),
        "push": report.to_json(),
    }
