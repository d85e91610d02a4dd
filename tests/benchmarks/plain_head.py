"""The loss of a plain head, forward and backward: dus against torch's linear_cross_entropy.

    python tests/benchmarks/plain_head.py --tokens 512 --dtype bfloat16

Prints for each way the CPU time, in turns and with one thread, and how far its loss and gradients
are from those of fp32 logits of the whole batch.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional

from dus_cli.models.losses import Head, loss_sums

# The loss, and the gradients of hidden states and weight.
Result = tuple[float, Tensor, Tensor]


def ours(hidden: Tensor, weight: Tensor, labels: Tensor) -> Result:
    output = nn.Linear(hidden.shape[1], len(weight), bias=False, dtype=weight.dtype)
    output.weight.data = weight
    states = hidden.clone().requires_grad_()
    scale = 1 / int((labels != -100).sum())
    loss, _, _ = loss_sums(states[None], output, labels[None], Head(), scale=scale)
    return _backward(loss, states, output.weight)


def chunked(hidden: Tensor, weight: Tensor, labels: Tensor) -> Result:
    return _of_torch(hidden, weight, labels, nn.LinearCrossEntropyOptions())


def whole(hidden: Tensor, weight: Tensor, labels: Tensor) -> Result:
    return _of_torch(hidden, weight, labels, None)


def _of_torch(
    hidden: Tensor, weight: Tensor, labels: Tensor, options: nn.LinearCrossEntropyOptions | None
) -> Result:
    states, rows = hidden.clone().requires_grad_(), weight.clone().requires_grad_()
    total = functional.linear_cross_entropy(states, rows, labels, reduction="sum", options=options)
    return _backward(total / int((labels != -100).sum()), states, rows)


def _backward(loss: Tensor, states: Tensor, weight: Tensor) -> Result:
    loss.backward()  # type: ignore[no-untyped-call]
    assert states.grad is not None
    assert weight.grad is not None
    return float(loss.detach()), states.grad, weight.grad


def off(found: Tensor, exact: Tensor) -> float:
    return float((found.float() - exact).norm() / exact.norm())


WAYS: dict[str, Callable[[Tensor, Tensor, Tensor], Result]] = {
    "dus": ours,
    "linear_cross_entropy, in chunks": chunked,
    "linear_cross_entropy, all logits": whole,
}


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--tokens", type=int, default=512)
    parser.add_argument("--width", type=int, default=576)
    parser.add_argument("--vocabulary", type=int, default=49_152)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_num_threads(1)
    dtype: torch.dtype = getattr(torch, options.dtype)
    hidden = torch.randn(options.tokens, options.width).to(dtype)
    weight = (0.02 * torch.randn(options.vocabulary, options.width)).to(dtype)
    labels = torch.randint(0, options.vocabulary, (options.tokens,))
    exact = whole(hidden.float(), weight.float(), labels)
    seconds: dict[str, list[float]] = {name: [] for name in WAYS}
    found: dict[str, Result] = {}
    for _ in range(options.rounds):
        for name, way in WAYS.items():
            started = time.process_time()
            found[name] = way(hidden, weight, labels)
            seconds[name].append(time.process_time() - started)
    print("| | CPU time | loss off by | gradients off by |\n|---|---|---|---|")
    for name, (loss, states, rows) in found.items():
        gradients = f"{off(states, exact[1]):.1e}, {off(rows, exact[2]):.1e}"
        middle = statistics.median(seconds[name])
        print(f"| {name} | {middle:.2f} s | {abs(loss - exact[0]):.1e} | {gradients} |")


if __name__ == "__main__":
    main()
