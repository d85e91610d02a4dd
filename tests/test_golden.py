"""The proof on a real model: the written checkpoint computes what the base does with its layers
rearranged.

Every architecture's tiny model is in test_zoo.py.
"""

from __future__ import annotations

import copy
import json
import os
import shutil
from pathlib import Path

import pytest
from forked import dus

from dus_cli.maps.layers import source_layers

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from zoo import logits  # noqa: E402  (it imports both)

REAL = os.environ.get("SMOLLM2")
# Mean cross-entropy of the base with its layers stacked in memory at trims 0, 4, 7 and 10, same
# text.
LOSSES = [7.288, 5.359, 3.573, 3.154]
needs_model = pytest.mark.skipif(
    not REAL, reason="SMOLLM2 names no checkpoint; `make test` makes one"
)


@needs_model
def test_smollm2_at_trim_7_equals_itself_rearranged(tmp_path: Path) -> None:
    assert REAL is not None
    report = dus("upscale", REAL, "--trim", "7", "-o", tmp_path / "out", "--json").report
    assert report["num_layers"] == {"base": 30, "output": 46}
    assert report["parameters"] == {"base": 134_515_008, "output": 191_156_544}
    base = transformers.AutoModelForCausalLM.from_pretrained(REAL, dtype=torch.float32).eval()
    written = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    tokens = torch.arange(100, 164).reshape(1, 64)
    layers = base.model.layers
    base.model.layers = torch.nn.ModuleList(
        [copy.deepcopy(layers[k]) for k in source_layers(30, 7)]
    )
    base.config.num_hidden_layers = 46
    assert torch.equal(logits(written, tokens), logits(base, tokens))
    tied = json.loads((tmp_path / "out/config.json").read_text())["tie_word_embeddings"]
    assert tied
    assert written.lm_head.weight is written.model.embed_tokens.weight


@needs_model
def test_the_loss_right_after_scaling_falls_with_the_trim(tmp_path: Path) -> None:
    """Real text that every clone has, the licence. docs/benchmarks.md has the figures on
    held-out text.
    """
    assert REAL is not None
    tokenizer = transformers.AutoTokenizer.from_pretrained(REAL)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    tokens = torch.tensor([tokenizer(text)["input_ids"][:512]])

    def loss(folder: Path | str) -> float:
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32
        ).eval()
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
    scaled = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.float32
    ).eval()
    tokens = torch.arange(100, 132).reshape(1, 32)
    layers = scaled.model.layers
    scaled.model.layers = torch.nn.ModuleList([*layers[:23], *layers[39:]])
    scaled.config.num_hidden_layers = 30
    assert torch.equal(logits(scaled, tokens), logits(base, tokens))
