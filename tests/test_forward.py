"""`--forward`: an output run beside its base's layers, of any architecture, and what it finds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tiny
from tiny import forked_dus as dus

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")

from equality import save_base  # noqa: E402  (it imports both)
from safetensors.torch import load_file, save_file  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models


def deepen(folder: Path, model_type: str, *options: str) -> None:
    save_base(model_type, folder)
    run = dus("upscale", folder / "base", "-o", folder / "out", "-q", *options)
    assert run.returncode == 0, run.stderr


def forward(folder: Path, *options: str) -> dict[str, Any]:
    run = dus("verify", folder / "out", "--base", folder / "base", "--forward", "--json", *options)
    report: dict[str, Any] = json.loads(run.stdout)
    assert report["sound"] == (run.returncode == 0)
    return report


# Sliding windows; experts, merged while they are loaded; mamba beside attention; keys and values
# that are handed on and not used.
@pytest.mark.parametrize(
    "model_type", ["gemma3_text", "qwen3_moe", "granitemoehybrid", "gemma4_text"]
)
def test_layers_of_every_kind_compute_what_the_base_s_do(model_type: str, tmp_path: Path) -> None:
    deepen(
        tmp_path,
        model_type,
    )
    report = forward(tmp_path)
    assert report["problems"] == []
    assert report["forward"] | {"tokens": 0} == {
        "tokens": 0,
        "layers": 12,
        "exact": True,
        "layers_apart": 0,
        "first_apart": None,
        "difference": 0,
        "added": 0,
        "logits": 0,
    }


@pytest.mark.parametrize(
    ("model_type", "start", "is_exact"),
    [("gemma2", "fade", False), ("llama", "scale:0.3", False), ("llama", "identity", True)],
)
def test_the_factors_of_a_start_are_held_without_knowing_which_tensors_have_them(
    model_type: str, start: str, is_exact: bool, tmp_path: Path
) -> None:
    deepen(
        tmp_path,
        model_type,
        "--start",
        start,
    )
    found = forward(tmp_path)["forward"]
    assert (found["layers_apart"], found["exact"]) == (0, is_exact)
    assert (found["logits"] == 0) == is_exact


def test_the_first_layer_that_differs_is_named_and_its_tensor(tmp_path: Path) -> None:
    deepen(
        tmp_path,
        "llama",
        "-t",
        "2",
    )
    path, name = tmp_path / "out" / "model.safetensors", "model.layers.6.mlp.up_proj.weight"
    tensors = load_file(path)
    tensors[name] = tensors[name] * 1.01
    save_file(tensors, path, {"format": "pt"})
    report = forward(tmp_path)
    assert report["forward"]["first_apart"] == {"output": 6, "base": 3}
    assert report["forward"]["layers_apart"] == 1
    assert report["forward"]["logits"] > report["forward"]["difference"] / 100 > 0
    tensor, layer = report["problems"]
    assert tensor.startswith(f"tensor {name} differs from the base's model.layers.3.mlp.up_proj")
    assert layer.startswith("--forward: layer 6 does not compute what the base's layer 3 does")


def test_a_layer_of_another_kind_is_found_though_every_tensor_is_right(
    tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    deepen(
        tmp_path,
        "gemma3_text",
        "-t",
        "2",
    )
    kinds = json.loads((tmp_path / "out" / "config.json").read_text())["layer_types"]
    assert kinds[8] == "full_attention"
    edit_config(tmp_path / "out", layer_types=[*kinds[:8], "sliding_attention", *kinds[9:]])
    found = forward(tmp_path)["forward"]
    assert (found["first_apart"], found["layers_apart"]) == ({"output": 8, "base": 5}, 1)


def test_what_stands_beside_the_layers_is_compared_too(tmp_path: Path) -> None:
    deepen(
        tmp_path,
        "llama",
    )
    path = tmp_path / "out" / "model.safetensors"
    tensors = load_file(path)
    tensors["model.norm.weight"] *= 2
    save_file(tensors, path, {"format": "pt"})
    assert (
        "the part after the last layer computes something else" in forward(tmp_path)["problems"][-1]
    )


@pytest.mark.parametrize(("model_type", "layer"), [("zaya", 1), ("gemma3n_text", 8)])
def test_layers_that_hand_on_more_than_hidden_states_are_refused(
    model_type: str, layer: int, tmp_path: Path
) -> None:
    deepen(tmp_path, model_type, "--trim", "2")
    report = forward(tmp_path)
    assert report["forward"] is None
    assert f"{model_type}: layer {layer} gets more from other layers" in report["problems"][0]


def test_upscale_runs_the_model_before_it_publishes(
    tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    base = save_base("cohere2", tmp_path)
    run = dus("upscale", base, "-o", tmp_path / "out", "--verify", "forward", "--json")
    assert run.report["verified"] == "forward"
    edit_config(base, num_attention_heads=5)  # nothing of it fits the tensors
    again = dus("upscale", base, "-o", tmp_path / "new", "--verify", "forward", "-q")
    again.assert_one_line_error("transformers")
    assert not (tmp_path / "new").exists()


def test_text_is_taken_of_data_and_else_of_a_text_of_our_own(tmp_path: Path) -> None:
    base = tiny.write_base(tmp_path / "base")
    tiny.upscaled(base, tmp_path / "out")
    data = tiny.write_corpus(tmp_path / "text.jsonl", 3)
    of_data, of_ours = forward(tmp_path, "--data", str(data)), forward(tmp_path)
    assert of_data["problems"] == of_ours["problems"] == []
    assert 8 < of_data["forward"]["tokens"] <= of_ours["forward"]["tokens"] == 128
    out = tmp_path / "out"
    dus("verify", out, "--forward").assert_one_line_error("give --base", code=2)
    run = dus("verify", out, "--base", base, "--data", data)
    run.assert_one_line_error("--data is the text of --forward", code=2)
