"""The proof: the written model computes what the base does with its layers rearranged in memory."""

from __future__ import annotations

import copy
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import dus

from dus_cli.architectures import DERIVED_KINDS, KNOWN_TYPES
from dus_cli.layers import source_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

# Sizes by the many names that configs have for them; a type takes those that it knows.
TINY: dict[str, Any] = {
    "hidden_size": 32, "n_embd": 32, "d_model": 32, "embed_dim": 32, "word_embed_proj_dim": 32,
    "intermediate_size": 48, "ffn_dim": 48, "n_inner": 48, "ffn_hidden_size": 64, "shared_expert_intermediate_size": 48,
    "moe_intermediate_size": 16, "num_attention_heads": 4, "n_head": 4, "n_heads": 4, "num_heads": 4,
    "attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "vocab_size": 96, "max_position_embeddings": 64,
    "n_positions": 64, "max_seq_len": 64, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_group": 1, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "state_size": 8, "expand": 2, "rotary_dim": 4,
    "sliding_window": 6, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "n_groups": 2,
    "query_pre_attn_scalar": 8, "linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 8,
    "linear_value_head_dim": 8, "attention_chunk_size": 6, "dropout": 0.0, "attention_dropout": 0.0,
    "hidden_dropout": 0.0, "activation_dropout": 0.0, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0,
}  # fmt: skip

# What a type's class asks of its sizes, and kinds of layers where its defaults have only one.
SPECIAL: dict[str, dict[str, Any]] = {
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "qwen2_moe": {"num_experts": 4},
    "deepseek_v3": {"first_k_dense_replace": 2, "num_nextn_predict_layers": 0, "num_key_value_heads": 4},
    "deepseek_v2": {"first_k_dense_replace": 1, "num_key_value_heads": 4},
    "glm4_moe": {"first_k_dense_replace": 1, "num_nextn_predict_layers": 0},
    "dots1": {"first_k_dense_replace": 1, "n_shared_experts": 1},
    "phi3": {"sliding_window": None},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 3},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 3},
    "smollm3": {"use_sliding_window": True},
    "qwen3_moe": {"mlp_only_layers": [0, 3]},
}

DEPTH_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
NUM_LAYERS, TRIM = 7, 2  # the shift is 3: out of step with patterns of 2, 4 and 6


def tiny_model(model_type: str) -> Any:
    """A random model of this type, every parameter distinct."""
    known = transformers.CONFIG_MAPPING[model_type]().to_dict()
    sizes = {key: value for key, value in TINY.items() if key in known} | SPECIAL.get(model_type, {})
    depth = next(key for key in DEPTH_KEYS if key in known)
    config = transformers.CONFIG_MAPPING[model_type](**sizes, **{depth: NUM_LAYERS})
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn_like(parameter) * 0.2)
    return model


def layer_list(model: Any) -> tuple[Any, str]:
    """The module that holds the decoder's layers, and the attribute's name."""
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, torch.nn.ModuleList) and len(child) == NUM_LAYERS:
                return module, name
    raise LookupError


def rearranged(model: Any, sources: tuple[int, ...]) -> Any:
    """The model with its layers in another order, by hand: every layer's module, and its kind in the config."""
    stacked = copy.deepcopy(model)
    holder, name = layer_list(stacked)
    layers = getattr(holder, name)
    setattr(holder, name, torch.nn.ModuleList([copy.deepcopy(layers[k]) for k in sources]))
    for key in DEPTH_KEYS:
        if key in stacked.config.to_dict():
            setattr(stacked.config, key, len(sources))
    kinds = stacked.config.to_dict().get("layer_types")
    if kinds is not None:
        stacked.config.layer_types = [kinds[k] for k in sources]
    return stacked


def logits(model: Any, tokens: Any) -> Any:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits.float()


@pytest.mark.parametrize("model_type", sorted(KNOWN_TYPES))
@pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models
def test_the_written_model_equals_the_base_rearranged(model_type: str, tmp_path: Path) -> None:
    base = tiny_model(model_type)
    base.save_pretrained(tmp_path / "base")
    check_equality(base, tmp_path)


