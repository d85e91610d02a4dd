"""How many rows of logits are computed at once."""

from __future__ import annotations

# Bytes of fp32 logits that exist at a time: enough rows for the matrix products to be efficient.
_LOGITS_BYTES = {"cpu": 128 << 20}
LOGITS_BYTES_ELSEWHERE = 512 << 20

# Bytes of them that a CPU works on at a time: they fit its cache, memory is several times slower.
_BLOCK_BYTES = {"cpu": 4 << 20}


def chunk_rows(device_type: str, vocab_size: int) -> int:
    """Rows whose logits are held at a time by the loss."""
    return max(64, _LOGITS_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * vocab_size))


def block_rows(device_type: str, vocab_size: int) -> int:
    """Rows of a chunk whose softmax is taken at a time, in fp32."""
    return max(4, _BLOCK_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * vocab_size))


def block_words(device_type: str, num_rows: int) -> int:
    """Words of the vocabulary whose logits are held at a time where no gradient is wanted, in
    fp32.
    """
    return max(
        1024, _BLOCK_BYTES.get(device_type, LOGITS_BYTES_ELSEWHERE) // (4 * max(1, num_rows))
    )
