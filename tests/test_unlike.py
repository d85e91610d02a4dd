"""Types in no table whose layers are built unlike: explained by the config, kept in their
pattern, or refused.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import Tensor, llama_config, llama_tensors, write_checkpoint
from tiny import forked_dus as dus

from dus_cli.errors import ConfigError
from dus_cli.maps.layers import LayerMap, stack, typed_map
from dus_cli.maps.unlike import LayerTensors, check_alike


def checked(
    kinds: str, layer_map: LayerMap, tells: dict[str, list[str]] | None = None
) -> tuple[str, ...]:
    """Layers of these kinds, a letter each, held against a map."""
    named = [(f"model.layers.{i}.{kind}.weight", "BF16", (4, 4)) for i, kind in enumerate(kinds)]
    same = [(f"model.layers.{i}.norm.weight", "BF16", (4,)) for i in range(len(kinds))]
    tensors = LayerTensors.of([*named, *same], "model.layers", len(kinds))
    return check_alike(tensors, layer_map, tells or {}, is_quantised=False)


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        ("aaaaaaaa", "0:6,2:8"),
        ("mamamama", "0:6,2:8"),
        ("mamamama", "0:5,3:8"),  # the shift is two
        ("dddeeeee", "0:5,3:8"),  # three dense layers first, none repeated
        ("abbbbbbb", "0:7,1:8"),
        ("dmamamam", "0:5,1:8"),  # one, and then a pattern of two, shifted by four
        ("ssfssfssf", "0:6,3:9"),
        ("mmmmmmma", "0:8"),
    ],
)
def test_a_map_that_keeps_the_pattern_along_the_depth_is_taken(kinds: str, layers: str) -> None:
    warnings = checked(kinds, typed_map(layers, len(kinds)))
    assert len(warnings) == (len(set(kinds)) > 1)


@pytest.mark.parametrize(
    ("kinds", "layers"),
    [
        ("mamamama", "0:5,2:8"),  # the shift is three
        ("dddeeeee", "0:6,2:8"),  # a dense layer is repeated
        ("dddeeeed", "0:7,1:8"),  # the last is unlike: by its number, or as the last?
        ("aaabaaaa", "0:7,1:8"),
        ("abcdefgh", "0:7,1:8"),
        ("ssfssfssf", "0:7,2:9"),
    ],
)
def test_a_map_that_moves_unlike_layers_is_refused_with_what_they_hold(
    kinds: str, layers: str
) -> None:
    layer_map = typed_map(layers, len(kinds))
    with pytest.raises(
        ConfigError, match=r"not all built alike \(.*weight.*--assume model.layers=keep"
    ):
        checked(kinds, layer_map)
    # something that followed says which is which
    assert checked(kinds, layer_map, {"a_list": list(kinds)}) == ()
    with pytest.raises(ConfigError, match="not all built alike"):
        checked(kinds, layer_map, {"a_list": ["same"] * len(kinds)})


def test_the_refusal_says_which_layers_hold_what() -> None:
    with pytest.raises(
        ConfigError, match=r"layers 0-2, 7: d.weight \[4, 4\], layers 3-6: e.weight \[4, 4\]"
    ):
        checked("dddeeeed", stack(8, trim=1))


@pytest.mark.parametrize("ending", ["q_proj.bias", "rotary_emb.inv_freq", "attn.masked_bias"])
def test_biases_and_buffers_that_some_layers_lack_are_no_difference(ending: str) -> None:
    tensors: list[Tensor] = [(f"model.layers.{i}.q_proj.weight", "BF16", (4, 4)) for i in range(8)]
    tensors.append((f"model.layers.3.{ending}", "BF16", (4,)))
    assert (
        check_alike(
            LayerTensors.of(tensors, "model.layers", 8), stack(8, 1), {}, is_quantised=False
        )
        == ()
    )


def test_layers_that_differ_in_their_bits_alone_are_alike() -> None:
    tensors: list[Tensor] = [(f"h.{i}.up.qweight", "I32", (4, 4 if i % 3 else 8)) for i in range(8)]
    assert check_alike(LayerTensors.of(tensors, "h", 8), stack(8, 1), {}, is_quantised=False) == ()


def test_shapes_tell_layers_apart_too() -> None:
    tensors: list[Tensor] = [(f"h.{i}.up.weight", "BF16", (4, 4 + i)) for i in range(8)]
    with pytest.raises(ConfigError, match=r"8 builds, layer 0: up.weight \[4, 4\]"):
        check_alike(LayerTensors.of(tensors, "h", 8), stack(8, 1), {}, is_quantised=False)


# --- by the command -------------------------------------------------------------------------------


def write_base(folder: Path, experts: tuple[int, ...], **fields: Any) -> Path:
    """Eight layers, some with experts in place of their MLP."""
    tensors = [t for t in llama_tensors(8) if not any(f"layers.{i}.mlp" in t[0] for i in experts)]
    tensors += [(f"model.layers.{i}.moe.up_proj.weight", "BF16", (2, 16, 64)) for i in experts]
    return write_checkpoint(folder, tensors, llama_config(8) | {"model_type": "our_own"} | fields)


def test_a_type_in_no_table_is_refused_until_a_person_decides(tmp_path: Path) -> None:
    base, out = write_base(tmp_path / "base", (3, 4, 5, 6)), tmp_path / "out"
    run = dus("upscale", base, "-t", "1", "-o", out, "-q")
    run.assert_one_line_error("layers 3-6: moe.up_proj.weight", "--assume model.layers=keep")
    assert not out.exists()
    report = dus(
        "upscale", base, "-t", "1", "-o", out, "--assume", "model.layers=keep", "--json"
    ).report
    assert any("as --assume says" in warning for warning in report["warnings"])
    assert dus("verify", out, "--base", base, "-q").returncode == 0


def test_a_field_that_follows_explains_the_difference(tmp_path: Path) -> None:
    experts = ["moe" if 3 <= layer <= 6 else "mlp" for layer in range(8)]
    base, out = (
        write_base(tmp_path / "base", (3, 4, 5, 6), ffn={"kinds": experts}),
        tmp_path / "out",
    )
    (about_type, about_list) = dus("upscale", base, "-t", "1", "-o", out, "--json").report[
        "warnings"
    ]
    assert "followed the map by general rules (ffn.kinds)" in about_type
    assert "ffn.kinds is a list with one entry per layer" in about_list
    after = json.loads((out / "config.json").read_text())["ffn"]["kinds"]
    assert after == [experts[layer] for layer in (*range(7), *range(1, 8))]
