"""The proof on every architecture: what was written computes what the base does with its layers
rearranged.

A model type of transformers' causal-LM mapping ends as equal or as refused by name;
docs/architectures.md lists them all. `DUS_WRITE_TABLE=1 pytest tests/test_zoo.py` writes that table
anew.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_tensors, write_checkpoint
from tiny import forked_dus as dus

from dus_cli.maps.architectures import ARCHITECTURES
from dus_cli.maps.rules import Derived

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import zoo  # noqa: E402  (it imports both)
from equality import check_equality, check_table, save_base, without_engines  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # transformers' own, about its tiny models


# Found by the tests below: the fields by which a type's layers are told apart.
OUTCOMES: dict[str, str] = {}

# Types that generate otherwise without the cache already before dus touched them, or not at all on
# text alone: sparse attention picks other keys from a cache, xlstm's step wants other shapes,
# musicgen's decoder wants an encoder.
OTHERWISE_WITHOUT_CACHE = frozenset(
    "cpmant dots3_note dots3_note_text glm_moe_dsa hy_v4 moshi musicgen musicgen_melody rwkv "
    "xlstm".split()
)


@pytest.mark.parametrize("model_type", zoo.EQUAL)
def test_the_written_model_equals_the_base_rearranged(model_type: str, tmp_path: Path) -> None:
    save_base(model_type, tmp_path)
    report = check_equality(model_type, tmp_path)
    assert without_engines(report) == []
    if model_type not in OTHERWISE_WITHOUT_CACHE:
        assert zoo.generates_alike_without_cache(zoo.load(model_type, tmp_path / "out")[0])
    OUTCOMES[model_type] = ", ".join(f"`{name}`" for name in report["kinds"])


@pytest.mark.parametrize("model_type", sorted(zoo.REFUSED))
def test_what_no_map_can_deepen_is_refused_by_name(model_type: str, tmp_path: Path) -> None:
    config = {
        "model_type": model_type,
        "text_config": {"model_type": f"{model_type}_text", "num_hidden_layers": 2},
    }
    base = write_checkpoint(tmp_path / "base", llama_tensors(2), config)
    run = dus("upscale", base, "-o", tmp_path / "out", "-q")
    run.assert_one_line_error("cannot be deepened by copying layers", zoo.REFUSED[model_type])
    OUTCOMES[model_type] = ""


def test_the_table_in_the_docs_is_what_was_found() -> None:
    if not OUTCOMES.keys() | zoo.NOT_TRIED.keys() >= set(zoo.CAUSAL_TYPES):
        pytest.skip("needs the whole zoo in one run")
    if zoo.NEWER & set(zoo.CAUSAL_TYPES):
        pytest.skip("the table is of the version in tests/constraints.txt")
    rows = []
    for name in zoo.CAUSAL_TYPES:
        outcome = f"refused: {zoo.REFUSED[name]}" if name in zoo.REFUSED else "equal"
        outcome = f"not tried: {zoo.NOT_TRIED[name]}" if name in zoo.NOT_TRIED else outcome
        rows.append(f"| {name} | {outcome} | {OUTCOMES.get(name, '')} |")
    check_table("the zoo", rows)
    assert len(zoo.EQUAL) >= 135


# --- older files, that lack the lists -------------------------------------------------------------

# Per-layer lists that the class makes up where the file lacks them.
LISTS = {
    name: [rule.key for rule in entry.rules if isinstance(rule, Derived)]
    for name, entry in ARCHITECTURES.items()
    if entry.refused is None
}
OLDER = sorted(name for name in zoo.EQUAL if LISTS.get(name))


@pytest.mark.parametrize("model_type", OLDER)
def test_files_that_lack_the_lists_keep_each_layer_its_kind(
    model_type: str, tmp_path: Path, edit_config: Callable[..., None]
) -> None:
    base = save_base(model_type, tmp_path)
    edit_config(base, **dict.fromkeys(LISTS[model_type]))
    check_equality(model_type, tmp_path)


# --- trims over the whole span --------------------------------------------------------------------

PATTERNED = [
    "gemma2",
    "gemma3_text",
    "qwen3_next",
    "llama4_text",
    "gpt_oss",
    "jamba",
    "granitemoehybrid",
    "deepseek_v3",
]


@pytest.mark.parametrize("trim", range(4))
@pytest.mark.parametrize("model_type", PATTERNED)
def test_every_trim_is_equal_or_refused_by_name(model_type: str, trim: int, tmp_path: Path) -> None:
    base = save_base(model_type, tmp_path)
    run = dus("upscale", base, "-t", str(trim), "-o", tmp_path / "out", "-q")
    if run.returncode == 0:
        (tmp_path / "out").rename(tmp_path / "quiet")
        check_equality(model_type, tmp_path, trim)
    else:
        field = {"jamba": "_layer_period", "deepseek_v3": "first_k_dense_replace"}[model_type]
        run.assert_one_line_error(field)


# --- layers that share keys and values ------------------------------------------------------------

SHARING: dict[str, Any] = {
    "num_kv_shared_layers": 2,
    "layer_types": [
        *["sliding_attention"] * 2,
        "full_attention",
        *["sliding_attention"] * 3,
        "full_attention",
    ],
}


@pytest.mark.parametrize("trim", [1, 3])
@pytest.mark.parametrize("model_type", ["gemma3n_text", "gemma4_text", "gemma4_unified_text"])
def test_layers_that_share_keys_are_equal_or_refused_by_name(
    model_type: str, trim: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    wide = {} if model_type == "gemma3n_text" else {"use_double_wide_mlp": True}
    monkeypatch.setitem(zoo.SPECIAL, model_type, zoo.SPECIAL[model_type] | SHARING | wide)
    base = save_base(model_type, tmp_path)
    if trim < SHARING["num_kv_shared_layers"]:
        run = dus("upscale", base, "-t", str(trim), "-o", tmp_path / "out", "-q")
        run.assert_one_line_error("num_kv_shared_layers is 2", "--trim 2 or 3 would keep it")
        return
    report = check_equality(model_type, tmp_path, trim)
    assert report["kinds"]["num_kv_shared_layers"] == ["own"] * 6 + ["shared"] * 2
    assert zoo.generates_alike_without_cache(zoo.load(model_type, tmp_path / "out")[0])
