"""Which documents are held out of training."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from dus_cli.common.units import parse_share
from dus_cli.errors import DataError, shown


def parse_holdout(text: str) -> float:
    """Parse the share of documents to hold out, 0…0.5.

    >>> parse_holdout("0.5%"), parse_holdout("0.005"), parse_holdout("0")
    (0.005, 0.005, 0.0)

    Raises:
        DataError: not a share, or more than half.
    """
    try:
        share = parse_share(text)
    except ValueError:
        share = 1.0
    if share > 0.5:
        raise DataError(
            f"{shown(text)} is not a share of documents to hold out; give 0% to 50%, such as 0.5% "
            "or 0.005"
        )
    return share


HASH_BITS = 64

# The held-out share of evaluation data.
EVERYTHING = 1.0


@dataclass(frozen=True)
class Split:
    """Which documents are held out. The hash of a document's text decides, so the split stays the
    same when data is added.

    A share `share` of the documents is held out. Documents whose hash is in `left_out` are neither
    held out nor trained on.
    """

    share: float
    left_out: frozenset[int] = frozenset()

    def holds_out(self, number: int) -> bool:
        return number < int(self.share * 2**HASH_BITS)


def text_hash(text: bytes) -> int:
    """A 64-bit hash of a document's text."""
    return int.from_bytes(hashlib.blake2b(text, digest_size=HASH_BITS // 8).digest(), "big")


def num_copies(weight: float, number: int) -> int:
    """How often a document of this weight and hash is trained on: the weight's whole part, and once
    more with the probability of the rest. The hash decides, so it is the same in every run.

    >>> [num_copies(weight, text_hash(b"a document")) for weight in (0, 1, 2)]
    [0, 1, 2]
    """
    whole, rest = divmod(weight, 1)
    # hashed again: the number itself already decides about the held-out share
    draw = text_hash(number.to_bytes(HASH_BITS // 8, "big"))
    return int(whole) + (draw < int(rest * 2**HASH_BITS))