@pytest.mark.parametrize("model_type", sorted(DERIVED_KINDS))
@pytest.mark.filterwarnings("ignore")
def test_older_files_that_lack_layer_types_keep_each_layer_its_kind(
    model_type: str, tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    base = tiny_model(model_type)
    base.save_pretrained(tmp_path / "base")
    assert len(set(base.config.layer_types)) == 2
    edit_config(tmp_path / "base", layer_types=None)
    check_equality(base, tmp_path)


def check_equality(base: Any, tmp_path: Path) -> None:
    """Up-scale tmp_path/base with the real command; its logits must be those of `base` rearranged."""
    report = dus("upscale", tmp_path / "base", "-t", str(TRIM), "-o", tmp_path / "out", "--json").report
    assert report["warnings"] == []
    sources = source_layers(NUM_LAYERS, TRIM)
    written, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, attn_implementation="eager"
    )
    assert {key: value for key, value in info.items() if value} == {}
    tokens = torch.arange(3, 23).reshape(1, 20)  # longer than the window of 6
    expected = logits(rearranged(base, sources), tokens)
    assert torch.isfinite(expected).all()
    torch.testing.assert_close(logits(written.eval(), tokens), expected, rtol=1e-5, atol=1e-5)
    assert not torch.allclose(expected, logits(base, tokens), atol=1e-3)  # the comparison can fail


# --- the real model --------------------------------------------------------------------------------

REAL = os.environ.get("SMOLLM2")
# Mean cross-entropy of the base with its layers stacked in memory at trims 0, 4, 7 and 10, same text.
LOSSES = [7.288, 5.359, 3.573, 3.154]
needs_model = pytest.mark.skipif(not REAL, reason="SMOLLM2 names no checkpoint; `make test` makes one")


@needs_model
def test_smollm2_at_trim_7_equals_itself_rearranged(tmp_path: Path) -> None:
    assert REAL is not None
    report = dus("upscale", REAL, "--trim", "7", "-o", tmp_path / "out", "--json").report
    assert report["num_layers"] == {"base": 30, "output": 46}
    assert report["parameters"] == {"base": 134_515_008, "output": 191_156_544}
    base = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    written = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(100, 164).reshape(1, 64)
    layers = base.model.layers
    base.model.layers = torch.nn.ModuleList([copy.deepcopy(layers[k]) for k in source_layers(30, 7)])
    base.config.num_hidden_layers = 46
    assert torch.equal(logits(written, tokens), logits(base, tokens))
    tied = json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert tied
    assert written.lm_head.weight is written.model.embed_tokens.weight


@needs_model
def test_the_loss_right_after_scaling_falls_with_the_trim(tmp_path: Path) -> None:
    """Real text that every clone has, the licence. docs/benchmarks.md has the figures on held-out text."""
    assert REAL is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    tokens = torch.tensor([tokenizer(text)["input_ids"][:512]])

    def loss(folder: Path | str) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        with torch.no_grad():
            return float(model(input_ids=tokens, labels=tokens).loss)

    losses = []
    for trim in (0, 4, 7, 10):
        dus("upscale", REAL, "--trim", str(trim), "-o", tmp_path / str(trim), "-q")
        losses.append(loss(tmp_path / str(trim)))
        shutil.rmtree(tmp_path / str(trim))
    assert losses == pytest.approx(LOSSES, abs=0.02)
    assert sorted(losses, reverse=True) == losses
    assert loss(REAL) < losses[-1]


@needs_model
def test_the_scaled_model_holds_its_base(tmp_path: Path) -> None:
    """The first n − m and the last m layers of the output are the whole base."""
    assert REAL is not None
    dus("upscale", REAL, "--trim", "7", "-o", tmp_path / "out", "-q")
    base = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    scaled = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32).eval()
    tokens = torch.arange(100, 132).reshape(1, 32)
    layers = scaled.model.layers
    scaled.model.layers = torch.nn.ModuleList([*layers[:23], *layers[39:]])
    scaled.config.num_hidden_layers = 30
    assert torch.equal(logits(scaled, tokens), logits(base, tokens))
