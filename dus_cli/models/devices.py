"""What a device can do: whether it computes in bf16, and its peak memory."""

from __future__ import annotations

import resource
import sys

import torch


def computes_in_bf16(device_type: str | None = None) -> bool:
    """Whether a device computes bf16 fast: any accelerator, or a CPU for which oneDNN has bf16
    kernels.

    Without these, as on x86 before AVX-512, torch computes bf16 many times slower than fp32
    (docs/healing.md).

    Args:
        device_type: "cpu", "cuda" and so on; None for torch's default device.
    """
    on_accelerator = (
        torch.accelerator.is_available() if device_type is None else device_type != "cpu"
    )
    return on_accelerator or bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())  # noqa: SLF001


def peak_memory_bytes(device: torch.device) -> int:
    """The peak memory so far, in bytes: allocated on a CUDA device, else the process's resident
    memory.
    """
    if device.type == "cuda":
        return int(torch.accelerator.max_memory_allocated())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # Linux counts in KiB
