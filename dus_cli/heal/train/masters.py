"""What bf16 weights lack of fp32: the other half of their masters, or a rounding that is right on
average.
"""

from __future__ import annotations

import torch
from torch import Tensor


def split(master: Tensor, weight: Tensor, lower: Tensor) -> None:
    """Write an fp32 master as the bf16 weight that is nearest to it, and as what that lacks of it:
    the difference of their bits as integers, int16, in which 2 bytes do for 4 (Split-SGD,
    arXiv:2005.04680, there with weights that are rounded towards 0).

    Half a step of bf16 is 2^15, which int16 has below 0 only. So a master that is half way between
    two weights and is rounded down becomes the next fp32 number towards its weight.
    """
    weight.copy_(master)
    lack = master.view(torch.int32) - weight.float().view(torch.int32)
    lower.copy_(lack.clamp_(max=(1 << 15) - 1))


def joined(weight: Tensor, lower: Tensor) -> Tensor:
    """The fp32 master that `split` took apart."""
    master = weight.float()
    master.view(torch.int32).add_(lower)
    return master


def stochastically_rounded(value: Tensor, generator: torch.Generator) -> Tensor:
    """fp32 to bf16, up or down with the probability that makes the result right on average."""
    bits = value.contiguous().view(torch.int32)
    noise = torch.randint(
        0, 1 << 16, bits.shape, dtype=torch.int32, device=bits.device, generator=generator
    )
    # bf16 is the upper half of fp32: adding noise to the lower half carries into it in proportion.
    return (bits + noise).bitwise_and_(-(1 << 16)).view(torch.float32).to(torch.bfloat16)
