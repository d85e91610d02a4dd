"""What is asked of `dus verify`, with its options."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.common.reference import model_text
from dus_cli.hub.options import Token
from dus_cli.maps.options import engines_option
from dus_cli.writing.transfer import DEFAULT_JOBS


@dataclass(frozen=True, kw_only=True)
class VerifyOptions:
    """What a checkpoint is held against, and how its bytes are read.

    Attributes:
        base: also compare every tensor with this base, a Hub id or a directory.
        engines: names of inference engines: what one of them would not compute as config.json says
            is a problem.
        token: Hub access token, for the base; HF_TOKEN or the stored login by default.
        jobs: parallel reads, 1 to 64.
        read: read also what lies in the same blocks of the disk and cannot differ: for a disk that
            is not trusted.
        forward: also run the model beside the base's layers, with transformers; it needs `base`.
        data: files of text for `forward`, as heal takes them; a short text of dus's own by default.
    """

    base: Annotated[
        str | None,
        Option(
            "Also compare every tensor with this base (directory or Hub id).",
            metavar="MODEL",
            parse=model_text,
        ),
    ] = None
    engines: Annotated[
        tuple[str, ...],
        engines_option(
            "Also say whether inference engines compute what config.json says, whoever made OUT."
        ),
    ] = ()
    token: Token = None
    jobs: Annotated[int, Option("Number of parallel reads.", metavar="J")] = DEFAULT_JOBS
    read: Annotated[
        bool,
        Option(
            "Read every byte, also where both files share blocks of the disk (reflinks) and so "
            "cannot differ."
        ),
    ] = False
    forward: Annotated[
        bool,
        Option(
            "Also run OUT and the layers of --base side by side, on tokens, in transformers: "
            "whether each computes the same, of any architecture. One layer at a time is in memory."
        ),
    ] = False
    data: Annotated[
        tuple[str, ...],
        Option(
            "Text for --forward, as dus heal takes it. Default: a short text. Repeat for more.",
            metavar="FILE",
        ),
    ] = ()
