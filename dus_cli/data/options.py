"""The options about text that several commands share."""

from __future__ import annotations

from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.data.documents import BadLine

# The formats that --data reads, for its help.
DATA_KINDS = ".jsonl, .json, .csv and .txt (also .gz, .zst, .xz, .bz2), .parquet, .arrow"

# The panel of --help that lists these options.
DATA = "Data"

TextField = Annotated[str, Option("The field or column with the text.", metavar="NAME", panel=DATA)]

OnBadLine = Annotated[
    BadLine,
    Option("Stop at a line without text (error), or skip and count it (skip).", panel=DATA),
]

UseSpecialTokens = Annotated[
    bool,
    Option(
        "Begin each document with the tokens that the model's tokenizer puts before a text (<s>).",
        panel=DATA,
    ),
]
