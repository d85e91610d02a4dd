"""What is asked of `dus push`, with its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.hub.options import Branch, Private, Token
from dus_cli.writing.transfer import DEFAULT_JOBS


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """To which kind of repo and which branch, with whose token, and by how many parallel reads."""

    private: Private = False
    branch: Branch = None
    token: Token = None
    jobs: Annotated[int, Option("Number of parallel reads.", metavar="J")] = DEFAULT_JOBS
