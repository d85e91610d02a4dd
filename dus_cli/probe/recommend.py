"""Choose among the measured maps by two rules, which the report states with the answer. Pure."""

from __future__ import annotations

from collections.abc import Sequence

# A map's loss and size.
Point = tuple[float, int]


def within(points: Sequence[Point], limit: float) -> int | None:
    """The largest model whose loss is at most `limit`, and of two of one size the better; None if
    there is none.

    >>> within([(7.8, 60), (3.4, 46), (3.1, 40)], limit=3.5)
    1
    """
    fit = [index for index, (loss, _) in enumerate(points) if loss <= limit]
    return max(fit, key=lambda index: (points[index][1], -points[index][0]), default=None)


def knee(points: Sequence[Point]) -> int | None:
    """Where more trimming begins to pay less: the point farthest below the chord from the first to
    the last.

    Both axes are scaled to the span between the two ends, as in Kneedle (Satopaa et al., 2011,
    doi:10.1109/ICDCSW.2011.20) for a falling convex curve; a sweep has too few points for its
    smoothing. None with fewer than three points, or where none lies below the chord.

    Args:
        points: in the order of the trim.

    >>> knee([(7.8, 60), (5.2, 50), (3.4, 46), (3.3, 44), (3.2, 42)])
    2
    """
    if len(points) < 3:
        return None
    losses = [loss for loss, _ in points]
    fall = losses[0] - losses[-1]
    if not fall > 0:
        return None
    last = len(points) - 1
    below = [1 - index / last - (loss - losses[-1]) / fall for index, loss in enumerate(losses)]
    best = max(range(len(points)), key=below.__getitem__)
    return best if below[best] > 1e-9 else None
