"""What a verification found."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dus_cli import __version__
from dus_cli.common.reports import SCHEMA
from dus_cli.common.units import human_bytes


@dataclass
class Finding:
    """What one check found."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bytes_compared: int = 0
    bytes_shared: int = 0
    files_summed: int = 0
    engines: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Verification:
    """What `dus verify` found, a line for each of `problems` and `warnings`. As text it is the
    summary for a person.
    """

    model: str
    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    num_tensors: int = 0
    num_parameters: int = 0
    num_layers: int | None = None
    bytes_compared: int = 0
    bytes_shared: int = 0
    files_summed: int = 0
    engines: list[dict[str, Any]] = field(default_factory=list)

    @property
    def is_sound(self) -> bool:
        return not self.problems

    def to_json(self) -> dict[str, Any]:
        """The report of `--json`; docs/layout.md describes each field."""
        return {
            "schema": SCHEMA,
            "version": __version__,
            "model": self.model,
            "sound": self.is_sound,
            "num_layers": self.num_layers,
            "tensors": self.num_tensors,
            "parameters": self.num_parameters,
            "bytes_compared": self.bytes_compared,
            "bytes_shared": self.bytes_shared,
            "files_summed": self.files_summed,
            "engines": self.engines,
            "problems": self.problems,
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        lines = [f"problem: {problem}" for problem in self.problems]
        lines += [f"warning: {warning}" for warning in self.warnings]
        layers = "" if self.num_layers is None else f"{self.num_layers} layers, "
        compared = f"{human_bytes(self.bytes_compared)} compared byte by byte"
        if self.bytes_shared:
            compared += (
                f", of which {human_bytes(self.bytes_shared)} are the same blocks on the disk"
            )
        sums = f", {self.files_summed} checksums" if self.files_summed else ""
        count = len(self.problems)
        verdict = "sound" if self.is_sound else f"{count} problem{'s' * (count != 1)}"
        lines.append(
            f"{self.model}: {verdict} ({layers}{self.num_tensors:,} tensors, {compared}{sums})"
        )
        return "\n".join(lines)
