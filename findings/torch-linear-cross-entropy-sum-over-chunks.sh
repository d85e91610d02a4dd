#!/usr/bin/env bash
# The loss of torch's chunked linear_cross_entropy in bf16 falls with the size of the chunks, whatever its acc_policy.
#
# Versions:  torch 2.13.0 (CPU), 2026-11-30
# Guess:     acc_policy="accurate", or acc_dtype=torch.float32, sums in fp32, so that the loss does not depend on
#            batch_chunk_size but for its last rounding to bf16: 6.3125 for 6.3132 however many chunks there are.
# Behaviour: the sum of the losses is kept in bf16 over the chunks under every policy, and with acc_dtype too. Each chunk
#            adds a number that is small beside the sum and is rounded away: 4,096 rows in chunks of 32 give 5.69, a
#            tenth too low. The gradients are as exact as those in one chunk, so a run that minimises this loss learns
#            rightly and prints a loss that is wrong.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 numpy
env/bin/python - <<'PY' | tee seen
import torch
from torch.nn import LinearCrossEntropyOptions
from torch.nn.functional import cross_entropy, linear_cross_entropy

torch.manual_seed(0)
inputs = torch.randn(4096, 64).bfloat16()
weight = (torch.randn(512, 64) * 0.05).bfloat16()
target = torch.randint(512, (4096,))


def loss_and_gradient(loss_of, x):
    x = x.clone().requires_grad_()
    loss = loss_of(x)
    loss.backward()
    return loss.item(), x.grad.float()


exact, gradient = loss_and_gradient(lambda x: cross_entropy(x @ weight.float().T, target), inputs.float())
print(f"in fp32, at once: {exact:.2f}")
ways = {
    "accurate": {"acc_policy": "accurate"},
    "balanced": {"acc_policy": "balanced"},
    "compact": {"acc_policy": "compact"},
    "acc_dtype=float32": {"acc_dtype": torch.float32},
}
for name, settings in ways.items():
    for size in (4096, 32):
        options = LinearCrossEntropyOptions(batch_chunk_size=size, **settings)
        loss, found = loss_and_gradient(lambda x: linear_cross_entropy(x, weight, target, options=options), inputs)
        off = ((found - gradient).norm() / gradient.norm()).item()
        print(f"{name}, chunks of {size}: {loss:.1f}, gradient within 1%: {off < 0.01}")
PY
diff seen - <<'EXPECTED'
in fp32, at once: 6.31
accurate, chunks of 4096: 6.3, gradient within 1%: True
accurate, chunks of 32: 5.7, gradient within 1%: True
balanced, chunks of 4096: 6.3, gradient within 1%: True
balanced, chunks of 32: 5.7, gradient within 1%: True
compact, chunks of 4096: 6.3, gradient within 1%: True
compact, chunks of 32: 5.7, gradient within 1%: True
acc_dtype=float32, chunks of 4096: 6.3, gradient within 1%: True
acc_dtype=float32, chunks of 32: 5.7, gradient within 1%: True
EXPECTED
echo "as described"
