"""The options of `dus probe`. Pure: `dus probe --help` imports no torch."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.common.units import parse_count, parse_share, parse_size, share_text
from dus_cli.data.documents import BadLine
from dus_cli.data.holdout import parse_holdout
from dus_cli.data.options import DATA, DATA_KINDS, OnBadLine, TextField, UseSpecialTokens
from dus_cli.maps.options import Assume, check_double, check_map, engines_option
from dus_cli.maps.starts import STARTS, StartRule
from dus_cli.models.precision import Precision, precision_option

_MAPS, _FIT = "Maps", "Memory and speed"


def parse_trims(text: str) -> tuple[int, int | None]:
    """Read a half-open range of trims, as in --layers: the first, and the end or None.

    >>> parse_trims("4:12"), parse_trims("7"), parse_trims("4:")
    ((4, 12), (7, 8), (4, None))

    Raises:
        ValueError: not of the form M or FIRST:END, or empty.
    """
    match = re.fullmatch(r"(\d{1,6})?(:)?(\d{1,6})?", text.strip(), re.ASCII)
    if match and any(match.groups()):
        first = int(match[1] or 0)
        end = (int(match[3]) if match[3] else None) if match[2] else first + 1
        if end is None or first < end:
            return first, end
    raise ValueError(
        f"{text!r} is no range of trims; write 4:12 for 4 to 11, 4: for all from 4 on, or 7"
    )


def parse_starts(text: str) -> tuple[StartRule, ...]:
    """Read names of starts, separated by commas.

    >>> [str(start) for start in parse_starts("half,fade:cosine")]
    ['half', 'fade:cosine']

    Raises:
        ValueError: there is none of one of these names.
    """
    return tuple(StartRule.parse(name) for name in text.split(","))


@dataclass(frozen=True, kw_only=True)
class ProbeOptions:
    """Which text is read, which maps are measured, and how.

    Attributes:
        holdout: read only the documents that a healing with this share would hold out; None is all.
        trims: the first, and the end or None; None is all trims, unless there are `layers`.
        starts: each map is measured with each of them; () is as copies, and nothing said of it.
        best: how many maps a search measures; with starts, for each start and in each round.
        engines: those that what is recommended must be right for.
        within: a share above the base's loss.
        max_memory: in bytes.
    """

    data: Annotated[
        tuple[str, ...],
        Option(
            f"Text that the model was not trained on, as dus heal takes it: {DATA_KINDS}; files, "
            "globs, folders, - for standard input; FILE:0.7 weighs a mixture. Repeat for more.",
            metavar="FILE",
            panel=DATA,
        ),
    ]
    tokens: Annotated[
        int,
        Option(
            "Read at most this many tokens of the data.",
            metavar="N",
            panel=DATA,
            parse=parse_count,
        ),
    ] = 20_480
    seq_length: Annotated[
        int | None,
        Option(
            "Tokens in a row. Default: 512, or the model's context length if that is less.",
            metavar="T",
            panel=DATA,
        ),
    ] = None
    text_field: TextField = "text"
    on_bad_line: OnBadLine = BadLine.error
    special_tokens: UseSpecialTokens = True
    holdout: Annotated[
        float | None,
        Option(
            "Read only documents that dus heal --holdout SHARE holds out of this data. Default: "
            "all.",
            metavar="SHARE",
            panel=DATA,
            parse=parse_holdout,
        ),
    ] = None
    trims: Annotated[
        tuple[int, int | None] | None,
        Option(
            "Trims to measure, half-open: 4:12 is 4 to 11. Default: all, unless there are "
            "--layers.",
            metavar="FIRST:END",
            panel=_MAPS,
            parse=parse_trims,
            once="give one range",
        ),
    ] = None
    layers: Annotated[
        tuple[str, ...],
        Option(
            "Any other map, as dus upscale takes it: 0:28,12:32. Repeat for more.",
            metavar="MAP",
            panel=_MAPS,
            parse=check_map,
        ),
    ] = ()
    double: Annotated[
        tuple[str, ...],
        Option(
            "Layers that stand twice in a row, as dus upscale takes them: 2:29, or 2:9,11:29. "
            "Repeat for more.",
            metavar="A:B",
            panel=_MAPS,
            parse=check_double,
        ),
    ] = ()
    copies: Annotated[int, Option("Copies to stack for each trim.", metavar="K", panel=_MAPS)] = 2
    starts: Annotated[
        tuple[StartRule, ...],
        Option(
            f"How new layers begin, as dus upscale takes it: {', '.join(STARTS)}. Each map is "
            "measured with each of them.",
            name="start",
            metavar="START",
            panel=_MAPS,
            parse=parse_starts,
            splits=True,
        ),
    ] = ()
    search: Annotated[
        bool,
        Option(
            "Look beyond symmetric trims, [0,a)+[b,n) for all a, b: by distance first, the best "
            "by loss. With --start also over stretches to double and several seams, once each "
            "layer was doubled alone.",
            panel=_MAPS,
        ),
    ] = False
    best: Annotated[
        int,
        Option(
            "How many maps of a search to measure; with --start, for each start in each round.",
            metavar="K",
            panel=_MAPS,
        ),
    ] = 10
    engines: Annotated[
        tuple[str, ...],
        engines_option("Recommend only what inference engines compute as config.json says.", _MAPS),
    ] = ()
    assume: Assume = ()
    within: Annotated[
        float,
        Option(
            "Recommend the largest model whose loss is at most this much above the base's.",
            metavar="SHARE",
            parse=parse_share,
            show=share_text,
        ),
    ] = 0.2
    precision: Annotated[Precision, precision_option(_FIT)] = Precision.auto
    stream_layers: Annotated[
        bool,
        Option(
            "Read each layer from disk when its turn comes: memory for one layer, not for the "
            "model.",
            panel=_FIT,
        ),
    ] = False
    max_memory: Annotated[
        int | None,
        Option(
            "Memory to use (8GB); rows that do not fit go through the layers later. Default: 85% "
            "of what is free.",
            metavar="SIZE",
            panel=_FIT,
            parse=parse_size,
        ),
    ] = None
