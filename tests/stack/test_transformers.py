"""Generation in transformers, and older transformers that load what a newer one healed."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from stack.helpers import PROMPT, ROOT, logits, run

# Run by an older transformers, so it imports nothing of ours.
OLDER = """
import json, sys, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(sys.argv[1], torch_dtype="auto")
assert model.dtype == torch.bfloat16, model.dtype
with torch.no_grad():
    logits = model.float()(torch.tensor([json.loads(sys.argv[2])])).logits[0]
print(json.dumps({"version": transformers.__version__, "last": logits[-1].tolist()}))
"""

OLDER_TOKENIZER = """
import json, sys, transformers
print(json.dumps(transformers.AutoTokenizer.from_pretrained(sys.argv[1])(sys.argv[2]).input_ids))
"""


def by_older(version: str, program: str, *arguments: str | Path) -> Any:
    """What a program of an older transformers prints."""
    libraries = Path(os.environ["STACK"]) / f"transformers-{version}"
    return json.loads(
        run(sys.executable, "-W", "ignore", "-c", program, *arguments, PYTHONPATH=str(libraries))
    )


def test_the_healed_model_generates_in_the_pipeline(healed: Path, tokenizer: Any) -> None:
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(healed), dtype="float32")
    assert len(generate.model.model.layers) == 46
    text = generate(PROMPT, max_new_tokens=8, do_sample=False, return_full_text=False)[0][
        "generated_text"
    ]
    assert "Paris" in text, text
    messages = [{"role": "user", "content": PROMPT}]
    answer = generate(messages, max_new_tokens=8, do_sample=False)[0]["generated_text"]
    assert answer[:-1] == messages
    assert answer[-1]["role"] == "assistant"
    assert answer[-1]["content"]


def test_generation_with_a_cache_computes_what_generation_without_one_does(
    healed: Path, tokenizer: Any
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(healed, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    cached, plain = (
        model.generate(**inputs, max_new_tokens=8, do_sample=False, use_cache=use)
        for use in (True, False)
    )
    assert cached.tolist() == plain.tolist()


@pytest.mark.parametrize("version", ["4.57.6", "4.40.2"])
def test_an_older_transformers_computes_the_same(
    version: str, healed: Path, tokenizer: Any
) -> None:
    ids = tokenizer(PROMPT).input_ids
    said = by_older(version, OLDER, healed, json.dumps(ids))
    assert said["version"] == version
    expected = logits(healed, ids)[-1]
    assert max(abs(a - b) for a, b in zip(said["last"], expected.tolist(), strict=True)) < 1e-3


def test_an_older_transformers_reads_the_tokenizer(healed: Path, tokenizer: Any) -> None:
    # 4.40 comes with a tokenizers that does not read this base's tokenizer.json, which is newer
    # than it.
    assert by_older("4.57.6", OLDER_TOKENIZER, healed, PROMPT) == tokenizer(PROMPT).input_ids


def test_the_fields_that_older_versions_read_are_as_the_base_has_them(
    base: Path, healed: Path
) -> None:
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (base, healed))
    assert after == before | {"num_hidden_layers": 46}


def test_the_versions_are_those_that_the_table_names() -> None:
    from importlib.metadata import version

    page = (ROOT / "docs/ecosystem.md").read_text()
    for name in (
        "transformers",
        "trl",
        "peft",
        "lm_eval",
        "datasets",
        "mergekit",
        "gguf",
        "xllamacpp",
    ):
        assert f"{name.replace('_', '-')} {version(name)}" in page, name
