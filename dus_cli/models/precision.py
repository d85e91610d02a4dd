"""The precision in which a model is run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from dus_cli.common.options import Option
from dus_cli.planning.dtypes import DtypeChoice

if TYPE_CHECKING:
    import torch


class Precision(DtypeChoice):
    """The dtype of weights and activations; auto is bf16 if the device computes it fast, else
    fp32.
    """

    auto = "auto"
    bf16 = "bf16"
    fp32 = "fp32"

    def on(self, device_type: str | None = None) -> Precision:
        """The precision on a device type ("cpu", "cuda" and so on; None for torch's default), with
        auto resolved.
        """
        if self is not Precision.auto:
            return self
        from dus_cli.models.devices import computes_in_bf16

        return Precision.bf16 if computes_in_bf16(device_type) else Precision.fp32


def precision_option(panel: str) -> Option:
    """`--precision`, in this panel of a command's help."""
    return Option(
        "Precision of weights and activations; auto is bf16, or fp32 on a CPU that is slow "
        "at bf16.",
        metavar="[auto|bf16|fp32]",
        panel=panel,
        parse=Precision.parse,
    )


def torch_dtype(precision: str) -> torch.dtype:
    """The torch dtype of "bf16" or "fp32"."""
    import torch

    return {"bf16": torch.bfloat16, "fp32": torch.float32}[precision]
