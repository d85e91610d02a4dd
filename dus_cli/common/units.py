"""Sizes, counts, shares and times, as people type and read them."""

from __future__ import annotations

import re

_COUNT_UNITS = {"": 1, "K": 10**3, "M": 10**6, "B": 10**9, "T": 10**12}


def parse_count(text: str) -> int:
    """A count with a decimal unit.

    >>> parse_count("1B"), parse_count("1.5M"), parse_count("4096")
    (1000000000, 1500000, 4096)

    Raises:
        ValueError: not a positive count.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMBT]?)", text.strip().upper(), re.ASCII)
    count = round(float(match[1]) * _COUNT_UNITS[match[2]]) if match else 0
    if count < 1:
        raise ValueError(f"{text!r} is not a count; write it like 4096, 500K, 10M or 1B")
    return count


def parse_share(text: str) -> float:
    """A share of a whole.

    >>> parse_share("0.5%"), parse_share("0.25")
    (0.005, 0.25)

    Raises:
        ValueError: not between 0 and 1.
    """
    match = re.fullmatch(r"(\d{1,9}(?:\.\d{1,9})?)\s*(%?)", text.strip(), re.ASCII)
    share = float(match[1]) / (100 if match[2] else 1) if match else -1.0
    if not 0 <= share <= 1:
        raise ValueError(f"{text!r} is not a share; write it like 10% or 0.1")
    return share


def share_text(share: float) -> str:
    """A share as a user would type it; `parse_share` reads the same number back.

    >>> share_text(0.005), share_text(0.2), share_text(0.7 / 100)
    ('0.5%', '20%', '0.7%')
    """
    percent, plain = (f"{number:.9f}".rstrip("0").rstrip(".") for number in (100 * share, share))
    return plain if parse_share(plain) == share != parse_share(f"{percent}%") else f"{percent}%"


_UNITS = {"": 1, "B": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}


def parse_size(text: str) -> int:
    """A size in decimal units, as transformers and the Hub count.

    >>> parse_size("5GB"), parse_size("1.5 MB"), parse_size("300")
    (5000000000, 1500000, 300)

    Raises:
        ValueError: not a positive number with KB, MB, GB or TB.
    """
    match = re.fullmatch(r"(\d{1,15}(?:\.\d{1,9})?)\s*([KMGT]?B)?", text.strip().upper(), re.ASCII)
    size = int(float(match[1]) * _UNITS[match[2] or ""]) if match else 0
    if size < 1:
        raise ValueError(
            f"{text!r} is not a size; write it like 5GB, 300MB or 1.5TB (decimal units)"
        )
    return size


def size_text(num_bytes: int) -> str:
    """A size in bytes as a user would type it; `parse_size` reads it back.

    >>> size_text(5_000_000_000), size_text(1_500_000), size_text(300)
    ('5GB', '1500KB', '300')
    """
    unit = max((unit for unit in _UNITS if num_bytes % _UNITS[unit] == 0), key=_UNITS.__getitem__)
    return f"{num_bytes // _UNITS[unit]}{unit}"


def human_count(count: float) -> str:
    """A count to three digits with a decimal unit, as --tokens takes it.

    >>> human_count(1_843_200), human_count(950), human_count(999_999), human_count(15e12)
    ('1.84M', '950', '1M', '15T')
    """
    for unit in ("", "K", "M", "B"):
        if float(f"{count:.3g}") < 1000:
            return f"{float(f'{count:.3g}'):g}{unit}"
        count /= 1000
    return f"{float(f'{count:.3g}'):,g}T"


def counted(count: int, noun: str) -> str:
    """A count and its noun, in the plural unless the count is 1.

    >>> counted(1, "document"), counted(12_000, "document"), counted(0, "token")
    ('1 document', '12,000 documents', '0 tokens')
    """
    return f"{count:,} {noun if count == 1 else noun + 's'}"


def human_bytes(count: float) -> str:
    """A size in decimal units, as --max-shard-size takes it.

    >>> human_bytes(21_463_048_192)
    '21.46 GB'
    """
    for unit in ("bytes", "KB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} bytes" if unit == "bytes" else f"{count:.2f} {unit}"
        count /= 1000
    return f"{count:.2f} TB"


def human_time(seconds: float) -> str:
    """Seconds in words, rounded.

    >>> human_time(42.0), human_time(3900.0), human_time(200_000)
    ('42 s', '1 h 5 min', '2 d 8 h')
    """
    if seconds < 120:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours = round(seconds / 3600)
    return (
        f"{minutes // 60} h {minutes % 60} min" if hours < 48 else f"{hours // 24} d {hours % 24} h"
    )
