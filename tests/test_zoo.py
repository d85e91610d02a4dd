"""The proof on every architecture: what was written computes what the base does with its layers
rearranged; with identities, what the base does; with `--start fade`, what the base's layers do with
the factors.

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
from dus_cli.planning.projections import NOT_IDENTITIES

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

import zoo  # noqa: E402  (it imports both)
from equality import (  # noqa: E402
    TRIM,
    Base,
    check_equality,
    check_fade,
    check_identities,
    check_table,
    save_base,
    without_engines,
)

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


@pytest.fixture(scope="module", params=zoo.EQUAL)
def base(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Base:
    """A tiny base of each type. pytest runs all tests of one base before it makes the next."""
    folder = save_base(request.param, tmp_path_factory.mktemp(request.param))
    return Base.load(request.param, folder)


def test_the_written_model_equals_the_base_rearranged(base: Base, tmp_path: Path) -> None:
    report, written = check_equality(base, tmp_path / "out")
    assert without_engines(report) == []
    if base.model_type not in OTHERWISE_WITHOUT_CACHE:
        assert zoo.generates_alike_without_cache(written)
    OUTCOMES[base.model_type] = ", ".join(f"`{name}`" for name in report["kinds"])


# Types that take no identities because they have a tensor that no rule accounts for; most are
# BERT's kin, whose norms stand on the stream. The last two are multimodal wrappers of such decoders.
WITHOUT_IDENTITIES = NOT_IDENTITIES.keys() | frozenset(
    """
    bert bert-generation big_bird camembert data2vec-text electra ernie git megatron-bert
    modernbert-decoder prophetnet qwen4_exp qwen4_exp_text reformer rembert roberta
    roberta-prelayernorm roc_bert roformer rwkv xlm-roberta xlm-roberta-xl xlnet xmod zaya
    gemma4 gemma4_unified
    """.split()
)


def test_with_identities_the_logits_are_the_bases(base: Base, tmp_path: Path) -> None:
    if {base.model_type, base.model.config.get_text_config().model_type} & WITHOUT_IDENTITIES:
        done = dus("upscale", base.folder, "-t", "2", "--identity", "-o", tmp_path / "out", "-q")
        done.assert_one_line_error("--identity")
    else:
        check_identities(base, tmp_path / "out")


def test_a_faded_model_is_its_bases_layers_called_with_the_factors(
    base: Base, tmp_path: Path
) -> None:
    command = ("upscale", base.folder, "-t", "2", "-o", tmp_path / "out", "--json")
    run = dus(*command, "--start", "fade")
    if run.returncode == 0:
        check_fade(base, tmp_path / "out", run.report)
        return
    run.assert_one_line_error("--start fade")
    # of olmo_hybrid's layers only some have a norm behind a block
    assert base.model_type == "olmo_hybrid" or dus(*command, "--identity").returncode == 1


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
    folder = save_base(model_type, tmp_path)
    edit_config(folder, **dict.fromkeys(LISTS[model_type]))
    check_equality(Base.load(model_type, folder), tmp_path / "out")


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


@pytest.mark.parametrize("model_type", PATTERNED)
def test_every_trim_is_equal_or_refused_by_name(model_type: str, tmp_path: Path) -> None:
    base = Base.load(model_type, save_base(model_type, tmp_path))
    for trim in {*range(4)} - {TRIM}:
        out = tmp_path / str(trim)
        run = dus("upscale", base.folder, "-t", str(trim), "-o", out, "--dry-run", "-q")
        if run.returncode == 0:
            check_equality(base, out, trim)
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
    folder = save_base(model_type, tmp_path)
    if trim < SHARING["num_kv_shared_layers"]:
        run = dus("upscale", folder, "-t", str(trim), "-o", tmp_path / "out", "-q")
        run.assert_one_line_error("num_kv_shared_layers is 2", "--trim 2 or 3 would keep it")
        return
    base = Base.load(model_type, folder)
    report, written = check_equality(base, tmp_path / "out", trim)
    assert report["kinds"]["num_kv_shared_layers"] == ["own"] * 6 + ["shared"] * 2
    assert zoo.generates_alike_without_cache(written)
