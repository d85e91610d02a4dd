"""The options of `dus verify`."""

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
    """What a checkpoint is compared with, and how its bytes are read.

    Attributes:
        base: also compare every tensor with this base, a Hub id or a directory.
        engines: names of inference engines; it is a problem if one of them would not compute what
            config.json says.
        token: Hub access token, for the base; HF_TOKEN or the stored login by default.
        jobs: parallel reads, 1 to 64.
        read: also read bytes in shared blocks of the disk, which cannot differ; for a disk that is
            not trusted.
        forward: also run the model and the base's layers with transformers; it needs `base`.
        data: files of text for `forward`, as heal takes them; a built-in text by default.
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
            "Also check that inference engines compute what config.json says; OUT may be any "
            "checkpoint."
        ),
    ] = ()
    token: Token = None
    jobs: Annotated[int, Option("Number of parallel reads.", metavar="J")] = DEFAULT_JOBS
    read: Annotated[
        bool,
        Option(
            "Read every byte, even of files that share blocks of the disk (reflinks) and so cannot "
            "differ."
        ),
    ] = False
    forward: Annotated[
        bool,
        Option(
            "Also run OUT and the layers of --base on tokens, with transformers, and check that "
            "they compute the same; for any architecture. One layer at a time is in memory."
        ),
    ] = False
    data: Annotated[
        tuple[str, ...],
        Option(
            "Text for --forward, as dus heal takes it. Default: a built-in text. Repeat for more.",
            metavar="FILE",
        ),
    ] = ()
