"""What is asked of `dus eval`. Pure: `dus eval --help` imports no more than this."""

from __future__ import annotations

from dataclasses import dataclass

from dus_cli.data.documents import BadLine
from dus_cli.models.precision import Precision


@dataclass(frozen=True)
class TextOptions:
    """The text, as it was typed, and how much of it is read."""

    data: tuple[str, ...]
    text_field: str = "text"
    on_bad_line: BadLine = BadLine.error
    max_documents: int | None = None
    max_tokens: int | None = None


@dataclass(frozen=True)
class ScoringOptions:
    """How text is cut and run. None stands for what fits the models and the device."""

    seq_length: int | None = None
    stride: int | None = None
    batch_tokens: int | None = None
    precision: Precision = Precision.auto
    device: str = "auto"
    special_tokens: bool = True
