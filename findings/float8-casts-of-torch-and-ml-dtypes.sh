#!/usr/bin/env bash
# torch and ml_dtypes (JAX, ONNX, TensorFlow) cast the same float32 to different float8 numbers.
#
# Versions:  torch 2.13.0 (CPU), ml_dtypes 0.6.0, numpy 2.4.6, 2026-11-30
# Guess:     formats of one name are one format: round to nearest even, and NaN for what does not fit where there is no
#            infinity. A checkpoint quantised by either is the same bytes.
# Behaviour: float8_e4m3fn: torch saturates, infinity too, at 448, where ml_dtypes gives NaN. float8_e4m3fnuz (at most 240): both
#            give NaN, so torch saturates one of the two formats and not the other. float8_e8m0fnu, the scales of MX
#            formats, which hold powers of two alone: torch drops the sign and gives 2**-127 for 0, ml_dtypes NaN for
#            both. float8_e5m2 agrees.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0
env/bin/pip install --quiet numpy==2.4.6 ml_dtypes==0.6.0
env/bin/python - <<'PY' 2>/dev/null | tee seen
import ml_dtypes
import numpy as np
import torch

numbers = np.array([0, -1, 448, 464, 465, 1000, np.inf], dtype=np.float32)
print(" " * 24, numbers.tolist())
for name in ("float8_e4m3fn", "float8_e4m3fnuz", "float8_e5m2", "float8_e8m0fnu"):
    of_torch = torch.from_numpy(numbers).to(getattr(torch, name)).float().tolist()
    of_ml_dtypes = numbers.astype(getattr(ml_dtypes, name)).astype(np.float32).tolist()
    print(f"{name:15} torch    ", [float(f"{number:.3g}") for number in of_torch])
    print(f"{name:15} ml_dtypes", [float(f"{number:.3g}") for number in of_ml_dtypes])
PY
diff seen - <<'EXPECTED'
                         [0.0, -1.0, 448.0, 464.0, 465.0, 1000.0, inf]
float8_e4m3fn   torch     [0.0, -1.0, 448.0, 448.0, 448.0, 448.0, 448.0]
float8_e4m3fn   ml_dtypes [0.0, -1.0, 448.0, 448.0, nan, nan, nan]
float8_e4m3fnuz torch     [0.0, -1.0, nan, nan, nan, nan, nan]
float8_e4m3fnuz ml_dtypes [0.0, -1.0, nan, nan, nan, nan, nan]
float8_e5m2     torch     [0.0, -1.0, 448.0, 448.0, 448.0, 1020.0, inf]
float8_e5m2     ml_dtypes [0.0, -1.0, 448.0, 448.0, 448.0, 1020.0, inf]
float8_e8m0fnu  torch     [5.88e-39, 1.0, 512.0, 512.0, 512.0, 1020.0, nan]
float8_e8m0fnu  ml_dtypes [nan, nan, 512.0, 512.0, 512.0, 1020.0, nan]
EXPECTED
echo "as described"
