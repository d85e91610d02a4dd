"""Multiply a tensor's numbers by a factor while they are copied, for a start such as `half`.

The product is computed in float32 (float64 for float64) and rounded to the dtype: to nearest, ties
to even. A power of two is exact. It uses numpy and not torch, so that `dus upscale` needs no extra,
and memory stays small.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from dus_cli.errors import CheckpointError, shown
from dus_cli.planning.dtypes import FLOATS
from dus_cli.source.headers import DTYPE_BITS

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# Numbers that are scaled at a time: intermediate results stay in the processor's cache.
_AT_ONCE = 1 << 15

# Dtypes of 16 bits: a table holds the products of all 65,536 numbers.
_TABLED = frozenset(["BF16", "F16"])


@dataclass(frozen=True)
class Scale:
    r"""A factor on the numbers of one dtype, by safetensors' name.

    `offset` is 1 for the weights w of a norm that multiplies by 1 + w: then 1 + w is scaled.

    >>> halve, numbers = Scale("F32", 0.5), bytearray(b"\0\0\x80?")  # 1.0
    >>> halve(memoryview(numbers)), bytes(numbers)  # 0.5
    (0, b'\x00\x00\x00?')
    """

    dtype: str
    factor: float
    offset: int = 0

    def __post_init__(self) -> None:
        assert self.dtype in FLOATS

    @property
    def size(self) -> int:
        """Bytes of a number."""
        return DTYPE_BITS[self.dtype] // 8

    def apply(self, numbers: memoryview, name: str) -> None:
        """Scale a buffer's numbers in place. `name` is the base tensor's.

        Raises:
            CheckpointError: a finite number is then out of the dtype's range.
        """
        if self(numbers):
            raise CheckpointError(
                f"tensor {shown(name)} holds finite {self.dtype} numbers that, times "
                f"{self.factor:g}, are out of {FLOATS[self.dtype]}'s range; choose a smaller "
                "factor for --start, or --dtype float32"
            )

    def __call__(self, numbers: memoryview) -> int:
        """Scale a buffer's numbers in place; return how many finite ones became infinite."""
        import numpy as np

        if self.dtype in _TABLED:
            return self._look_up(np.frombuffer(numbers, dtype=np.uint16))
        floats = np.frombuffer(numbers, dtype=np.float32 if self.dtype == "F32" else np.float64)
        num_infinite = 0
        for start in range(0, len(floats), _AT_ONCE):
            part = floats[start : start + _AT_ONCE]
            was_finite = np.isfinite(part) if self.factor > 1 else None
            self._multiply(part)
            if was_finite is not None:
                num_infinite += int((np.isinf(part) & was_finite).sum())
        return num_infinite

    def _look_up(self, words: NDArray[np.uint16]) -> int:
        import numpy as np

        table, overflows = _table(self)
        num_infinite = 0
        for start in range(0, len(words), _AT_ONCE):
            part = words[start : start + _AT_ONCE]
            if overflows is not None:
                num_infinite += int(overflows[part].sum())
            # "clip" needs no extra buffer; it changes nothing, because every word is in the table
            np.take(table, part, out=part, mode="clip")
        return num_infinite

    def _multiply(self, numbers: NDArray[Any]) -> None:
        """Scale floats of 32 or 64 bits in place."""
        import numpy as np

        factor = numbers.dtype.type(self.factor)
        with np.errstate(all="ignore"):
            numbers *= factor
            if self.offset:  # c · (1 + w) - 1, without losing the digits of a small w
                numbers += factor - 1


@lru_cache(maxsize=64)
def _table(scale: Scale) -> tuple[NDArray[np.uint16], NDArray[np.bool_] | None]:
    """For each number of 16 bits its scaled one, and whether it becomes infinite; None instead of
    the latter if none does. A NaN stays as it is.
    """
    import numpy as np

    words = np.arange(1 << 16, dtype=np.uint32)
    is_bfloat = scale.dtype == "BF16"
    floats = (
        (words << 16).view(np.float32)
        if is_bfloat
        else words.astype(np.uint16).view(np.float16).astype("f4")
    )
    scaled = floats.copy()
    scale._multiply(scaled)  # noqa: SLF001  (the other half of the class)
    with np.errstate(all="ignore"):
        table = _to_bfloat(scaled) if is_bfloat else scaled.astype(np.float16).view(np.uint16)
    infinity = 0x7F80 if is_bfloat else 0x7C00  # the exponent of a number that is not finite
    is_nan = np.isnan(floats)
    table[is_nan] = words[is_nan]
    overflows = ((table & 0x7FFF) == infinity) & ((words & infinity) != infinity)
    return table, overflows if overflows.any() else None


def _to_bfloat(floats: NDArray[np.float32]) -> NDArray[np.uint16]:
    """bfloat16 as 16 bits, rounded to nearest, ties to even. Not valid for NaN."""
    import numpy as np

    bits = floats.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
