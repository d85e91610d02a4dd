"""Options about the Hub that several commands share."""

from __future__ import annotations

from typing import Annotated

from dus_cli.common.options import Option

# The group of these options in --help.
HUB = "The Hub"

Revision = Annotated[
    str | None,
    Option(
        "Branch, tag or commit of a Hub id, the same as org/name@REV.", metavar="REV", panel=HUB
    ),
]

Token = Annotated[
    str | None,
    Option(
        "Hub access token (default: HF_TOKEN, or the stored login).", metavar="TOKEN", panel=HUB
    ),
]

Private = Annotated[
    bool, Option("Create the repo as a private one; fail if a public one exists.", panel=HUB)
]

Branch = Annotated[
    str | None,
    Option(
        "Branch to push to; created if it does not exist. Default: main.", metavar="NAME", panel=HUB
    ),
]
