"""The options of `dus push`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.hub.options import Branch, Private, Token
from dus_cli.writing.transfer import DEFAULT_JOBS


@dataclass(frozen=True, kw_only=True)
class PushOptions:
    """How an output is pushed.

    Attributes:
        private: create the repo as a private one.
        branch: branch to push to; created if it does not exist, main by default.
        token: Hub access token; HF_TOKEN or the stored login by default.
        jobs: parallel reads, 1 to 64.
    """

    private: Private = False
    branch: Branch = None
    token: Token = None
    jobs: Annotated[int, Option("Number of parallel reads.", metavar="J")] = DEFAULT_JOBS
