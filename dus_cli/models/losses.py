"""The loss without the logits of a whole batch: cross-entropy, and the KL divergence from a
teacher.

For a vocabulary of 49,152 and 8 × 512 tokens, full logits are 800 MB in fp32, and their gradient as
much again. Here logits are computed for a chunk of rows, overwritten by their gradient, and freed,
as in Liger (arXiv:2410.10989). The gradient of both terms is "model's probability − target
probability", so they share one pass. On a CPU that pass takes a few rows at a time, which stay in
its cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from dus_cli.data.streams import IGNORED
from dus_cli.errors import HealError
from dus_cli.models.chunks import block_rows, block_words, chunk_rows


@dataclass(frozen=True)
class Head:
    """From hidden states to logits: z = scale · (h Wᵀ + b), then cap · tanh(z / cap) if cap is not
    None.
    """

    scale: float = 1.0
    cap: float | None = None

    def logits(self, products: Tensor) -> Tensor:
        """Logits in fp32 from products h Wᵀ + b, both (tokens, vocabulary). fp32 products may be
        overwritten.
        """
        logits = products.float()
        if self.scale != 1.0:
            logits *= self.scale
        return logits if self.cap is None else logits.div_(self.cap).tanh_().mul_(self.cap)

    def backward(self, gradient: Tensor, logits: Tensor) -> Tensor:
        """The gradient by the products, in place, from that by the logits."""
        if self.cap is not None:
            gradient *= 1 - (logits / self.cap) ** 2
        return gradient if self.scale == 1.0 else gradient.mul_(self.scale)


def head_of(config: Any) -> Head:
    """The head of a config: Cohere multiplies logits, Granite divides them, Gemma caps them."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    divisor = float(getattr(config, "logits_scaling", None) or 1.0)
    return Head(scale / divisor, getattr(config, "final_logit_softcapping", None))


class _Loss(torch.autograd.Function):
    """Sums over tokens: scale · ((1 − w) · CE + w · KL), CE, and KL. Only the first has a
    gradient.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        labels: Tensor,
        teacher: Teaching | None,
        head: Head,
        scale: float,
        between: Callable[[], object],
        each: Tensor | None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        share = teacher.weight if teacher is not None else 0.0
        hidden_gradient = torch.empty_like(hidden) if needs_hidden else None
        weight_gradient: Tensor | None = None
        bias_gradient = (
            torch.zeros_like(bias, dtype=torch.float32) if needs_bias and bias is not None else None
        )
        sums = hidden.new_zeros(2, dtype=torch.float32)
        at_once = chunk_rows(hidden.device.type, weight.shape[0])
        for start in range(0, len(hidden), at_once):
            between()
            rows = slice(start, start + at_once)
            products = functional.linear(hidden[rows], weight, bias)  # (chunk, vocabulary)
            theirs = None if teacher is None else teacher.products(rows)
            sums += _to_gradient(
                products,
                labels[rows],
                head=head,
                scale=scale,
                teacher=teacher,
                theirs=theirs,
                each=None if each is None else each[rows],
            )
            if hidden_gradient is not None:
                hidden_gradient[rows] = products @ weight
            if needs_weight:
                # A single chunk's product is rounded once, like any layer's gradient; the products
                # of several chunks are summed in fp32.
                product = products.mT @ hidden[rows]
                weight_gradient = (
                    product if weight_gradient is None else weight_gradient.float().add_(product)
                )
            if bias_gradient is not None:
                bias_gradient += products.sum(0, dtype=torch.float32)
            del products, theirs
        ctx.save_for_backward(
            hidden_gradient,
            None if weight_gradient is None else weight_gradient.to(weight.dtype),
            None if bias_gradient is None or bias is None else bias_gradient.to(bias.dtype),
        )
        cross_entropy, divergence = sums.unbind()
        cross_entropy, divergence = cross_entropy.clone(), divergence.clone()
        loss = scale * ((1 - share) * cross_entropy + share * divergence)
        ctx.mark_non_differentiable(cross_entropy, divergence)
        return loss, cross_entropy, divergence

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> tuple[Any, ...]:
        # In place, because a head's gradient is large. A second backward pass raises anyway.
        scaled = (None if each is None else each.mul_(gradients[0]) for each in ctx.saved_tensors)
        return *scaled, None, None, None, None, None, None


def _to_gradient(
    products: Tensor,
    labels: Tensor,
    *,
    head: Head,
    scale: float,
    teacher: Teaching | None,
    theirs: Tensor | None,
    each: Tensor | None,
) -> Tensor:
    """The sums of CE and KL over the rows of products h Wᵀ + b, (rows, vocabulary), which are
    overwritten by their gradient. `each`, (rows,), gets the CE of each row.
    """
    share = teacher.weight if teacher is not None else 0.0
    sums = products.new_zeros(2, dtype=torch.float32)
    at_once = block_rows(products.device.type, products.shape[1])
    for start in range(0, len(products), at_once):
        rows = slice(start, start + at_once)
        counted = labels[rows] != IGNORED
        targets = labels[rows].clamp(min=0)[:, None]
        logits = head.logits(products[rows])
        total = logits.logsumexp(-1, keepdim=True)
        losses = (total - logits.gather(1, targets))[:, 0] * counted
        if each is not None:
            each[rows] = losses
        sums[0] += losses.sum()
        q: Tensor | None = None
        if teacher is not None and theirs is not None:
            other = teacher.head.logits(theirs[rows])
            other_total = other.logsumexp(-1, keepdim=True)
            q = (other - other_total).exp_()
            # KL = Σ q · (log q − log p), without storing a log-softmax of either
            divergences = other.sub_(logits).mul_(q).sum(-1) + (total - other_total)[:, 0]
            sums[1] += (divergences * counted).sum()
        capped = logits.clone() if head.cap is not None else logits
        gradient = logits.sub_(total).exp_()  # p
        if q is not None:
            gradient.sub_(q, alpha=share)
        gradient.scatter_add_(1, targets, gradient.new_full(targets.shape, share - 1.0))
        gradient *= counted[:, None] * scale
        products[rows] = head.backward(gradient, capped)
    return sums


@dataclass(frozen=True)
class Teaching:
    """The teacher's hidden states, (tokens, width), for the same rows, its output embedding and
    head, and the weight of the KL term.
    """

    hidden: Tensor
    output: nn.Module
    head: Head
    weight: float

    def products(self, rows: slice) -> Tensor:
        """The teacher's h Wᵀ + b, (rows, vocabulary)."""
        return functional.linear(
            self.hidden[rows],
            self.output.weight,  # type: ignore[arg-type]
            getattr(self.output, "bias", None),
        )


