"""Small random damages to bytes, and the error that they cause."""

from __future__ import annotations

import random
import struct
from collections.abc import Callable

from dus_cli.errors import DusError


def mutate(raw: bytes, rng: random.Random) -> bytes:
    """Damage bytes in a few places: flip, cut out or double them, replace digits, change the
    header's length.
    """
    data = bytearray(raw)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(data))
        match rng.randrange(6):
            case 0:
                data[at] ^= 1 << rng.randrange(8)
            case 1:
                del data[at : at + rng.randint(1, 20)]
            case 2:
                data[at:at] = data[at : at + rng.randint(1, 30)]
            case 3:
                digits = [i for i, byte in enumerate(data) if 48 <= byte <= 57]
                if digits:
                    data[rng.choice(digits)] = rng.choice(b"0123456789-")
            case 4:
                data[:8] = struct.pack(
                    "<Q", rng.choice([0, 1, len(data), 2**32, 2**60, rng.randrange(400)])
                )
            case _:
                data[at:at] = rng.choice(
                    [b"null", b"1e999", b"NaN", b"\xff\xfe", b'"\\ud800"', b"{}", b"[[", b"2" * 30]
                )
        data = data or bytearray(b"\0")
    return bytes(data)


def one_line_problem(step: Callable[[], object]) -> str | None:
    """The error of a step, checked to be one line of less than 1,000 characters; None if the step
    succeeds.
    """
    try:
        step()
    except DusError as error:
        problem = str(error)
    else:
        return None
    assert "\n" not in problem
    assert len(problem) < 1000
    return problem
