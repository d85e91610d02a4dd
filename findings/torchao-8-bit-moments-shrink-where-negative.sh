#!/usr/bin/env bash
# In torchao's 8-bit optimizers the first moment's largest negative value shrinks at every step, the largest positive one does not.
#
# Versions:  torchao 0.18.0, torch 2.13.0 (CPU), 2026-11-30
# Guess:     a block of 256 numbers is divided by its largest magnitude and rounded to one of 256 codes, so whatever has
#            that magnitude comes back as it was, with either sign, and storing what was read again changes nothing.
# Behaviour: the codes end at 1.0 on one side and at about -0.993 on the other. A block whose largest number is negative
#            comes back 0.7% smaller and with a smaller scale, each time that it is stored, also if nothing was learned
#            in between: after 100 times at half its value. The second moment, which has no negative numbers, stays.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 torchao==0.18.0 numpy
env/bin/python - 2> err <<'PY' | tee seen
import torch
from torchao.optim.subclass_8bit import OptimState8bit

for signed, sign in ((True, 1.0), (True, -1.0), (False, 1.0)):
    state = OptimState8bit.zeros((256,), signed)
    state.copy_(sign * torch.linspace(0.001, 1, 256))
    for _ in range(100):
        state.copy_(state.dequantize())
    largest = state.dequantize().abs().max().item()
    print(f"signed codes: {signed}, sign {sign:+.0f}: 1.00 is {largest:.2f} after 100 times")
PY
diff seen - <<'EXPECTED'
signed codes: True, sign +1: 1.00 is 1.00 after 100 times
signed codes: True, sign -1: 1.00 is 0.49 after 100 times
signed codes: False, sign +1: 1.00 is 1.00 after 100 times
EXPECTED
echo "as described"
