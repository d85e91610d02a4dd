"""PEFT: a LoRA of the healed model, and what becomes of a LoRA that was trained on the base."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest
from stack.helpers import ROOT, dus, logits, run, tensors

IDS = list(range(100, 132))


def load(folder: Path) -> Any:
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def trained_adapter(folder: Path, out: Path) -> Any:
    """A LoRA after one large step, saved to `out`; the model's logits with it."""
    import torch
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    config = LoraConfig(
        r=4, lora_alpha=16, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM"
    )
    model = get_peft_model(load(folder), config)
    parameters = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=1.0)
    ids = torch.tensor([IDS])
    model(input_ids=ids, labels=ids).loss.backward()
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    model.eval().save_pretrained(out)
    with torch.no_grad():
        return model(ids).logits[0]


def with_adapter(folder: Path, adapter: Path) -> Any:
    from peft import PeftModel

    return PeftModel.from_pretrained(load(folder), adapter).eval()


def test_a_lora_trains_saves_loads_and_merges(healed: Path, tmp_path: Path) -> None:
    import torch

    expected = trained_adapter(healed, tmp_path / "adapter")
    plain = logits(healed, IDS)
    assert (expected - plain).abs().max() > 0.01, "the step must have done something"
    again = with_adapter(healed, tmp_path / "adapter")
    with torch.no_grad():
        assert again(torch.tensor([IDS])).logits[0].equal(expected)
    again.merge_and_unload().save_pretrained(tmp_path / "merged")
    assert tensors(tmp_path / "merged").keys() == tensors(healed).keys()
    torch.testing.assert_close(logits(tmp_path / "merged", IDS), expected, atol=1e-3, rtol=0)


@pytest.fixture(scope="module")
def of_base(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("lora") / "adapter"
    trained_adapter(base, out)
    return out


def test_a_lora_of_the_base_lands_on_the_first_30_layers_and_peft_warns(
    deep: Path, of_base: Path
) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = with_adapter(deep, of_base)
    assert any("missing adapter keys" in str(warning.message) for warning in caught)
    layers = model.base_model.model.model.layers
    active = [
        i
        for i, layer in enumerate(layers)
        if layer.mlp.down_proj.lora_B["default"].weight.abs().max() > 0
    ]
    assert active == list(range(30)), (
        "layers 23…29 are copies of base layers 7…13, and have the LoRA of 23…29"
    )


def test_the_adapter_laid_along_the_map_is_the_adapted_base_deepened(
    base: Path, deep: Path, of_base: Path, tmp_path: Path
) -> None:
    import sys

    import torch

    run(sys.executable, ROOT / "docs/instruct/adapter.py", of_base, deep, tmp_path / "moved")
    with_adapter(base, of_base).merge_and_unload().save_pretrained(tmp_path / "merged")
    dus("upscale", tmp_path / "merged", "--trim", "7", "-o", tmp_path / "expected", "-q")
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model = with_adapter(deep, tmp_path / "moved")
    assert not any("adapter keys" in str(warning.message) for warning in caught)
    with torch.no_grad():
        found = model(torch.tensor([IDS])).logits[0]
    torch.testing.assert_close(found, logits(tmp_path / "expected", IDS), atol=1e-3, rtol=0)
