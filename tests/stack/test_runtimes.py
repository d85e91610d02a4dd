"""Runtimes that make their own form of the checkpoint, where they are installed:
docs/ecosystem.md has the commands.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import pytest
from stack.helpers import NUM_TOKENS, PROMPT, run

# vLLM has an environment of its own, so it is a program.
VLLM = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompt, num_tokens, out = sys.argv[1:]
    model = LLM(folder, dtype="float32", max_model_len=128, enforce_eager=True)
    answer = model.generate([prompt], SamplingParams(temperature=0, max_tokens=int(num_tokens)))
    open(out, "w").write(json.dumps(answer[0].outputs[0].text))
"""


def test_ctranslate2_writes_what_transformers_writes(
    healed: Path, tokenizer: Any, continuation: str, tmp_path: Path
) -> None:
    ctranslate2 = pytest.importorskip("ctranslate2")
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(str(healed)).convert(str(tmp_path / "model"))
    generator = ctranslate2.Generator(str(tmp_path / "model"), device="cpu", compute_type="float32")
    start = tokenizer.convert_ids_to_tokens(tokenizer(PROMPT).input_ids)
    answer = generator.generate_batch(
        [start], max_length=NUM_TOKENS, sampling_topk=1, include_prompt_in_result=False
    )
    assert tokenizer.decode(answer[0].sequences_ids[0]) == continuation


def test_onnxruntime_genai_writes_what_transformers_writes(
    healed: Path, continuation: str, tmp_path: Path
) -> None:
    genai = pytest.importorskip("onnxruntime_genai")
    builder = (sys.executable, "-m", "onnxruntime_genai.models.builder")
    run(
        *builder,
        "-i",
        healed,
        "-o",
        tmp_path / "model",
        "-p",
        "fp32",
        "-e",
        "cpu",
        "-c",
        tmp_path / "cache",
    )
    model = genai.Model(str(tmp_path / "model"))
    tokenizer = genai.Tokenizer(model)
    ids, params = tokenizer.encode(PROMPT), genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + NUM_TOKENS, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    assert tokenizer.decode(generator.get_sequence(0)[len(ids) :]) == continuation


@pytest.mark.skipif(
    "VLLM_PYTHON" not in os.environ,
    reason="VLLM_PYTHON names the Python of an environment with vLLM",
)
def test_vllm_writes_what_transformers_writes(
    healed: Path, continuation: str, tmp_path: Path
) -> None:
    (tmp_path / "generate.py").write_text(VLLM)
    arguments = (
        os.environ["VLLM_PYTHON"],
        tmp_path / "generate.py",
        healed,
        PROMPT,
        str(NUM_TOKENS),
    )
    run(*arguments, tmp_path / "answer.json", VLLM_CPU_KVCACHE_SPACE="1", PYTHONPATH="")
    assert json.loads((tmp_path / "answer.json").read_text()) == continuation
