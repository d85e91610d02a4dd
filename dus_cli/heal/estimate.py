"""Estimates of a run's memory per device and of its checkpoints, with their sources."""

from __future__ import annotations

from dataclasses import dataclass

from dus_cli.maps.shape import Shape
from dus_cli.models.chunks import LOGITS_BYTES_ELSEWHERE

# Peak FLOP/s in dense bf16, from the vendors' data sheets, by a part of the device's name. If one
# name contains another, it comes first.
PEAK_FLOPS = {
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "GH200": 989e12,
    "B200": 2250e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A10G": 70e12,
    "MI300X": 1307e12,
    "MI250X": 191.5e12,
}


def num_shards(sharding: str, size: int, num_local: int) -> int:
    """The number of workers that the weights are split over; with HSDP nodes are replicas."""
    if sharding == "none":
        return 1
    if sharding == "hsdp":
        return num_local
    return size


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes per device, by purpose."""

    weights: float
    gradients: float
    optimizer: float
    teacher: float
    gathered: float
    activations: float
    logits: float

    @property
    def total(self) -> float:
        return (
            self.weights
            + self.gradients
            + self.optimizer
            + self.teacher
            + self.gathered
            + self.activations
            + self.logits
        )


# Bytes kept for the backward pass per token, layer and unit of hidden size, by
# --activation-checkpointing: 34 with flash attention (Korthikanti et al., arXiv:2205.05198,
# equation 2 without its attention matrix).
_ACTIVATION_BYTES = {"none": 34.0, "selective": 18.0, "full": 2.0}
# The same for layers that are compiled for a CPU, measured (docs/healing.md).
_COMPILED_BYTES = 20.0


def num_learning(shape: Shape, num_layers: int, *, with_embeddings: bool) -> int:
    """The number of trained parameters: those of `num_layers` layers and, `with_embeddings`, those
    outside of the layers.
    """
    layers = shape.num_matmul_parameters - shape.vocab_size * shape.hidden_size
    outside = shape.num_parameters - layers if with_embeddings else 0
    return layers * num_layers // max(1, shape.num_layers) + outside


def checkpoint_bytes(
    shape: Shape, *, num_learning: int, weight_bytes: int, has_fp32_masters: bool
) -> int:
    """Bytes of a checkpoint: for each trained parameter its weight, two fp32 moments, and the lower
    half of its fp32 master if the weight is bf16.

    Args:
        shape: the model's.
        num_learning: the number of trained parameters.
        weight_bytes: bytes of a parameter in the forward pass.
        has_fp32_masters: whether bf16 weights have fp32 masters.
    """
    each = weight_bytes + 8 + (2 if has_fp32_masters and weight_bytes != 4 else 0)
    return min(num_learning, shape.num_parameters) * each


def memory_per_device(
    shape: Shape,
    *,
    num_learning: int | None = None,
    num_shards: int,
    micro_batch_tokens: int,
    weight_bytes: int,
    has_fp32_masters: bool,
    activation_checkpointing: str,
    is_compiled: bool = False,
    teacher_layers: int,
) -> MemoryEstimate:
    """The bytes that one device needs. Weights, and the gradients, masters and moments of the
    `num_learning` trained parameters (None: all), are split `num_shards` ways.

    Gradients are summed in fp32; Adam keeps two fp32 moments; the master of a bf16 weight takes 2
    bytes more; one layer and the head are gathered at a time. Layers that are compiled for a CPU
    (`is_compiled`) keep less for the backward pass.
    """
    each = shape.num_parameters / num_shards
    learning = each if num_learning is None else num_learning / num_shards
    masters = 2.0 if has_fp32_masters and weight_bytes != 4 else 0.0
    layer = (shape.num_matmul_parameters - shape.vocab_size * shape.hidden_size) / max(
        1, shape.num_layers
    )
    is_sharded = num_shards > 1
    kept = _ACTIVATION_BYTES[activation_checkpointing]
    if is_compiled:
        kept = min(kept, _COMPILED_BYTES)
    activations = micro_batch_tokens * shape.num_layers * shape.hidden_size * kept
    if activation_checkpointing == "full":
        activations += micro_batch_tokens * shape.hidden_size * _ACTIVATION_BYTES["none"]
    return MemoryEstimate(
        weights=each * weight_bytes,
        gradients=learning * 4.0,
        optimizer=learning * (8.0 + masters),
        teacher=each * weight_bytes * teacher_layers / max(1, shape.num_layers),
        gathered=(2 * layer + shape.vocab_size * shape.hidden_size) * weight_bytes
        if is_sharded
        else 0.0,
        activations=activations * weight_bytes / 2,
        # the logits, their gradient, and the head's gradient in fp32
        logits=3.0 * min(LOGITS_BYTES_ELSEWHERE, 4 * micro_batch_tokens * shape.vocab_size)
        + 4.0 * shape.vocab_size * shape.hidden_size,
    )
