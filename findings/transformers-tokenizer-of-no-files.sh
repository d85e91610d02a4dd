#!/usr/bin/env bash
# AutoTokenizer makes a tokenizer of a folder without any file of one: it has one token, and encodes every text as nothing.
#
# Versions:  transformers 5.23.0 with tokenizers 0.23.3, 2026-11-30
# Guess:     a folder that holds config.json alone, as a download that was filtered for weights leaves it, is refused
#            for every architecture: the tokenizer has nothing to be made from.
# Behaviour: for Llama and Mistral it raises ValueError. For Qwen2 and GPT-2 it gives a tokenizer whose only token is the
#            end-of-text, for which "Depth up-scaling" has no ids at all, and an empty batch goes on to the model.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
python3 -m venv env
env/bin/pip install --quiet transformers==5.23.0 tokenizers==0.23.3
env/bin/python - 2> err <<'PY' | tee seen
from transformers import AutoTokenizer, GPT2Config, LlamaConfig, MistralConfig, Qwen2Config

for kind in (LlamaConfig, MistralConfig, Qwen2Config, GPT2Config):
    folder = kind.model_type
    kind().save_pretrained(folder)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder)
        print(folder, "tokens:", len(tokenizer), "ids:", tokenizer("Depth up-scaling")["input_ids"])
    except ValueError:
        print(folder, "ValueError")
PY
diff seen - <<'EXPECTED'
llama ValueError
mistral ValueError
qwen2 tokens: 1 ids: []
gpt2 tokens: 1 ids: []
EXPECTED
echo "as described"
