"""Checkpoints for tests and benchmarks, without torch: real shapes, with random bytes or the layer's
number as content.
"""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

Tensor = tuple[str, str, tuple[int, ...]]  # name, dtype, shape
Fill = Callable[[str, int], bytes]  # the bytes of a tensor, or of a piece of it
BITS = {
    "F64": 64,
    "I64": 64,
    "F32": 32,
    "I32": 32,
    "F16": 16,
    "BF16": 16,
    "F8_E4M3": 8,
    "I8": 8,
    "U8": 8,
    "F4": 4,
}


def num_bytes(tensor: Tensor) -> int:
    elements = 1
    for size in tensor[2]:
        elements *= size
    return elements * BITS[tensor[1]] // 8


def llama_tensors(
    num_layers: int,
    hidden: int = 64,
    intermediate: int = 128,
    kv: int = 32,
    vocab: int = 256,
    dtype: str = "BF16",
    *,
    tied: bool = False,
) -> list[Tensor]:
    """The tensors of a Llama or Mistral model, in no particular order of layers."""
    tensors: list[Tensor] = [("model.embed_tokens.weight", dtype, (vocab, hidden))]
    for layer in range(num_layers):
        shapes = {
            "input_layernorm": (hidden,),
            "mlp.down_proj": (hidden, intermediate),
            "mlp.gate_proj": (intermediate, hidden),
            "mlp.up_proj": (intermediate, hidden),
            "post_attention_layernorm": (hidden,),
            "self_attn.k_proj": (kv, hidden),
            "self_attn.o_proj": (hidden, hidden),
            "self_attn.q_proj": (hidden, hidden),
            "self_attn.v_proj": (kv, hidden),
        }
        tensors += [
            (f"model.layers.{layer}.{name}.weight", dtype, shape) for name, shape in shapes.items()
        ]
    tensors.append(("model.norm.weight", dtype, (hidden,)))
    return tensors if tied else [*tensors, ("lm_head.weight", dtype, (vocab, hidden))]


def llama_config(
    num_layers: int, hidden: int = 64, intermediate: int = 128, vocab: int = 256
) -> dict[str, Any]:
    return {
        "architectures": ["LlamaForCausalLM"],
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "model_type": "llama",
        "num_attention_heads": 4,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-05,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
    }


