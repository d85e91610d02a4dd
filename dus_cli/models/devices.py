"""What a device can do: its peak for MFU, and how many rows of a batch it takes at once."""

from __future__ import annotations

import resource
import sys

import torch


def computes_in_bf16(device_type: str | None = None) -> bool:
    """Whether a device has instructions for bf16: any accelerator, or a CPU for which oneDNN has
    kernels.

    Without them, as on x86 before AVX-512, torch computes bf16 many times slower than fp32
    (docs/healing.md).

    Args:
        device_type: "cpu", "cuda" and so on; the one that torch finds by default.
    """
    on_accelerator = (
        torch.accelerator.is_available() if device_type is None else device_type != "cpu"
    )
    return on_accelerator or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def peak_memory_bytes(device: torch.device) -> int:
    """The most memory in use so far: of the accelerator, or resident where there is none."""
    if device.type == "cuda":
        return int(torch.accelerator.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
