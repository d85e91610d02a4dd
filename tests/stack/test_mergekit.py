"""mergekit reads the output: as the source of a passthrough, and as one side of an average."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import yaml
from stack.helpers import logits, run, tensors


def merged(config: dict[str, object], out: Path) -> Path:
    path = out.with_suffix(".yml")
    path.write_text(yaml.safe_dump(config))
    command = (
        shutil.which("mergekit-yaml", path=str(Path(sys.executable).parent)) or "mergekit-yaml"
    )
    run(command, path, out)
    return out


def test_a_passthrough_of_all_layers_is_the_model_byte_for_byte(
    healed: Path, tmp_path: Path
) -> None:
    slices = [{"sources": [{"model": str(healed), "layer_range": [0, 46]}]}]
    out = merged(
        {"merge_method": "passthrough", "slices": slices, "dtype": "bfloat16"}, tmp_path / "all"
    )
    before, after = tensors(healed), tensors(out)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)
    assert json.loads((out / "config.json").read_text())["num_hidden_layers"] == 46


def test_the_layers_that_are_the_base_can_be_cut_out_again(
    base: Path, deep: Path, tmp_path: Path
) -> None:
    sources = [
        {"sources": [{"model": str(deep), "layer_range": span}]} for span in ([0, 23], [39, 46])
    ]
    out = merged(
        {"merge_method": "passthrough", "slices": sources, "dtype": "bfloat16"}, tmp_path / "cut"
    )
    before, after = tensors(base), tensors(out)
    assert before.keys() == after.keys()
    assert all(before[name].equal(after[name]) for name in before)


def test_an_average_of_two_deep_models_is_their_mean(
    deep: Path, healed: Path, tmp_path: Path
) -> None:
    models = [{"model": str(folder), "parameters": {"weight": 0.5}} for folder in (deep, healed)]
    out = merged(
        {"merge_method": "linear", "models": models, "dtype": "float32"}, tmp_path / "mean"
    )
    a, b, mean = tensors(deep), tensors(healed), tensors(out)
    assert mean.keys() == a.keys() == b.keys()
    for name, tensor in mean.items():
        assert (tensor - (a[name].float() + b[name].float()) / 2).abs().max() < 1e-6, name
    assert logits(out, [1, 2, 3]).isfinite().all()
