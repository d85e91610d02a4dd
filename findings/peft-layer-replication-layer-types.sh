#!/usr/bin/env bash
# PEFT's layer_replication deepens a model in memory and leaves the config's layer_types at the old length.
#
# Versions:  peft 0.21.2, transformers 5.23.0, torch 2.13.0 (CPU), 2026-11-29
# Guess:     LoraConfig(layer_replication=[[0, 6], [2, 8]]), which PEFT documents for building deeper models as SOLAR
#            does, gives a model of twelve layers that runs, whatever the type.
# Behaviour: num_hidden_layers becomes 12, but layer_types keeps its eight entries. Types whose forward pass reads the
#            list for each layer end in an IndexError at the first call (qwen2, qwen3, gemma2, gemma3_text, cohere2,
#            gpt_oss, smollm3, olmo3); types without the list run (llama, mistral, phi3, granite).
# Seen:      llama        12 layers, no layer_types, runs
#            qwen3        12 layers, 8 layer_types, IndexError: list index out of range
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0
env/bin/pip install --quiet transformers==5.23.0 peft==0.21.2
env/bin/python - <<'PY' 2>/dev/null | tee seen
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM

SIZES = dict(vocab_size=64, hidden_size=32, intermediate_size=64, num_hidden_layers=8)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=16, pad_token_id=0)
for model_type in ("llama", "qwen3", "gemma3_text"):
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **SIZES, **HEADS))
    deeper = get_peft_model(
        model, LoraConfig(r=2, target_modules=["q_proj"], layer_replication=[[0, 6], [2, 8]])
    )
    config = deeper.base_model.model.config
    kinds = len(getattr(config, "layer_types", None) or [])
    try:
        deeper(torch.arange(12)[None])
        outcome = "runs"
    except IndexError as error:
        outcome = f"IndexError: {error}"
    print(model_type, f"{config.num_hidden_layers} layers, {kinds} layer_types, {outcome}")
PY
diff seen - <<'EXPECTED'
llama 12 layers, 0 layer_types, runs
qwen3 12 layers, 8 layer_types, IndexError: list index out of range
gemma3_text 12 layers, 8 layer_types, IndexError: list index out of range
EXPECTED
echo "as described"
