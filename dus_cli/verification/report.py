"""The result of a verification, as JSON and as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from dus_cli import __version__
from dus_cli.common.reports import SCHEMA
from dus_cli.common.units import counted, human_bytes


@dataclass(frozen=True)
class Forward:
    """The result of running an output and its base's layers (`verification.forward`).

    Attributes:
        tokens: number of tokens.
        layers: number of the output's layers that ran.
        is_exact: every layer, and the logits, equal the base's to the bit.
        num_apart: number of layers that differ by more than rounding.
        first: the first such layer, as (output layer, base layer); None if there is none.
        difference: the largest difference of the hidden states after that layer.
        added: the largest number that it should add to them.
        ends: the parts before and after the layers that differ, in words.
        logits: the largest difference of the logits of the last positions.
        wider: an attention window that is not narrower than these tokens, if layers differ in
            kind; else None.
    """

    tokens: int
    layers: int
    is_exact: bool
    num_apart: int
    first: tuple[int, int] | None
    difference: float
    added: float
    ends: tuple[str, ...]
    logits: float
    wider: int | None = None

    @property
    def warnings(self) -> list[str]:
        if self.wider is None:
            return []
        warning = (
            f"--forward ran {self.tokens} tokens, no more than the attention window of "
            f"{self.wider}: only a longer text shows which layers have it"
        )
        return [warning]

    @property
    def problems(self) -> list[str]:
        problems = [
            f"--forward: {part} computes something else than in the base; the logits differ by "
            f"up to {self.logits:.2g}"
            for part in self.ends
        ]
        if self.first is not None:
            output, source = self.first
            num_others = self.num_apart - 1
            differ = "differs" if num_others == 1 else "differ"
            others = f", and {counted(num_others, 'more layer')} {differ}" if num_others else ""
            problems.append(
                f"--forward: layer {output} does not compute what the base's layer {source} does: "
                f"the hidden states differ by up to {self.difference:.2g}, and it should add up "
                f"to {self.added:.2g}{others}; the logits differ by up to {self.logits:.2g}"
            )
        return problems

    def to_json(self) -> dict[str, Any]:
        first = self.first
        return {
            "tokens": self.tokens,
            "layers": self.layers,
            "exact": self.is_exact,
            "layers_apart": self.num_apart,
            "first_apart": None if first is None else {"output": first[0], "base": first[1]},
            "difference": self.difference,
            "added": self.added,
            "logits": self.logits,
        }

    def __str__(self) -> str:
        precision = "to the bit" if self.is_exact else f"to rounding, logits to {self.logits:.1g}"
        return (
            f"{self.layers} layers compute what the base's do, {precision}, on {self.tokens} tokens"
        )


@dataclass
class Finding:
    """The result of one check."""

    problems: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)
    bytes_compared: int = 0
    bytes_shared: int = 0
    files_summed: int = 0
    engines: list[dict[str, Any]] = field(default_factory=list)
    forward: Forward | None = None


@dataclass
class Verification:
    """The result of `dus verify`; `str` gives the summary for a person.

    Attributes:
        model: the directory, as given.
        problems: one line each; the checkpoint is sound if there are none.
        warnings: one line each.
        num_tensors: number of tensors that could be read.
        num_parameters: their number of elements.
        num_layers: the config's number of layers; None if it cannot be read.
        bytes_compared: bytes that were compared with the base or with copies.
        bytes_shared: bytes of these that are in shared blocks of the disk and were not read.
        files_summed: number of files whose SHA-256 was compared.
        engines: what each engine of --for computes, as in `--json`.
        forward: the result of --forward, or None.
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
    forward: Forward | None = None

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
            "forward": None if self.forward is None else self.forward.to_json(),
            "problems": self.problems,
            "warnings": self.warnings,
        }

    def __str__(self) -> str:
        lines = [f"problem: {problem}" for problem in self.problems]
        lines += [f"warning: {warning}" for warning in self.warnings]
        if self.forward is not None and not self.forward.problems:
            lines.append(f"forward: {self.forward}")
        layers = "" if self.num_layers is None else f"{counted(self.num_layers, 'layer')}, "
        tensors = counted(self.num_tensors, "tensor")
        compared = f"{human_bytes(self.bytes_compared)} compared byte by byte"
        if self.bytes_shared:
            compared += (
                f", of which {human_bytes(self.bytes_shared)} are the same blocks on the disk"
            )
        sums = f", {counted(self.files_summed, 'checksum')}" if self.files_summed else ""
        verdict = "sound" if self.is_sound else counted(len(self.problems), "problem")
        lines.append(f"{self.model}: {verdict} ({layers}{tensors}, {compared}{sums})")
        return "\n".join(lines)
