#!/usr/bin/env bash
# transformers checks the length of layer_types against the depth, and of no other list that tells layers apart.
#
# Versions:  transformers 5.23.0, torch 2.13.0 (CPU), 2026-11-29
# Guess:     configs are validated now (StrictDataclass errors), so every list with an entry for each layer must have
#            num_hidden_layers entries, and indices of layers must be below it.
# Behaviour: layer_types of another length is refused when the config is made. SmolLM3's no_rope_layers of eight
#            entries for six layers is accepted and read from its front; one of four ends in a bare IndexError.
#            Qwen2-MoE's mlp_only_layers and Llama 4's moe_layers accept a layer that is not there: the model runs
#            without the dense or expert layer that was asked for. A depth changed by hand in config.json is thus
#            caught for some families and computes something else for others.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0
env/bin/pip install --quiet transformers==5.23.0
env/bin/python - <<'PY' 2>/dev/null | tee seen
import torch
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_attention_heads=2, num_key_value_heads=2)
IDS = dict(pad_token_id=0, bos_token_id=1, eos_token_id=2)
EXPERTS = dict(num_experts=4, moe_intermediate_size=16, shared_expert_intermediate_size=16)


def outcome(model_type, **fields):
    try:
        config = AutoConfig.for_model(model_type, **SIZES, **IDS, **fields)
    except Exception as error:
        return f"config refused ({type(error).__name__})"
    try:
        AutoModelForCausalLM.from_config(config)(torch.arange(12)[None])
    except Exception as error:
        return f"model refused ({type(error).__name__})"
    return "accepted, and runs"


full = "full_attention"
print("qwen3, 8 layer_types for 6 layers:", outcome("qwen3", num_hidden_layers=6, layer_types=[full] * 8))
print("smollm3, 8 no_rope_layers for 6:", outcome("smollm3", num_hidden_layers=6, no_rope_layers=[1, 1, 1, 0] * 2))
print("smollm3, 4 no_rope_layers for 6:", outcome("smollm3", num_hidden_layers=6, no_rope_layers=[1, 1, 1, 0]))
print("qwen2_moe, mlp_only_layers [9] of 4:", outcome("qwen2_moe", num_hidden_layers=4, mlp_only_layers=[9], **EXPERTS))
print("llama4_text, moe_layers [9] of 4:", outcome("llama4_text", num_hidden_layers=4, moe_layers=[9], num_local_experts=2))
PY
diff seen - <<'EXPECTED'
qwen3, 8 layer_types for 6 layers: config refused (StrictDataclassClassValidationError)
smollm3, 8 no_rope_layers for 6: accepted, and runs
smollm3, 4 no_rope_layers for 6: config refused (IndexError)
qwen2_moe, mlp_only_layers [9] of 4: accepted, and runs
llama4_text, moe_layers [9] of 4: accepted, and runs
EXPECTED
echo "as described"
