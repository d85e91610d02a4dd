"""Compare a deeper model's logits with those of its base's layers in the map's order; the tables of
docs/architectures.md.
"""

from __future__ import annotations

import os
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


def check_equality(
    model_type: str, folder: Path, trim: int = TRIM, *, whole: bool = False
) -> dict[str, Any]:
    """Up-scale folder/base with the real command, and check that the logits are those of the base's
    layers in the map's order. Returns the report.
    """
    report = dus("upscale", folder / "base", "-t", str(trim), "-o", folder / "out", "--json").report
    base, complaints = zoo.load(model_type, folder / "base", whole=whole)
    assert complaints == {}
    written, complaints = zoo.load(model_type, folder / "out", whole=whole)
    assert complaints == {}
    tokens = zoo.tokens(base)
    expected = zoo.expected_logits(base, source_layers(zoo.NUM_LAYERS, trim), tokens)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(zoo.logits(written, tokens), expected, rtol=1e-5, atol=1e-5)
    # the comparison can fail
    assert not torch.allclose(expected, zoo.logits(base, tokens), atol=1e-4)
    return report


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
