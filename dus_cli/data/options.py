"""Options about text that several commands have, by the names that they have everywhere."""

from __future__ import annotations

from typing import Annotated

from dus_cli.common.options import Option
from dus_cli.data.documents import BadLine

# What --data reads, for its help.
DATA_KINDS = ".jsonl, .json, .csv and .txt (also .gz, .zst, .xz, .bz2), .parquet, .arrow"

# The group in which --help lists them.
DATA = "Data"

TextField = Annotated[str, Option("The field or column with the text.", metavar="NAME", panel=DATA)]

OnBadLine = Annotated[
    BadLine, Option("Stop at a line without text, or skip and count it.", panel=DATA)
]

# How a document begins.
SpecialTokens = Annotated[
    bool,
    Option(
        "A document begins with what the model's tokenizer puts before a text (<s>), or with the "
        "text itself.",
        panel=DATA,
    ),
]