def loss_sums(
    hidden: Tensor,
    output: nn.Module,
    labels: Tensor,
    head: Head,
    teaching: Teaching | None = None,
    scale: float = 1.0,
    between: Callable[[], object] = lambda: None,
    each: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Sums over the labelled tokens, in nats, fp32: the loss to minimise, the cross-entropy, and
    KL(teacher ‖ model).

    Args:
        hidden: the decoder's output, (rows, length, width).
        output: the output embedding; its weight is (vocabulary, width).
        labels: next tokens, (rows, length); -100 is ignored.
        head: how logits are scaled.
        teaching: the teacher on the same rows; without it the KL term is 0.
        scale: factor of the loss to minimise; 1 / tokens makes the sum a mean.
        between: called before each chunk of rows; may raise to stop.
        each: if given, gets the cross-entropy of each token, fp32, (rows · length,); 0 without a
            label.
    """
    parts: tuple[Any, ...] = (
        hidden.reshape(-1, hidden.shape[-1]),
        output.weight,
        getattr(output, "bias", None),
    )
    if not torch.is_grad_enabled():  # a Function looks at requires_grad, not at no_grad()
        parts = tuple(part if part is None else part.detach() for part in parts)
    rest = (labels.reshape(-1), teaching, head, scale, between, each)
    loss: tuple[Tensor, Tensor, Tensor] = _Loss.apply(*parts, *rest)  # type: ignore[no-untyped-call]
    return loss


@torch.no_grad()
def token_losses(hidden: Tensor, output: nn.Module, labels: Tensor, head: Head) -> Tensor:
    """The cross-entropy of each token in nats, fp32, (tokens,), from hidden states (tokens, width)
    and next tokens (tokens,); without a gradient, and without the logits of all tokens at once.
    """
    weight: Tensor = output.weight  # type: ignore[assignment]
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    at_once = chunk_rows(hidden.device.type, weight.shape[0])
    for start in range(0, len(hidden), at_once):
        rows = slice(start, start + at_once)
        # Shape: (chunk, vocabulary).
        products = functional.linear(hidden[rows], weight, getattr(output, "bias", None))
        losses[rows] = cross_entropies(products, labels[rows], head)
    return losses


def cross_entropies(products: Tensor, labels: Tensor, head: Head) -> Tensor:
    """The cross-entropy of each token in nats, fp32, (tokens,), from products h Wᵀ + b, (tokens,
    vocabulary), which may be overwritten.
    """
    losses = torch.empty(len(products), dtype=torch.float32, device=products.device)
    at_once = block_rows(products.device.type, products.shape[1])
    for start in range(0, len(products), at_once):
        rows = slice(start, start + at_once)
        logits = head.logits(products[rows])
        losses[rows] = logits.logsumexp(-1) - logits.gather(1, labels[rows, None])[:, 0]
    return losses


def cross_entropy(hidden: Tensor, output: nn.Module, labels: Tensor, head: Head) -> Tensor:
    """The sum of cross-entropy over the labelled tokens, in nats, without a gradient.

    The vocabulary is taken in blocks with a running log-sum-exp (online softmax, arXiv:1805.02867):
    each weight is read once, and the logits of a block fit a CPU's cache. Arguments as in
    `loss_sums`.
    """
    weight: Tensor = output.weight  # type: ignore[assignment]
    bias: Tensor | None = getattr(output, "bias", None)
    counted = labels.reshape(-1) != IGNORED
    rows, targets = hidden.reshape(-1, hidden.shape[-1])[counted], labels.reshape(-1)[counted]
    at_once = block_words(rows.device.type, len(rows))
    total: Tensor | None = None
    for start in range(0, len(weight), at_once):
        words = slice(start, start + at_once)
        products = functional.linear(rows, weight[words], None if bias is None else bias[words])
        part = head.logits(products).logsumexp(-1)
        total = part if total is None else torch.logaddexp(total, part)
    assert total is not None
    theirs = (rows.float() * weight[targets].float()).sum(-1)
    return (total - head.logits(theirs if bias is None else theirs + bias[targets].float())).sum()


def check_head(ours: float, theirs: float, model_type: str) -> None:
    """Check that our loss equals the model's own.

    Raises:
        HealError: the weights are damaged, or the architecture changes its logits in an unknown
            way.
    """
    if not math.isfinite(theirs):
        raise HealError(
            f"the model's loss before training is {theirs}: its weights are damaged; dus verify "
            "--base finds the tensors that differ from the base's"
        )
    if not abs(ours - theirs) <= 0.02 * max(1.0, abs(theirs)):
        raise HealError(
            f"the loss that dus computes for model_type {model_type!r} is {ours:.4f}, "
            f"transformers' is {theirs:.4f}: "
            "this architecture changes its logits in a way dus does not know; please report it"
        )
