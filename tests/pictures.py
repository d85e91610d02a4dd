"""Checks of every picture: its labels are inside of it, and none covers another."""

from __future__ import annotations

import re
from itertools import combinations
from typing import NamedTuple
from xml.etree import ElementTree as ET

# Measures of browsers' monospace font, in shares of its size.
_ADVANCE, _ASCENT, _DESCENT = 0.602, 0.75, 0.2


class Label(NamedTuple):
    """A text and the box around it, in pixels."""

    text: str
    left: float
    top: float
    right: float
    bottom: float


def labels(svg: str) -> list[Label]:
    """All texts in the picture."""
    found: list[Label] = []
    _collect(ET.fromstring(svg), 0.0, 13.0, found)  # noqa: S314  (our own)
    return found


def _collect(element: ET.Element, dy: float, size: float, found: list[Label]) -> None:
    moved = re.fullmatch(r"translate\(0 (\d+)\)", element.get("transform", ""))
    dy += float(moved[1]) if moved else 0.0
    size = float(element.get("font-size", size))
    if element.tag.endswith("}text"):
        text = re.sub(r" +", " ", element.text or "")
        width = len(text) * _ADVANCE * size
        x, y = float(element.attrib["x"]), float(element.attrib["y"]) + dy
        left = (
            x
            - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[element.get("text-anchor", "start")]
        )
        found.append(Label(text, left, y - _ASCENT * size, left + width, y + _DESCENT * size))
    for child in element:
        _collect(child, dy, size, found)


def check_labels(svg: str) -> list[str]:
    """Check that no label is shortened, leaves the picture or covers another; return the texts."""
    found = labels(svg)
    root = ET.fromstring(svg)  # noqa: S314  (our own)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    for label in found:
        assert "…" not in label.text, label
        assert label.left >= 0, label
        assert label.right <= width, label
        assert label.top >= 0, label
        assert label.bottom <= height, label
    for one, other in combinations(found, 2):
        apart = (
            one.right <= other.left
            or other.right <= one.left
            or one.bottom <= other.top
            or other.bottom <= one.top
        )
        assert apart, (one, other)
    return [label.text for label in found]
