"""The scores of tasks of a healed model, in words."""

from __future__ import annotations

from typing import Any


def scores_texts(report: dict[str, Any]) -> list[str]:
    """The score of each task with its standard error, and what it was at the start.

    >>> score = {"label": "words", "metric": "acc", "value": 0.5, "stderr": 0.1, "start": 0.25}
    >>> scores_texts({"tasks": [score]})
    ['words 0.5000 ± 0.1000 acc (at the start 0.2500)']
    """
    texts = []
    for score in report.get("tasks", []):
        error = "" if score["stderr"] is None else f" ± {score['stderr']:.4f}"
        text = f"{score['label']} {score['value']:.4f}{error} {score['metric']}"
        texts.append(f"{text} (at the start {score['start']:.4f})")
    return texts
