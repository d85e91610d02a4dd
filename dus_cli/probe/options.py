"""What is asked of a probe."""

from __future__ import annotations

from dataclasses import dataclass

from dus_cli.data.documents import BadLine
from dus_cli.models.precision import Precision


@dataclass(frozen=True)
class Options:
    """How it is measured. `bound` is a share above the base's loss."""

    files: tuple[str, ...]
    tokens: int = 20_480
    seq_length: int | None = None
    text_field: str = "text"
    on_bad_line: BadLine = BadLine.error
    holdout: float | None = None
    precision: Precision = Precision.auto
    stream_layers: bool = False
    max_memory: int | None = None
    bound: float = 0.2
    special_tokens: bool = True
