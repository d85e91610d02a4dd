"""Confidence intervals of mean losses, and of their differences, over documents.

The tokens of a document are not independent, so a document's sum is one observation (clustered
standard errors; Miller, "Adding Error Bars to Evals", arXiv:2411.00640, sections 2.2 and 4.2:
compare models by paired differences). A loss is a ratio of two sums over documents, nats to tokens.
Its standard error is the ratio estimator's (Cochran, "Sampling Techniques", 3rd ed., section 6.4),
its interval Student's t, with degrees of freedom one less than documents.
"""

from __future__ import annotations

import math
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

LEVEL = 0.95

# The most sums that are kept. With more documents, neighbours share one, so that memory does not
# grow with the data.
MAX_UNITS = 8192


@dataclass(frozen=True)
class Estimate:
    """A ratio of two sums, and half the width of its interval (None with fewer than two
    observations).
    """

    value: float
    margin: float | None

    @property
    def interval(self) -> tuple[float, float] | None:
        return None if self.margin is None else (self.value - self.margin, self.value + self.margin)

    def times(self, factor: float) -> Estimate:
        return Estimate(
            self.value * factor, None if self.margin is None else abs(factor) * self.margin
        )


class Sums:
    """Sums over at most `limit` units. A unit is a document, or a power of two of neighbouring
    documents.

    The units depend only on the number of documents, so those of two models on the same documents
    are the same.

    >>> sums = Sums(limit=2)
    >>> for document in range(5):
    ...     sums.add(document, 1.0)
    >>> sums.per_unit, list(sums)
    (4, [4.0, 1.0])
    """

    def __init__(self, limit: int = MAX_UNITS) -> None:
        self._limit = limit
        self._sums = array("d")
        self.per_unit = 1

    def add(self, document: int, amount: float) -> None:
        """Add to a document's sum, in any order of documents."""
        while document // self.per_unit >= self._limit:
            self.per_unit *= 2
            if len(self._sums) % 2:
                self._sums.append(0.0)
            self._sums = array("d", map(sum, zip(self._sums[::2], self._sums[1::2], strict=True)))
        unit = document // self.per_unit
        self._sums.extend(0.0 for _ in range(unit + 1 - len(self._sums)))
        self._sums[unit] += amount

    def __iter__(self) -> Iterator[float]:
        return iter(self._sums)

    def __len__(self) -> int:
        return len(self._sums)

    @property
    def total(self) -> float:
        return math.fsum(self._sums)


def ratio(
    numerators: Sequence[float], denominators: Sequence[float], level: float = LEVEL
) -> Estimate:
    """The ratio r = Σ x / Σ y of numerators x and denominators y, with its interval.

    Its variance is n / (n − 1) · Σ (x − r y)² / (Σ y)².
    """
    n, total = len(numerators), math.fsum(denominators)
    value = math.fsum(numerators) / total
    if n < 2:
        return Estimate(value, None)
    squares = math.fsum((x - value * y) ** 2 for x, y in zip(numerators, denominators, strict=True))
    return Estimate(value, t_quantile(n - 1, level) * math.sqrt(n / (n - 1) * squares) / total)


def t_quantile(freedom: int, level: float = LEVEL) -> float:
    """The t for which Student's t lies within ±t with probability `level`.

    >>> [round(t_quantile(freedom), 3) for freedom in (1, 2, 10, 30, 1000)]
    [12.706, 4.303, 2.228, 2.042, 1.962]
    """
    low, high = 0.0, math.pi / 2  # bounds of atan(t / √freedom), which are finite
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (
            (middle, high) if _central_probability(middle, freedom) < level else (low, middle)
        )
    return math.sqrt(freedom) * math.tan((low + high) / 2)


def _central_probability(angle: float, freedom: int) -> float:
    """The probability of |t| ≤ √freedom · tan(angle) (Abramowitz and Stegun, 26.7.3 and 26.7.4)."""
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term = cosine if odd else 1.0
    total = term if freedom > 1 else 0.0
    for k in range(2 + odd, freedom - 1, 2):
        term *= cosine * cosine * (k - 1) / k
        total += term
    return 2 / math.pi * (angle + sine * total) if odd else sine * total
