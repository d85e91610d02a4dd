"""The table of inference engines, held against the engines: what it says of an output is what
they compute.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from stack.engines import (
    BY_ENGINE,
    Computed,
    TinyBase,
    by_llama_cpp_with_kinds,
    by_transformers,
)
from stack.helpers import ROOT, dus

# Log probabilities: two that compute the same differ by less than one, two that do not by more than
# the other.
SAME, ANOTHER = 0.05, 0.5

KEPT_BY_5 = ("layer_types", "_sliding_window_pattern")
LATENT = {
    "kv_lora_rank": 16, "qk_nope_head_dim": 16, "qk_rope_head_dim": 16, "v_head_dim": 16, "num_key_value_heads": 4,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Row:
    """A base, the maps that are tried, and the engines that compute the base as transformers does.

    `windowless` are engines that do not, since they have no windows by layer: the table says so of
    them.
    """

    base: TinyBase
    maps: tuple[tuple[str, ...], ...]
    engines: tuple[str, ...]
    windowless: tuple[str, ...] = field(default=())


ROWS = {
    "gemma3": Row(
        base=TinyBase(
            model_type="gemma3_text",
            num_layers=12,
            fields={"query_pre_attn_scalar": 16},
            hub={"sliding_window_pattern": 6},
            gone=KEPT_BY_5,
        ),
        maps=(("--trim", "3"), ("--trim", "2"), ("--trim", "3", "--copies", "3")),
        engines=("llama.cpp", "mlx", "transformers-4.52"),
    ),
    "gemma2": Row(
        base=TinyBase(
            model_type="gemma2",
            num_layers=6,
            fields={"query_pre_attn_scalar": 16},
            gone=KEPT_BY_5,
            needs_sentencepiece=True,
        ),
        maps=(("--trim", "1"), ("--layers", "0:4,3:"), ("--recipe", "llama-pro")),
        engines=("llama.cpp", "transformers-4.52"),
        windowless=("mlx",),
    ),
    "gemma2 of 26 layers": Row(
        base=TinyBase(
            model_type="gemma2",
            num_layers=26,
            fields={"query_pre_attn_scalar": 32, "head_dim": 32},
            gone=KEPT_BY_5,
            needs_sentencepiece=True,
        ),
        maps=(("--trim", "4"), ("--trim", "3")),  # 44 layers, and the 46 of another model
        engines=("llama.cpp",),
    ),
    "cohere2": Row(
        base=TinyBase(
            model_type="cohere2",
            num_layers=8,
            fields={"logit_scale": 1.0},
            hub={"rotary_pct": 1.0, "sliding_window_pattern": 4},
            gone=KEPT_BY_5,
        ),
        maps=(("--trim", "2"), ("--trim", "1")),
        engines=("llama.cpp", "mlx", "transformers-4.52"),
    ),
    "smollm3": Row(
        base=TinyBase(model_type="smollm3", num_layers=8, fields={"sliding_window": None}),
        maps=(("--trim", "2"), ("--trim", "1")),
        engines=("llama.cpp", "mlx"),
    ),
    "gpt_oss": Row(
        base=TinyBase(
            model_type="gpt_oss",
            num_layers=6,
            fields={
                "num_local_experts": 4,
                "num_experts_per_tok": 2,
                "tie_word_embeddings": False,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
            keeps_rope=True,
        ),
        maps=(("--trim", "1"), ("--layers", "0:4,3:")),
        engines=("llama.cpp",),  # mlx-lm refuses weights that are not quantised
    ),
    "minicpm3": Row(
        base=TinyBase(
            model_type="minicpm3",
            num_layers=6,
            fields={"q_lora_rank": 16, **LATENT},
            needs_sentencepiece=True,
        ),
        maps=(("--trim", "1"),),
        engines=("llama.cpp",),  # mlx-lm asks for a rope_scaling
    ),
    "olmo3": Row(
        base=TinyBase(model_type="olmo3", num_layers=8, fields={"tie_word_embeddings": False}),
        maps=(("--trim", "1"),),
        engines=("llama.cpp", "mlx"),
    ),
}


@pytest.fixture(scope="module", params=sorted(ROWS))
def row(request: pytest.FixtureRequest) -> Row:
    return ROWS[request.param]


@pytest.fixture(scope="module")
def base(row: Row, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return row.base.write(tmp_path_factory.mktemp("engines") / "base")


@pytest.fixture(scope="module")
def reference(base: Path) -> Computed:
    return by_transformers(base)


def test_what_the_table_says_of_an_output_is_what_the_engines_compute(
    row: Row, base: Path, reference: Computed
) -> None:
    for engine in row.engines:
        assert BY_ENGINE[engine](base).difference(reference) < SAME, (
            f"{engine} agrees on the base first"
        )
    for number, options in enumerate(row.maps):
        output = base.with_name(f"output-{number}")
        dus("upscale", base, *options, "-o", output, "-q")
        verdicts = {
            one["engine"]: one["verdict"]
            for one in json.loads((output / "dus.json").read_text())["engines"]
        }
        expected = by_transformers(output)
        for engine in row.engines:
            difference = BY_ENGINE[engine](output).difference(expected)
            assert verdicts[engine] == ("right" if difference < SAME else "differs"), (
                options,
                engine,
                difference,
            )
            assert difference < SAME or difference > ANOTHER, (options, engine, difference)


def test_a_gguf_with_the_kinds_of_its_layers_is_right_out_of_step_too(row: Row, base: Path) -> None:
    if row.base.model_type not in ("gemma2", "gemma3_text", "cohere2", "gpt_oss"):
        pytest.skip("its converter writes the kinds, or its library counts whatever they are")
    for number, options in enumerate(row.maps):
        output = base.with_name(f"kinds-{number}")
        dus("upscale", base, *options, "-o", output, "-q")
        (verdict,) = [
            one
            for one in json.loads((output / "dus.json").read_text())["engines"]
            if one["engine"] == "llama.cpp"
        ]
        if verdict["verdict"] == "right" or "scales attention" in verdict["why"]:
            continue  # no array helps against a scale that goes by the depth
        difference = by_llama_cpp_with_kinds(output).difference(by_transformers(output))
        assert difference < SAME, (options, difference)


def test_an_engine_without_windows_departs_from_the_base_already(
    row: Row, base: Path, reference: Computed
) -> None:
    for engine in row.windowless:
        assert BY_ENGINE[engine](base).difference(reference) > ANOTHER
        output = base.with_name(f"output-for-{engine}")
        dus("upscale", base, *row.maps[0], "-o", output, "-q")
        verdicts = {
            one["engine"]: one for one in json.loads((output / "dus.json").read_text())["engines"]
        }
        assert (verdicts[engine]["base"], verdicts[engine]["verdict"]) == (
            "within_window",
            "within_window",
        )


def test_the_versions_are_those_that_the_page_names() -> None:
    from importlib.metadata import version

    page = (ROOT / "docs/engines.md").read_text()
    for title, package in (("llama.cpp", "xllamacpp"), ("mlx-lm", "mlx-lm")):
        assert f"| {title} ({version(package)}) |" in page
