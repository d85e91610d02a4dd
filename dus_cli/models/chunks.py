"""How many rows of logits are computed at once."""

from __future__ import annotations

# Bytes of fp32 logits held at a time: enough rows for efficient matrix products.
_LOGITS_BYTES = {"cpu": 384 << 20}
LOGITS_BYTES_ELSEWHERE = 512 << 20

# Bytes of logits that a CPU works on at a time: they fit its cache; memory is several times slower.
_BLOCK_BYTES = {"cpu": 4 << 20}


def chunk_rows(device_type: str, vocab_size: int) -> int:
    """The number of rows whose logits the loss holds at a time."""
    return max(64, _LOGITS_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * vocab_size))


def block_rows(device_type: str, vocab_size: int) -> int:
    """The number of rows of a chunk whose softmax is computed at a time, in fp32."""
    return max(4, _BLOCK_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * vocab_size))


def block_words(device_type: str, num_rows: int) -> int:
    """The number of vocabulary entries whose logits are held at a time in fp32, without a
    gradient.
    """
    return max(
        1024, _BLOCK_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * max(1, num_rows))
    )
