"""llama.cpp: its own converter writes the healed model as GGUF, and what runs from there writes
the same text.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from stack.helpers import NUM_TOKENS, PROMPT, run, tensors


@pytest.fixture(scope="module")
def converted(healed: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """By convert_hf_to_gguf.py of the llama.cpp that llama-cpp-python's source release holds."""
    llama_cpp, out = (
        Path(os.environ["STACK"]) / "llama.cpp",
        tmp_path_factory.mktemp("gguf") / "healed.gguf",
    )
    command = (
        sys.executable,
        llama_cpp / "convert_hf_to_gguf.py",
        healed,
        "--outtype",
        "f32",
        "--outfile",
        out,
    )
    run(*command, PYTHONPATH=str(llama_cpp / "gguf-py"))
    return out


def interleaved(tensor: Any, num_heads: int) -> Any:
    """Rows of a query or key projection as llama.cpp's rotary embedding pairs them: halves of a
    head, in turn.
    """
    rows, width = tensor.shape
    return (
        tensor.reshape(num_heads, 2, rows // num_heads // 2, width)
        .swapaxes(1, 2)
        .reshape(rows, width)
    )


def test_every_tensor_is_there_by_name_with_its_values(healed: Path, converted: Path) -> None:
    import gguf
    import torch

    reader = gguf.GGUFReader(converted)
    assert reader.fields["llama.block_count"].contents() == 46
    assert reader.fields["llama.rope.freq_base"].contents() == 100000.0
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, 46)
    found = {tensor.name: torch.from_numpy(tensor.data.copy()) for tensor in reader.tensors}
    heads = {"attn_q": 9, "attn_k": 3}
    for name, value in tensors(healed).items():
        mapped = names.get_name(name, try_suffixes=(".weight",))
        assert mapped is not None, name
        expected = value.float()
        kind = mapped.split(".")[2] if mapped.startswith("blk.") else ""
        if kind in heads:
            expected = interleaved(expected, heads[kind])
        assert found.pop(mapped).equal(expected), name
    assert not found, "no tensor that the model does not have"


def test_llama_cpp_writes_what_transformers_writes(converted: Path, continuation: str) -> None:
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = (
        str(converted),
        128,
        1,
        False,
    )
    params.cpuparams.n_threads = (
        1  # its threads spin while they wait for each other: no good on a shared machine
    )
    server = xllamacpp.Server(params)
    answer = server.handle_completions(
        {"prompt": PROMPT, "max_tokens": NUM_TOKENS, "temperature": 0}
    )
    assert answer["choices"][0]["text"] == continuation
