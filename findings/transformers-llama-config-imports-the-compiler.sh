#!/usr/bin/env bash
# transformers 5.23: reading the config.json of a Llama imports torch's compiler, DTensor and sympy; that of a Mistral does not.
#
# Versions:  transformers 5.23.0, torch 2.13.0, 2026-11-30
# Guess:     a configuration is data: AutoConfig.from_pretrained imports at most torch itself, and the same for every type.
#            torch._dynamo, DTensor and sympy come with a model.
# Behaviour: so it is for most types. The configurations of llama, gemma4, olmo_hybrid and some others check their fields with
#            a module that imports the activation functions, and these import kernels, generation and so torch._dynamo: more
#            than a thousand modules, about as long as torch itself takes. AutoTokenizer reads config.json first, so a program
#            that only tokenises for a Llama waits for it, too. USE_TORCH=0 changes nothing.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > ask.py <<'PY'
import json, os, sys
from pathlib import Path

from tokenizers import Tokenizer, models
from transformers import AutoConfig, AutoTokenizer

reader, kind = sys.argv[1:]
Path("model").mkdir(exist_ok=True)
Path("model/config.json").write_text(json.dumps({"model_type": kind}))
Path("model/tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
Tokenizer(models.WordLevel({"one": 0}, unk_token="one")).save("model/tokenizer.json")
{"config": AutoConfig, "tokenizer": AutoTokenizer}[reader].from_pretrained("model")
watched = ("torch", "torch._dynamo", "torch.distributed.tensor", "sympy")
print(f"{reader} of {kind}, USE_TORCH={os.environ.get('USE_TORCH')}:", *(name for name in watched if name in sys.modules))
PY
python3 -m venv env
env/bin/pip install --quiet torch==2.13.0 transformers==5.23.0
{
  for kind in mistral qwen3 gpt2 gemma3_text llama gemma4_text olmo_hybrid; do env/bin/python ask.py config "$kind"; done
  for kind in mistral llama; do env/bin/python ask.py tokenizer "$kind"; done
  USE_TORCH=0 env/bin/python ask.py tokenizer llama
} 2>/dev/null | tee seen
diff seen - <<'EXPECTED'
config of mistral, USE_TORCH=None: torch
config of qwen3, USE_TORCH=None: torch
config of gpt2, USE_TORCH=None: torch
config of gemma3_text, USE_TORCH=None: torch
config of llama, USE_TORCH=None: torch torch._dynamo torch.distributed.tensor sympy
config of gemma4_text, USE_TORCH=None: torch torch._dynamo torch.distributed.tensor sympy
config of olmo_hybrid, USE_TORCH=None: torch torch._dynamo torch.distributed.tensor sympy
tokenizer of mistral, USE_TORCH=None: torch
tokenizer of llama, USE_TORCH=None: torch torch._dynamo torch.distributed.tensor sympy
tokenizer of llama, USE_TORCH=0: torch torch._dynamo torch.distributed.tensor sympy
EXPECTED
echo "as described"
