"""How sure it is that a loss came down to the base's: the interval over documents, in words."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from dus_cli.common.units import counted
from dus_cli.evaluation.intervals import LEVEL


def difference_text(interval: Sequence[float], digits: int = 4) -> str:
    """A difference to the base's loss, from its interval.

    >>> difference_text((-0.015, 0.005))
    '-0.0050 ± 0.0100'
    """
    low, high = interval
    return f"{(low + high) / 2:+.{digits}f} ± {(high - low) / 2:.{digits}f}"


def confidence_text(report: dict[str, Any]) -> str | None:
    """The difference at the end of a run with its interval; None if it is unknown."""
    interval = report.get("difference_interval")
    if interval is None:
        return None
    return f"{difference_text(interval)} to the base, {LEVEL:.0%} interval, paired by document"


def doubt(report: dict[str, Any]) -> str | None:
    """Why it may be chance that the base's loss was reached; None if it was not reached, or is
    sure.
    """
    if not report["reached_base"] or "difference_interval" not in report:  # of an older dus
        return None
    interval = report["difference_interval"]
    if interval is None:
        return "the base's loss is reached, but a single held-out document has no interval"
    if interval[1] <= 0:
        return None
    first = report.get("heldout_sets", [{"documents": report["heldout_documents"]}])[0]
    return (
        f"the base's loss is reached, but not with {LEVEL:.0%} confidence: the difference is "
        f"{difference_text(interval)} over {counted(first['documents'], 'held-out document')}"
    )
