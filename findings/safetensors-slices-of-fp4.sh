#!/usr/bin/env bash
# safetensors writes and loads packed 4-bit floats, but get_slice cannot cut them: it says a shape that it then cannot give.
#
# Versions:  safetensors 0.8.0, torch 2.13.0 (CPU), numpy 2.4.6, 2026-11-30
# Guess:     a dtype that save_file and load_file take round trip can be sliced as well; tensor-parallel loaders read
#            one worker's rows by get_slice, whatever the dtype.
# Behaviour: torch.float4_e2m1fn_x2 holds two numbers an element, the header's F4 counts numbers: a tensor of (2, 8)
#            is [2, 16] in the file. load_file undoes this. get_slice(...).get_shape() does not, and every cut, of
#            whole rows too, ends in a RuntimeError about a shape. F8_E8M0, the scales beside such weights, is cut.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0
env/bin/pip install --quiet safetensors==0.8.0 numpy==2.4.6
env/bin/python - <<'PY' 2>/dev/null | tee seen
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

bytes_ = torch.arange(16, dtype=torch.uint8).reshape(2, 8)
for name in ("float4_e2m1fn_x2", "float8_e8m0fnu"):
    tensor = bytes_.view(getattr(torch, name))
    save_file({"weight": tensor}, "model.safetensors")
    whole = load_file("model.safetensors")["weight"]
    print(name, tuple(tensor.shape), "loaded:", tuple(whole.shape), whole.dtype == tensor.dtype)
    with safe_open("model.safetensors", "pt") as file:
        part = file.get_slice("weight")
        print("  get_slice:", part.get_dtype(), part.get_shape())
        try:
            print("  its first row:", tuple(part[:1].shape))
        except RuntimeError as error:
            print("  its first row: RuntimeError:", error)
PY
diff seen - <<'EXPECTED'
float4_e2m1fn_x2 (2, 8) loaded: (2, 8) True
  get_slice: F4 [2, 16]
  its first row: RuntimeError: shape '[2, 16]' is invalid for input of size 16
float8_e8m0fnu (2, 8) loaded: (2, 8) True
  get_slice: F8_E8M0 [2, 8]
  its first row: (1, 8)
EXPECTED
echo "as described"
