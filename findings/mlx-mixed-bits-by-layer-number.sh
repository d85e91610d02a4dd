#!/usr/bin/env bash
# mlx-lm's mixed_4_6 gives a matrix 4 or 6 bits by the number of its layer, so equal layers are quantised unlike.
#
# Versions:  mlx-lm 0.32.2, mlx 0.32.4 (CPU, Linux), transformers 5.23.0, 2026-11-30
# Guess:     "mixed" is by kind of matrix: v_proj and down_proj, which the recipe names, have 6 bits, the others 4. The
#            same layer standing twice in a model is the same after quantising.
# Behaviour: v_proj and down_proj have 6 bits in the first and last eighth of the layers and in every third between,
#            else 4. Where a layer stands decides, and so does how many there are: of a model whose layers 3 and 8
#            hold the same numbers, one has 6 bits and the other 4, and three more layers at the end change the bits
#            of layers before them. `mlx_lm.convert --quant-predicate mixed_4_6` uses the same predicate.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet mlx-lm==0.32.2 'mlx[cpu]==0.32.4' transformers==5.23.0
env/bin/python - <<'PY' 2>/dev/null | grep ' layers: ' | tee seen
import mlx.core as mx
from mlx_lm.convert import mixed_quant_predicate_builder
from mlx_lm.models.llama import Model, ModelArgs
from mlx_lm.utils import quantize_model


def down_projections(num_layers):
    model = Model(
        ModelArgs(
            model_type="llama", hidden_size=64, intermediate_size=64, num_hidden_layers=num_layers,
            num_attention_heads=2, num_key_value_heads=2, rms_norm_eps=1e-5, vocab_size=64,
        )
    )
    model.layers[8].update(model.layers[3].parameters())
    mx.eval(model.parameters())
    predicate = mixed_quant_predicate_builder("mixed_4_6", model)
    model, _ = quantize_model(model, {}, 64, 4, quant_predicate=predicate)
    return [layer.mlp.down_proj for layer in model.layers]


for num_layers in (12, 15, 18):
    downs = down_projections(num_layers)
    left, right = (mx.dequantize(d.weight, d.scales, d.biases, d.group_size, d.bits) for d in (downs[3], downs[8]))
    same = "equal" if mx.array_equal(left, right) else "not equal"
    print(num_layers, "layers:", *(d.bits for d in downs), "| layers 3 and 8 are", same)
PY
diff seen - <<'EXPECTED'
12 layers: 6 4 4 6 4 4 6 4 4 6 6 6 | layers 3 and 8 are not equal
15 layers: 6 4 4 6 4 4 6 4 4 6 4 4 6 6 6 | layers 3 and 8 are not equal
18 layers: 6 6 4 4 6 4 4 6 4 4 6 4 4 6 4 6 6 6 | layers 3 and 8 are equal
EXPECTED
echo "as described"
