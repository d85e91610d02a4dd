"""The output is an ordinary dense model: it generates in transformers' pipeline, and goes to GGUF
and back.

What takes more than the test extra (TRL, PEFT, lm-evaluation-harness, mergekit, llama.cpp, older
versions of transformers) is in tests/stack, run by `make stack`; docs/ecosystem.md has the results.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
gguf = pytest.importorskip("gguf")

import tiny  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about GGUF

IDS = list(range(97, 117))


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six layers of a base of four."""
    folder = tmp_path_factory.mktemp("stack")
    return tiny.upscaled(
        tiny.write_base(folder / "base", tie_word_embeddings=False), folder / "deep"
    )


def logits(model: Any) -> Any:
    with torch.no_grad():
        return model.eval()(torch.tensor([IDS])).logits[0]


def test_it_generates_in_transformers_pipeline(deep: Path) -> None:
    from transformers import pipeline

    generate = pipeline("text-generation", model=str(deep), dtype="float32")
    assert len(generate.model.model.layers) == 6
    text = generate("the seam", max_new_tokens=5, do_sample=False)[0]["generated_text"]
    ids = generate.tokenizer("the seam").input_ids
    for _ in range(5):  # the same greedy choices, one forward at a time
        with torch.no_grad():
            ids.append(int(generate.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert text == generate.tokenizer.decode(ids, skip_special_tokens=True)


def interleaved(tensor: Any, num_heads: int) -> Any:
    """Rows of a query or key projection as GGUF's llama has them for its rotary embedding: a
    head's halves in turn.
    """
    rows, width = tensor.shape
    return (
        tensor.reshape(num_heads, 2, rows // num_heads // 2, width)
        .swapaxes(1, 2)
        .reshape(rows, width)
    )


def write_gguf(folder: Path, path: Path) -> None:
    """A llama checkpoint as GGUF, named by the gguf package's own table for its number of
    layers.
    """
    config = json.loads((folder / "config.json").read_text())
    depth = config["num_hidden_layers"]
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(depth)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_vocab_size(config["vocab_size"])
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, depth)
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, tensor in tiny.weights(folder).items():
        mapped = names.get_name(name, try_suffixes=(".weight",))
        assert mapped is not None, f"{name} has no name in GGUF"
        num_heads = heads.get(name.split(".")[-2])
        value = tensor.float() if num_heads is None else interleaved(tensor.float(), num_heads)
        writer.add_tensor(mapped, value.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def test_it_goes_to_gguf_and_back(deep: Path, tmp_path: Path) -> None:
    from transformers import AutoModelForCausalLM, GgufConfig

    write_gguf(deep, tmp_path / "deep.gguf")
    reader = gguf.GGUFReader(tmp_path / "deep.gguf")
    assert reader.fields["llama.block_count"].contents() == 6
    assert len(reader.tensors) == len(tiny.weights(deep))
    blocks = {
        tensor.name.split(".")[1] for tensor in reader.tensors if tensor.name.startswith("blk.")
    }
    assert blocks == {str(block) for block in range(6)}
    expected = AutoModelForCausalLM.from_pretrained(deep, dtype=torch.float32)
    again = AutoModelForCausalLM.from_pretrained(
        tmp_path,
        gguf_file="deep.gguf",
        dtype=torch.float32,
        quantization_config=GgufConfig(dequantize=True),
    )
    ours, theirs = expected.state_dict(), again.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(ours[name].equal(theirs[name]) for name in ours)
    torch.testing.assert_close(logits(again), logits(expected), atol=1e-5, rtol=0)