def _scaled(name: str, rows: int, columns: int, *, is_fp8: bool) -> list[Tensor]:
    """A matrix; in FP8 with a scale for each block of 128 x 128, as DeepSeek-V3 stores it."""
    if not is_fp8:
        return [(f"{name}.weight", "BF16", (rows, columns))]
    scales = (-(-rows // 128), -(-columns // 128))
    return [
        (f"{name}.weight", "F8_E4M3", (rows, columns)),
        (f"{name}.weight_scale_inv", "F32", scales),
    ]


def moe_tensors(
    num_layers: int, num_experts: int, hidden: int, expert: int, vocab: int, *, is_fp8: bool = False
) -> list[Tensor]:
    """The tensors of a DeepSeek-V3 whose first layer is dense: `expert` is the intermediate size
    of an expert.
    """
    tensors: list[Tensor] = [("model.embed_tokens.weight", "BF16", (vocab, hidden))]
    shapes = {
        "gate_proj": (expert, hidden),
        "up_proj": (expert, hidden),
        "down_proj": (hidden, expert),
    }
    attention = {
        "q_a_proj": (1536, hidden),
        "q_b_proj": (3 * hidden, 1536),
        "kv_a_proj_with_mqa": (576, hidden),
        "kv_b_proj": (4 * hidden, 512),
        "o_proj": (hidden, 2 * hidden),
    }
    norms = {"input_layernorm": hidden, "post_attention_layernorm": hidden}
    norms |= {"self_attn.q_a_layernorm": 1536, "self_attn.kv_a_layernorm": 512}
    for layer in range(num_layers):
        prefix = f"model.layers.{layer}"
        tensors += [(f"{prefix}.{name}.weight", "BF16", (size,)) for name, size in norms.items()]
        for name, (rows, columns) in attention.items():
            tensors += _scaled(f"{prefix}.self_attn.{name}", rows, columns, is_fp8=is_fp8)
        modules = (
            [f"experts.{i}" for i in range(num_experts)] + ["shared_experts"] if layer else [""]
        )
        if layer:
            tensors.append((f"{prefix}.mlp.gate.weight", "BF16", (num_experts, hidden)))
            tensors.append((f"{prefix}.mlp.gate.e_score_correction_bias", "F32", (num_experts,)))
        for module in modules:
            for name, (rows, columns) in shapes.items():
                place = ".".join(filter(None, (prefix, "mlp", module, name)))
                tensors += _scaled(place, rows, columns, is_fp8=is_fp8)
    return [
        *tensors,
        ("model.norm.weight", "BF16", (hidden,)),
        ("lm_head.weight", "BF16", (vocab, hidden)),
    ]


def moe_config(
    num_layers: int, num_experts: int, hidden: int, expert: int, vocab: int, *, is_fp8: bool = False
) -> dict[str, Any]:
    quantisation = {
        "quant_method": "fp8",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
        "activation_scheme": "dynamic",
    }
    return {
        "architectures": ["DeepseekV3ForCausalLM"],
        "first_k_dense_replace": 1,
        "hidden_act": "silu",
        "hidden_size": hidden,
        "intermediate_size": expert,
        "kv_lora_rank": 512,
        "model_type": "deepseek_v3",
        "moe_intermediate_size": expert,
        "n_routed_experts": num_experts,
        "n_shared_experts": 1,
        "num_attention_heads": 64,
        "num_experts_per_tok": 8,
        "num_hidden_layers": num_layers,
        "num_key_value_heads": 64,
        "num_nextn_predict_layers": 0,
        "q_lora_rank": 1536,
        "rms_norm_eps": 1e-06,
        "tie_word_embeddings": False,
        "vocab_size": vocab,
        **({"quantization_config": quantisation} if is_fp8 else {}),
    }


def header_bytes(entries: Mapping[str, Any], *, pad_to: int = 8) -> bytes:
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-(8 + len(text)) % pad_to)
    return struct.pack("<Q", len(text)) + text


def write_shard(
    path: Path,
    tensors: Iterable[Tensor],
    fill: Fill | None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a safetensors file with tensors in the library's order: by falling element size, then
    by name. Without `fill` the data is a hole, so that a file of any size takes no disk.
    """
    ordered = sorted(tensors, key=lambda t: (-BITS[t[1]], t[0]))
    entries: dict[str, Any] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    offset = 0
    for tensor in ordered:
        end = offset + num_bytes(tensor)
        entries[tensor[0]] = {"dtype": tensor[1], "shape": tensor[2], "data_offsets": [offset, end]}
        offset = end
    with path.open("wb") as file:
        file.write(header_bytes(entries))
        if fill is None:
            file.truncate(file.tell() + offset)
            return
        for tensor in ordered:
            remaining = num_bytes(tensor)
            # in pieces, so that a benchmark's source does not need its size in memory
            while remaining:
                piece = fill(tensor[0], min(remaining, 1 << 24))
                file.write(piece)
                remaining -= len(piece)


def fill_with_layer(name: str, size: int) -> bytes:
    """Make every byte the layer's number (0xEE outside of the layers), so that a test sees which
    layer is where.
    """
    parts = [part for part in name.split(".") if part.isdecimal()]
    return bytes([int(parts[0]) if parts else 0xEE]) * size


def fill_randomly(_name: str, size: int) -> bytes:
    return os.urandom(size)


def write_checkpoint(
    folder: Path,
    tensors: list[Tensor],
    config: Mapping[str, Any],
    *,
    num_shards: int = 1,
    fill: Fill | None = fill_with_layer,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint in one file, or in `num_shards` shards of about equal size with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if num_shards == 1:
        write_shard(folder / "model.safetensors", tensors, fill, metadata)
        return folder
    total = sum(map(num_bytes, tensors))
    groups: list[list[Tensor]] = [[] for _ in range(num_shards)]
    seen = 0
    for tensor in tensors:
        groups[min(num_shards - 1, seen * num_shards // total)].append(tensor)
        seen += num_bytes(tensor)
    return write_in_shards(folder, groups, config, fill=fill, metadata=metadata)


def write_in_shards(
    folder: Path,
    groups: Sequence[Sequence[Tensor]],
    config: Mapping[str, Any],
    *,
    fill: Fill | None = None,
    metadata: Mapping[str, str] | None = None,
) -> Path:
    """Write a checkpoint whose shards hold these groups of tensors, with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    total = sum(num_bytes(tensor) for group in groups for tensor in group)
    weight_map: dict[str, str] = {}
    for number, group in enumerate(groups, start=1):
        name = f"model-{number:05}-of-{len(groups):05}.safetensors"
        write_shard(folder / name, group, fill, metadata)
        weight_map |= {tensor[0]: name for tensor in group}
    index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    return folder


def write_mistral(
    folder: Path, num_layers: int = 32, hidden: int = 4096, fill: Fill | None = fill_randomly
) -> Path:
    """Write a model of Mistral-7B-v0.1's shape: with 32 layers and hidden size 4096, 14.48 GB of
    random bf16 in three shards.
    """
    tensors = llama_tensors(num_layers, hidden, hidden * 7 // 2, hidden // 4, 32_000)
    config = llama_config(num_layers, hidden, hidden * 7 // 2, 32_000) | {
        "architectures": ["MistralForCausalLM"],
        "model_type": "mistral",
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "sliding_window": 4096,
        "torch_dtype": "bfloat16",
    }
    num_shards = 3 if sum(map(num_bytes, tensors)) > 10**9 else 1
    return write_checkpoint(folder, tensors, config, num_shards=num_shards, fill=fill)
