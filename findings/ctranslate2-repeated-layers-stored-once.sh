#!/usr/bin/env bash
# CTranslate2's converter stores layers of equal weights once, so a deeper model is no larger than its base until it is trained.
#
# Versions:  ctranslate2 4.8.5, transformers 5.23.0, torch 2.13.0, 2026-11-30
# Guess:     model.bin has every weight of the checkpoint; a model of eight layers is as large whether or not its last
#            four are copies of its first four. No other format of this field looks at the values.
# Behaviour: the converter compares all variables of one shape and type by value, and writes an alias for each that is
#            equal to an earlier one, quantised or not. With four of eight layers repeated, model.bin has about half of
#            the bytes. One element that differs brings a matrix back, so the file grows after the first step of
#            training, and a size that was budgeted on the untrained model is too small.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 transformers==5.23.0 ctranslate2==4.8.5 numpy
env/bin/python - 2> err <<'PY' | tee seen
import os

import torch
from ctranslate2.converters import TransformersConverter
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

letters = sorted(pre_tokenizers.ByteLevel.alphabet())
fast = Tokenizer(models.BPE({letter: i for i, letter in enumerate(letters)}, []))
fast.add_special_tokens(["<s>", "</s>", "<unk>"])
tokenizer = PreTrainedTokenizerFast(tokenizer_object=fast, bos_token="<s>", eos_token="</s>", unk_token="<unk>")
torch.manual_seed(0)
sizes = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 4}
model = LlamaForCausalLM(LlamaConfig(num_hidden_layers=8, vocab_size=259, **sizes))


def report(name):
    model.save_pretrained(name)
    tokenizer.save_pretrained(name)
    size = os.path.getsize(f"{name}/model.safetensors")
    for quantization in (None, "int8"):
        out = TransformersConverter(name).convert(f"{name}-{quantization}", quantization=quantization)
        whole = size if quantization is None else size / 4
        print(f"{name}, {quantization}: {os.path.getsize(f'{out}/model.bin') / whole:.1f} of its weights' bytes")


report("distinct")
layers = model.model.layers
for number in range(4, 8):
    layers[number].load_state_dict(layers[number - 4].state_dict())
report("repeated")
with torch.no_grad():
    for layer in layers[4:]:
        for weight in layer.parameters():
            weight.view(-1)[0] += 0.5
report("repeated, then one element changed in each weight")
PY
diff seen - <<'EXPECTED'
distinct, None: 1.0 of its weights' bytes
distinct, int8: 1.0 of its weights' bytes
repeated, None: 0.5 of its weights' bytes
repeated, int8: 0.5 of its weights' bytes
repeated, then one element changed in each weight, None: 1.0 of its weights' bytes
repeated, then one element changed in each weight, int8: 1.0 of its weights' bytes
EXPECTED
echo "as described"
