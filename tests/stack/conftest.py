"""The model under test: SmolLM2 as the Hub has it, made 46 layers deep and healed for two steps,
by real commands.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
from stack.helpers import NUM_TOKENS, PROMPT, dus

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing here is on the Hub

# What transformers 4 wrote, and what files on the Hub say: 5 calls these dtype and rope_parameters.
HUB_CONFIG = {
    "torch_dtype": "bfloat16",
    "rope_theta": 100000.0,
    "rope_scaling": None,
    "transformers_version": "4.42.3",
}
HUB_TOKENIZER = {"tokenizer_class": "GPT2Tokenizer", "model_max_length": 8192}


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """SmolLM2-135M-Instruct, its config and tokenizer settings in the words of the Hub's own
    files.
    """
    source, folder = Path(os.environ["SMOLLM2"]), tmp_path_factory.mktemp("models") / "base"
    shutil.copytree(source, folder)
    for name, fields, gone in (
        ("config.json", HUB_CONFIG, {"dtype", "rope_parameters"}),
        ("tokenizer_config.json", HUB_TOKENIZER, {"backend", "is_local", "local_files_only"}),
    ):
        said = json.loads((source / name).read_text())
        (folder / name).write_text(
            json.dumps({key: said[key] for key in said.keys() - gone} | fields, indent=2)
        )
    return folder


@pytest.fixture(scope="session")
def deep(base: Path) -> Path:
    """The base at trim 7, 46 layers, not healed."""
    dus("upscale", base, "--trim", "7", "-o", base.with_name("deep"), "-q")
    return base.with_name("deep")


@pytest.fixture(scope="session")
def healed(deep: Path) -> Path:
    """The same, healed for two steps."""
    corpus, out = deep.with_name("corpus.jsonl"), deep.with_name("healed")
    lines = [json.dumps({"id": name, "text": text}) for name, text in sorted(topics.items())]
    corpus.write_text("\n".join(lines) + "\n", encoding="utf-8")
    size = [
        "--steps",
        "2",
        "--seq-length",
        "128",
        "--batch-tokens",
        "128",
        "--eval-tokens",
        "256",
        "--holdout",
        "5%",
    ]
    dus("heal", deep, "--data", corpus, *size, "-o", out, "-q")
    return out


@pytest.fixture(scope="session")
def tokenizer(base: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(base)


@pytest.fixture(scope="session")
def continuation(healed: Path, tokenizer: Any) -> str:
    """What transformers writes behind PROMPT, greedily and in fp32: what every other program
    must write.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(healed, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    written = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)[
        0, inputs.input_ids.shape[1] :
    ]
    text = str(tokenizer.decode(written, skip_special_tokens=True))
    assert "Paris" in text
    return text
