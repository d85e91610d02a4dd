"""Compare a deeper model's logits with those of its base's layers in the map's order; the tables of
docs/architectures.md.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import zoo
from tiny import forked_dus as dus

from dus_cli.maps.layers import source_layers

TRIM = 2  # of seven layers: the shift is 3, out of step with patterns of 2, 4, 5 and 6


DOCS = Path(__file__).parent.parent / "docs" / "architectures.md"


def save_base(model_type: str, folder: Path, *, whole: bool = False) -> Path:
    """Save a tiny model of this type with transformers."""
    zoo.tiny_model(model_type, whole=whole).save_pretrained(folder / "base")
    return folder / "base"


@dataclass
class Base:
    """A tiny base in a folder, and as transformers loads it."""

    model_type: str
    folder: Path
    model: Any
    whole: bool

    @classmethod
    def load(cls, model_type: str, folder: Path, *, whole: bool = False) -> Base:
        model, complaints = zoo.load(model_type, folder, whole=whole)
        assert complaints == {}
        return cls(model_type, folder, model, whole)

    def load_written(self, folder: Path) -> Any:
        """The model that was made of this base."""
        model, complaints = zoo.load(self.model_type, folder, whole=self.whole)
        assert complaints == {}
        return model


def check_equality(base: Base, out: Path, trim: int = TRIM) -> tuple[dict[str, Any], Any]:
    """Up-scale the base with the real command, and check that the logits are those of its layers in
    the map's order. Returns the report and the written model.
    """
    report = dus("upscale", base.folder, "-t", str(trim), "-o", out, "--json").report
    written = base.load_written(out)
    tokens = zoo.tokens(base.model)
    expected = zoo.expected_logits(base.model, source_layers(zoo.NUM_LAYERS, trim), tokens)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(zoo.logits(written, tokens), expected, rtol=1e-5, atol=1e-5)
    # the comparison can fail
    assert not torch.allclose(expected, zoo.logits(base.model, tokens), atol=1e-4)
    return report, written


def check_identities(base: Base, out: Path) -> None:
    """Deepen the base by identities with the real command, and check that the logits are the base's
    to the last bit, and that zeros can learn.
    """
    report = dus("upscale", base.folder, "-t", str(TRIM), "--identity", "-o", out, "--json").report
    assert report["new_layers"] == [5, 6, 7]
    written, tokens = base.load_written(out), zoo.tokens(base.model)
    assert torch.equal(zoo.logits(written, tokens), zoo.logits(base.model, tokens))
    layer_map, new_layers = report["layer_map"], report["new_layers"]
    assert zoo.zeros_without_gradient(written, base.model, tokens, layer_map, new_layers) == []


def check_fade(base: Base, out: Path, report: dict[str, Any]) -> None:
    """Check that what each layer of a model that was written with `--start fade` adds to the
    residual stream is scaled by the report's factors.
    """
    written, tokens = base.load_written(out), zoo.tokens(base.model)
    sources, factors = report["layer_map"], report["scaled"]["factors"]
    expected = zoo.expected_logits(base.model, sources, tokens, factors)
    torch.testing.assert_close(zoo.logits(written, tokens), expected, rtol=1e-4, atol=2e-4)
    # the comparison can fail
    assert not torch.allclose(expected, zoo.expected_logits(base.model, sources, tokens), atol=1e-2)


def check_table(name: str, rows: list[str]) -> None:
    """Check that the docs' table between comments of this name has these rows; with
    DUS_WRITE_TABLE, write it.
    """
    before, start, rest = DOCS.read_text().partition(f"<!-- {name} -->\n")
    _, end, after = rest.partition(f"<!-- end of {name} -->")
    table = "\n".join(["| model type | outcome | told apart by |", "|---|---|---|", *rows])
    text = f"{before}{start}\n{table}\n\n{end}{after}"
    if os.environ.get("DUS_WRITE_TABLE"):
        DOCS.write_text(text)
    assert DOCS.read_text() == text


def without_engines(report: dict[str, Any]) -> list[str]:
    """The report's warnings without those about inference engines. Checks that there are such
    warnings if, and only if, an engine differs.
    """
    does = ("would compute another model in silence", "would not load it")
    about_engines = [
        warning for warning in report["warnings"] if any(words in warning for words in does)
    ]
    wrong = [one for one in report["engines"] if one["verdict"] in ("differs", "refuses")]
    assert bool(about_engines) == bool(wrong), report
    return [warning for warning in report["warnings"] if warning not in about_engines]
