"""The shuffled order of rows, a pure function of the seed, computed row by row.

No list is shuffled or stored: the order of a billion rows takes no memory, any worker can find any
row, and a run resumed with more or fewer workers goes on with the same rows.
"""

from __future__ import annotations

import hashlib
from bisect import bisect_right
from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate, pairwise

from dus_cli.errors import DataError

_MASK = (1 << 64) - 1
_ROUNDS = 6
# Below 2**4 values a Feistel network has too few bits to mix; it then walks through 16.
_FEWEST_BITS = 4

# By how much the first window of a source is smaller than later ones.
_SMALLER = 16


def permute(index: int, size: int, key: int) -> int:
    """The value at `index` of a pseudo-random permutation of range(size). Time and memory do not
    grow with `size`.

    A Feistel network is a permutation of 2**b values whatever its rounds compute; following its
    cycle until the value is below `size` makes it one of range(size) (Black and Rogaway, Ciphers
    with arbitrary finite domains, 2002). That takes fewer than two steps on average if `size` is
    above 2**4.

    >>> [permute(index, 10, key=1) for index in range(10)]
    [0, 2, 4, 9, 1, 3, 6, 7, 5, 8]
    """
    assert 0 <= index < size <= 1 << 64
    num_bits = max((size - 1).bit_length(), _FEWEST_BITS)
    value = index
    while True:
        value = _encrypt(value, num_bits, key)
        if value < size:
            return value


def _encrypt(value: int, num_bits: int, key: int) -> int:
    low_bits = num_bits // 2
    for number in range(_ROUNDS):
        low = value & ((1 << low_bits) - 1)
        high_bits = num_bits - low_bits
        high = (value >> low_bits) ^ (_mix(low ^ _mix(key + number)) & ((1 << high_bits) - 1))
        value = low << high_bits | high  # the halves swap places
        low_bits = high_bits
    return value


def _mix(value: int) -> int:
    """SplitMix64's output function (Steele, Lea and Flood, 2014)."""
    value = (value + 0x9E3779B97F4A7C15) & _MASK
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & _MASK
    return value ^ (value >> 31)


def _key(*parts: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(parts).encode(), digest_size=8).digest(), "big")


class Order:
    """The order in which a run with this seed reads the rows of several sources.

    Without weights an epoch has every row once. With weights an epoch has rows in these
    proportions, as many as the first source to run out allows. No row comes twice in an epoch; in
    the next epoch a source that did not run out goes on with its next rows.

    Raises:
        DataError: there are no rows at all, or a source with a weight has none.
    """

    def __init__(
        self, num_rows: Sequence[int], weights: Sequence[float] | None = None, seed: int = 0
    ) -> None:
        if sum(num_rows) == 0 or (weights is not None and 0 in num_rows):
            raise DataError(
                "a source has too few tokens for one row; add data, or choose a smaller "
                "--seq-length"
            )
        self.num_rows = tuple(num_rows)
        self.is_weighted = weights is not None
        self.seed = seed
        quotas = self.num_rows if weights is None else _quotas(self.num_rows, weights)
        self._ends = tuple(accumulate(quotas))
        self._quotas = quotas

    @property
    def rows_per_epoch(self) -> int:
        return self._ends[-1]

    def locate(self, index: int) -> tuple[int, int]:
        """The source, and the row in it, of the run's row `index` = 0, 1, …; epochs follow each
        other without end.
        """
        epoch, place = divmod(index, self.rows_per_epoch)
        slot = permute(place, self.rows_per_epoch, _key(self.seed, "epoch", epoch))
        source = bisect_right(self._ends, slot)
        offset = slot - (self._ends[source] - self._quotas[source])
        if not self.is_weighted:
            return source, offset
        # One permutation for all passes: an epoch that begins in one pass and ends in the next
        # repeats no row.
        pick = epoch * self._quotas[source] + offset
        size = self.num_rows[source]
        return source, permute(pick % size, size, _key(self.seed, "source", source))


def _quotas(num_rows: Sequence[int], weights: Sequence[float]) -> tuple[int, ...]:
    """The number of rows that each source gives to an epoch.

    >>> _quotas([100, 1000], [0.5, 0.5])
    (100, 100)
    >>> _quotas([70, 1000], [0.7, 0.3])
    (70, 30)
    """
    scale = min(size / weight for size, weight in zip(num_rows, weights, strict=True))
    return tuple(
        max(1, min(size, round(weight * scale)))
        for size, weight in zip(num_rows, weights, strict=True)
    )


class WindowOrder:
    """The order in which a run with this seed reads sources whose numbers of rows are not known
    yet.

    Each source is cut into windows of consecutive rows, and the rows of a window are permuted. So a
    row is known as soon as its window is complete, or the source has ended. The first window has a
    16th of the rows of later ones, and the next ones double, so that the first rows are known soon.
    The sources take turns evenly, by their weights; a source that has run out begins again,
    permuted anew.

    Args:
        weights: of the sources, positive.
        window_rows: the rows of all sources' windows together, at most; each source has a share by
            its weight.
        seed: the run's.
    """

    def __init__(self, weights: Sequence[float], window_rows: int, seed: int) -> None:
        exact = [Fraction(weight) for weight in weights]
        totals = list(accumulate(exact))
        shares = [max(1, round(window_rows * part / totals[-1])) for part in exact]
        self._first = [max(1, share // _SMALLER) for share in shares]
        # the first window doubled as often as there is room
        self.windows = tuple(
            first << (share // first).bit_length() - 1
            for first, share in zip(self._first, shares, strict=True)
        )
        self.seed = seed
        # of the rows of sources 0…s + 1, the share of sources 0…s
        self._shares = [first / both for first, both in pairwise(totals)]

    def counts(self, num_rows: int) -> tuple[int, ...]:
        """How many of the run's first rows each source gives; they differ from its share by less
        than a row for each source.

        >>> WindowOrder([0.5, 0.25, 0.25], 100, seed=0).counts(10)
        (5, 3, 2)
        """
        counts, left = [], num_rows
        for share in reversed(self._shares):
            first = (2 * left * share.numerator + share.denominator) // (2 * share.denominator)
            counts.append(left - first)
            left = first
        return (left, *reversed(counts))

    def draw(self, index: int) -> tuple[int, int]:
        """The source of the run's row `index` = 0, 1, …, and how many rows of it came before."""
        before, after = self.counts(index), self.counts(index + 1)
        source = next(
            s for s, pair in enumerate(zip(before, after, strict=True)) if len({*pair}) > 1
        )
        return source, before[source]

    def num_needed(self, source: int, draw: int) -> int:
        """The rows that a source must have before the row of this draw is known, unless it has
        ended.
        """
        return sum(self._window(source, draw))

    def _window(self, source: int, place: int) -> tuple[int, int]:
        """The first row of the window in which a row lies, and the window's number of rows."""
        size, first = self.windows[source], self._first[source]
        if place < first:
            return 0, first
        if place < size:  # each window begins where it has room for what lies before it
            size = first << (place // first).bit_length() - 1
            return size, size
        return place - place % size, size

    def row(self, source: int, draw: int, num_rows: int | None) -> int:
        """The row of a source that its draw 0, 1, … takes.

        Args:
            source: its number.
            draw: how many rows of it came before.
            num_rows: all that it has; None if it has not ended, and then it must have
                `num_needed`.
        """
        turn, place = (0, draw) if num_rows is None else divmod(draw, num_rows)
        first, size = self._window(source, place)
        if num_rows is not None:
            size = min(size, num_rows - first)
        return first + permute(place - first, size, _key(self.seed, "window", source, turn, first))
