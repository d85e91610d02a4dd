#!/usr/bin/env bash
# transformers 5: add_bos_token in tokenizer_config.json says nothing for Llama's tokenizer, where 4.57 obeyed it.
#
# Versions:  transformers 5.23.0 and 4.57.3, tokenizers as each pins it, 2026-11-30
# Guess:     add_bos_token decides for LlamaTokenizerFast, as it has for years, whatever tokenizer.json says; for the
#            plain PreTrainedTokenizerFast tokenizer.json alone decides.
# Behaviour: the second half holds in both versions. In 5.23 LlamaTokenizerFast is like the plain class: the
#            post-processor stored in tokenizer.json decides, and the field neither adds <s> nor leaves it out. Models
#            whose tokenizer.json does not agree with the field (true beside no post-processor, or false beside one) are
#            given other ids by the two versions, with nothing said.
# Seen:      see EXPECTED below
set -euo pipefail
work=$(mktemp -d); trap 'rm -rf "$work"' EXIT; cd "$work"
cat > ask.py <<'PY'
import json, logging, os
from pathlib import Path

from tokenizers import Tokenizer, models, normalizers, processors
from transformers import AutoTokenizer
from transformers.utils import logging as theirs

theirs.set_verbosity_error()
merges = [("▁", "o"), ("n", "e"), ("▁o", "ne"), ("▁", "t"), ("w", "o"), ("▁t", "wo")]
pieces = ["<unk>", "<s>", "</s>", *"▁onetw", *("".join(pair) for pair in merges)]
words = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}


def folder(name, begins, **fields):
    path = Path(name)
    path.mkdir(exist_ok=True)
    made = Tokenizer(models.BPE(words, merges, unk_token="<unk>"))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    if begins:
        made.post_processor = processors.TemplateProcessing(single="<s> $A", pair="<s> $A <s> $B", special_tokens=[("<s>", 1)])
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.save(str(path / "tokenizer.json"))
    config = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", **fields}
    (path / "tokenizer_config.json").write_text(json.dumps(config))
    (path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    return path


for kind in ("PreTrainedTokenizerFast", "LlamaTokenizerFast"):
    for begins in (True, False):
        for add in (True, False):
            path = folder(f"{kind}-{begins}-{add}", begins, tokenizer_class=kind, add_bos_token=add)
            tokenizer = AutoTokenizer.from_pretrained(path)
            said = "<s> in tokenizer.json" if begins else "none in tokenizer.json"
            print(f"{kind}, {said}, add_bos_token {add}:", tokenizer.convert_ids_to_tokens(tokenizer("one two").input_ids))
PY
for version in 5.23.0 4.57.3; do
  python3 -m venv "env-$version"
  "env-$version/bin/pip" install --quiet "transformers==$version"
  echo "transformers $version"
  "env-$version/bin/python" ask.py
done 2>/dev/null | tee seen
diff seen - <<'EXPECTED'
transformers 5.23.0
PreTrainedTokenizerFast, <s> in tokenizer.json, add_bos_token True: ['<s>', '▁one', '▁two']
PreTrainedTokenizerFast, <s> in tokenizer.json, add_bos_token False: ['<s>', '▁one', '▁two']
PreTrainedTokenizerFast, none in tokenizer.json, add_bos_token True: ['▁one', '▁two']
PreTrainedTokenizerFast, none in tokenizer.json, add_bos_token False: ['▁one', '▁two']
LlamaTokenizerFast, <s> in tokenizer.json, add_bos_token True: ['<s>', '▁one', '▁two']
LlamaTokenizerFast, <s> in tokenizer.json, add_bos_token False: ['<s>', '▁one', '▁two']
LlamaTokenizerFast, none in tokenizer.json, add_bos_token True: ['▁one', '▁two']
LlamaTokenizerFast, none in tokenizer.json, add_bos_token False: ['▁one', '▁two']
transformers 4.57.3
PreTrainedTokenizerFast, <s> in tokenizer.json, add_bos_token True: ['<s>', '▁one', '▁two']
PreTrainedTokenizerFast, <s> in tokenizer.json, add_bos_token False: ['<s>', '▁one', '▁two']
PreTrainedTokenizerFast, none in tokenizer.json, add_bos_token True: ['▁one', '▁two']
PreTrainedTokenizerFast, none in tokenizer.json, add_bos_token False: ['▁one', '▁two']
LlamaTokenizerFast, <s> in tokenizer.json, add_bos_token True: ['<s>', '▁one', '▁two']
LlamaTokenizerFast, <s> in tokenizer.json, add_bos_token False: ['▁one', '▁two']
LlamaTokenizerFast, none in tokenizer.json, add_bos_token True: ['<s>', '▁one', '▁two']
LlamaTokenizerFast, none in tokenizer.json, add_bos_token False: ['▁one', '▁two']
EXPECTED
echo "as described"
