"""The report of a push, as text and JSON."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from dus_cli import __version__
from dus_cli.common.reports import SCHEMA
from dus_cli.common.units import human_bytes
from dus_cli.errors import shown_list
from dus_cli.push.target import Remote, Target


@dataclass(frozen=True)
class PushReport:
    """The result of a push, or of its dry run.

    `status` is "pushed", "planned", or "unchanged": the branch already held every file. `removed`
    are files of an earlier model. `uploaded` counts the files that the branch did not hold.
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
    what = f"{report.num_files} files, {human_bytes(report.num_bytes)}"
    here = f"; not dus's, and left here: {shown_list(report.left_out)}" if report.left_out else ""
    if report.status == "planned":
        kind = "private " if (remote.private if remote.exists else target.private) else ""
        repo = f"the {kind}repo is there" if remote.exists else f"the {kind}repo would be created"
        branch = f", branch {target.branch}{'' if remote.head else ' would be created'}" * (
            target.branch != "main"
        )
        token = (
            "the token may write"
            if remote.can_write
            else "whether the token may write shows when it is tried"
        )
        return f"{target.url}: {what}; {repo}{branch}; {token}{here}"
    commit = (report.commit or "")[:12]
    if report.status == "unchanged":
        return f"{target.url} already holds these {what}, at commit {commit}{here}"
    removed = f"; {len(report.removed)} of an earlier model removed" if report.removed else ""
    return (
        f"{target.url} holds {what}, at commit {commit}, each compared with what was "
        f"verified{removed}{here}"
    )


def folder_push_json(output: Path, report: PushReport) -> dict[str, Any]:
    """The report of `dus push --json`; docs/layout.md describes each field."""
    return {
        "schema": SCHEMA,
        "version": __version__,
        "model": str(output),
        "push": report.to_json(),
    }
