"""What inference engines that count layers make of a map is said before it is written, and by
`dus verify --for`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from checkpoints import llama_config, llama_tensors, write_checkpoint
from conftest import Run
from forked import dus

from dus_cli.errors import EngineError, UsageError
from dus_cli.maps.engines import ENGINES, WAYS, Verdict, parse_engines
from dus_cli.maps.layers import LayerMap, stack
from dus_cli.maps.model_config import decoder_config
from dus_cli.planning.judging import Maps, choose_trim, engine_warnings, judge_config

GEMMA3: dict[str, Any] = {"sliding_window": 8, "head_dim": 16, "query_pre_attn_scalar": 16}
GEMMA2 = GEMMA3
GEMMA3_27B: dict[str, Any] = {
    "sliding_window": 1024, "head_dim": 128, "query_pre_attn_scalar": 168, "hidden_size": 5376,
    "num_attention_heads": 32,
}  # fmt: skip
GEMMA2_27B = GEMMA3_27B | {"query_pre_attn_scalar": 144, "hidden_size": 4608}
SMOLLM3: dict[str, Any] = {"sliding_window": None, "use_sliding_window": False}
LLLG = ["sliding_attention"] * 3 + ["full_attention"]


def config(model_type: str, num_layers: int, **fields: Any) -> dict[str, Any]:
    return {"model_type": model_type, "num_hidden_layers": num_layers, **fields}


def maps(model_type: str, num_layers: int, copies: int = 2, **fields: Any) -> Maps:
    said = config(model_type, num_layers, **fields)
    return Maps(said, decoder_config(said), copies)


def wrong(of: Maps, layer_map: LayerMap) -> dict[str, str]:
    return {
        one.engine.name: one.verdict.value for one in of.judge(layer_map) if one.verdict.is_wrong
    }


def write_base(folder: Path, model_type: str, num_layers: int, **fields: Any) -> Path:
    """A checkpoint that says this type, with the tensors of a tiny Llama: nothing here looks
    into its layers.
    """
    said = llama_config(num_layers) | {"model_type": model_type, **fields}
    return write_checkpoint(folder, llama_tensors(num_layers), said)


def report_of(done: Run) -> dict[str, Any]:
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # type: ignore[no-any-return]


# --- which engines depart -------------------------------------------------------------------------

COUNTING = {"llama.cpp": "differs", "mlx": "differs", "transformers-4.52": "differs"}


@pytest.mark.parametrize(
    ("of", "right", "out_of_step", "engines"),
    [
        (maps("gemma3_text", 26, **GEMMA3), 7, 6, COUNTING),
        (maps("gemma3_text", 14, copies=3, **GEMMA3), 4, 3, COUNTING),
        (maps("gemma2", 12, **GEMMA2), 3, None, {}),
        (
            maps("gemma2", 13, **GEMMA2),
            None,
            3,
            {"llama.cpp": "differs", "transformers-4.52": "differs"},
        ),
        (maps("cohere2", 12), 2, 3, COUNTING),
        (maps("llama4_text", 12), 2, 3, {"llama.cpp": "differs", "transformers-4.52": "differs"}),
        (maps("smollm3", 36, **SMOLLM3), 8, 9, {"llama.cpp": "differs"}),
        (maps("afmoe", 12), 2, 3, {"llama.cpp": "differs"}),
        (maps("gpt_oss", 13), None, 3, dict.fromkeys(("llama.cpp", "vllm", "onnx"), "differs")),
        (maps("qwen3_next", 12), 2, 3, {"mlx": "refuses"}),
        (maps("olmo3", 12), 2, 3, {}),
        (maps("exaone_moe", 12), 2, 3, {}),
        (maps("llama", 12), 2, 3, {}),
    ],
    ids=lambda value: value.decoder.model_type if isinstance(value, Maps) else "",
)
def test_who_counts_layers_is_right_in_step_and_wrong_out_of_it(
    of: Maps, right: int | None, out_of_step: int | None, engines: dict[str, str]
) -> None:
    n = of.decoder.num_layers
    if right is not None:
        assert wrong(of, stack(n, right, of.copies)) == {}
    if out_of_step is not None:
        assert wrong(of, stack(n, out_of_step, of.copies)) == engines


def test_a_wrapper_may_have_a_row_of_its_own() -> None:
    alone = config("llama4_text", 12)
    whole = {"model_type": "llama4", "text_config": alone}
    of_both = [Maps(said, decoder_config(said)) for said in (alone, whole)]
    assert ["mlx" in wrong(of, stack(12, 3)) for of in of_both] == [False, True]


@pytest.mark.parametrize(
    ("of", "trim", "engines"),
    [
        (maps("gemma2", 46, **GEMMA2_27B), 0, {"llama.cpp": "differs"}),
        (maps("gemma2", 46, **GEMMA2_27B), 11, {"llama.cpp": "differs"}),
        (maps("gemma2", 26, **GEMMA2), 4, {}),
        (maps("gemma2", 26, **GEMMA2, hidden_size=128, num_attention_heads=4), 3, {"llama.cpp": "differs"}),
        (maps("gemma2", 26, **GEMMA2, hidden_size=64, num_attention_heads=4), 3, {}),
        (maps("gemma3_text", 34, **GEMMA3, hidden_size=128, num_attention_heads=4), 2, {}),
        (maps("gemma3_text", 62, **GEMMA3_27B), 16, {"llama.cpp": "differs"}),
        (maps("exaone4", 64, sliding_window=8, sliding_window_pattern="LLLG", layer_types=LLLG * 16), 16,
         {"llama.cpp": "differs"}),
        (maps("exaone4", 48, sliding_window=None, layer_types=["full_attention"] * 48), 12, {}),
        (maps("exaone4", 48, sliding_window=None, layer_types=["full_attention"] * 48), 16, {"llama.cpp": "differs"}),
        (maps("minicpm3", 62), 15, {"llama.cpp": "differs"}),
        (maps("deepseek_v2", 27, q_lora_rank=None, first_k_dense_replace=1), 7, {"llama.cpp": "refuses"}),
        (maps("deepseek_v3", 18, q_lora_rank=32, first_k_dense_replace=1), 4, {}),
        (maps("deepseek_v3", 18, q_lora_rank=32, first_k_dense_replace=1), 5, {"llama.cpp": "refuses"}),
        (maps("baichuan", 32, hidden_size=4096), 8, {"llama.cpp": "differs"}),
    ],
    ids=lambda value: f"{value.decoder.model_type}-{value.decoder.num_layers}" if isinstance(value, Maps) else "",
)  # fmt: skip
def test_what_an_engine_takes_from_the_number_of_layers_is_told(
    of: Maps, trim: int, engines: dict[str, str]
) -> None:
    assert wrong(of, stack(of.decoder.num_layers, trim)) == engines


def test_windows_that_an_engine_does_not_have_are_the_bases_matter_and_no_fault_of_the_map() -> (
    None
):
    of = maps("mistral", 12, sliding_window=4096)
    assert wrong(of, stack(12, 3)) == {}
    assert engine_warnings(of, of.judge(stack(12, 3)), (), 3) == ()
    (said,) = engine_warnings(of, of.judge(stack(12, 3)), ("llama.cpp",), 3)
    assert said == (
        "llama.cpp gives every layer full attention: texts longer than the window of 4096 tokens "
        "are computed otherwise, the base's too"
    )
    assert (
        engine_warnings(
            maps("mistral", 12), maps("mistral", 12).judge(stack(12, 3)), ("llama.cpp",), 3
        )
        == ()
    )


def test_what_nobody_looked_at_is_unknown_and_said_where_it_is_asked_for() -> None:
    of = maps("recurrent_gemma", 12)
    judged = of.judge(stack(12, 3))
    assert {one.verdict for one in judged} == {Verdict.unknown}
    assert engine_warnings(of, judged, (), 3) == ()
    (said,) = engine_warnings(of, judged, ("vllm",), 3)
    assert said.startswith(
        "dus does not know what vLLM makes of what this config says by layer; compare logits"
    )


def test_a_base_that_is_out_of_step_already_is_told_to_be() -> None:
    kinds = [kind for base in stack(26, 6).sources for kind in [("s", "f")[(base + 1) % 6 == 0]]]
    names = {"s": "sliding_attention", "f": "full_attention"}
    of = maps("gemma3_text", 40, **GEMMA3, layer_types=[names[kind] for kind in kinds])
    judged = of.judge(stack(40, 10))
    assert judged[0].of_base is Verdict.differs
    (said,) = engine_warnings(of, judged, (), 10)
    assert said.startswith("layer_types does not repeat every 6 layers: ")


def test_every_row_has_its_line_and_every_engine_a_version() -> None:
    assert set(WAYS) == {engine.name for engine in ENGINES}
    assert len({engine.name[0] for engine in ENGINES}) == len(ENGINES), (
        "initials name them in the table of dus probe"
    )
    for of_engine in WAYS.values():
        for of_type in of_engine.values():
            for way in of_type:
                assert way.source
                assert str(way)


# --- the trim that nobody gave --------------------------------------------------------------------


@pytest.mark.parametrize(
    ("of", "trim"),
    [
        (maps("gemma3_text", 18, **GEMMA3), 3),
        (maps("gemma3_text", 26, **GEMMA3), 7),
        (maps("gemma3_text", 34, **GEMMA3), 8),
        (maps("gemma3_text", 48, **GEMMA3), 12),
        (maps("gemma3_text", 62, **GEMMA3_27B), 16),
        (maps("gemma2", 26, **GEMMA2), 6),
        (maps("gemma2", 13, **GEMMA2), 3),  # none keeps it
        (maps("smollm3", 36, **SMOLLM3), 8),
        (maps("llama", 30), 7),
        (maps("llama", 1), 0),
    ],
    ids=lambda value: (
        f"{value.decoder.model_type}-{value.decoder.num_layers}" if isinstance(value, Maps) else ""
    ),
)
def test_the_default_trim_is_the_nearest_to_a_quarter_that_keeps_the_step(
    of: Maps, trim: int
) -> None:
    chosen = choose_trim(of)
    assert chosen.trim == trim
    assert (chosen.why is None) == (trim == of.decoder.num_layers // 4)


def test_for_engines_it_is_the_nearest_that_is_right_for_them() -> None:
    of = maps("smollm3", 36, **SMOLLM3)
    assert [choose_trim(of, (name,)).trim for name in ("llama.cpp", "mlx", "vllm")] == [8, 9, 9]
    none = maps("gemma2", 13, **GEMMA2)
    assert choose_trim(none, ("vllm",)).trim == 3
    with pytest.raises(EngineError, match="no trim keeps the step"):
        choose_trim(none, ("llama.cpp",))


def test_a_trim_that_the_config_cannot_say_is_not_named() -> None:
    of = maps("deepseek_v3", 18, q_lora_rank=32, first_k_dense_replace=3)
    assert all(trim >= 3 for trim in of.trims_without((), (), 0))


# --- the command ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gemma(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("gemma") / "base", "gemma3_text", 26, **GEMMA3)


WARNING = (
    "layer_types no longer repeats every 6 layers: llama.cpp, mlx-lm and transformers before 4.53 "
    "count layers and would compute another model in silence; --trim 4, 7 or 10 keep the step"
)


def test_an_explicit_trim_stays_and_is_warned_of_everywhere(gemma: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    report = report_of(dus("upscale", gemma, "--trim", "6", "-o", out, "--json"))
    assert (report["trim"], report["why_trim"], report["warnings"]) == (6, None, [WARNING])
    assert {one["engine"]: one["verdict"] for one in report["engines"]} == {
        "llama.cpp": "differs", "mlx": "differs", "vllm": "right", "transformers-4.52": "differs", "onnx": "right",
    }  # fmt: skip
    lineage = json.loads((out / "dus.json").read_text())
    assert lineage["engines"] == report["engines"]
    assert lineage["engines"][0]["base"] == "right"
    assert sorted(lineage["engines"][0]["trims"]) == [4, 7, 10]
    assert f"> **Note:** {WARNING}" in (out / "README.md").read_text()
    assert (
        f"warning: {WARNING}"
        in dus("upscale", gemma, "--trim", "6", "-o", tmp_path / "dry", "--dry-run").stdout
    )


def test_the_default_says_why_it_is_not_a_quarter(gemma: Path, tmp_path: Path) -> None:
    report = report_of(dus("upscale", gemma, "-o", tmp_path / "out", "--dry-run", "--json"))
    assert (report["trim"], report["warnings"]) == (7, [])
    assert report["why_trim"].startswith(
        "7, not a quarter of the layers: with 6, layer_types no longer repeats every 6"
    )
    text = dus("upscale", gemma, "-o", tmp_path / "out", "--dry-run").stdout
    assert "trim         7, not a quarter of the layers" in text


def test_for_is_a_refusal_that_names_the_trims(gemma: Path, tmp_path: Path) -> None:
    for asked in (["--for", "mlx,llama.cpp"], ["--for", "mlx-lm", "--for", "LLAMA.CPP"]):
        done = dus("upscale", gemma, "--trim", "6", *asked, "-o", tmp_path / "out")
        assert done.returncode == 1
        assert done.stderr == (
            "error: --for mlx,llama.cpp: layer_types no longer repeats every 6 layers: llama.cpp "
            "and mlx-lm count "
            "layers and would compute another model in silence; --trim 4, 7 or 10 keep the step\n"
        )
    assert not (tmp_path / "out").exists()
    assert (
        dus(
            "upscale", gemma, "--trim", "6", "--for", "vllm", "-o", tmp_path / "out", "-q"
        ).returncode
        == 0
    )
    assert (
        report_of(
            dus("upscale", gemma, "--for", "all", "-o", tmp_path / "o", "--dry-run", "--json")
        )["trim"]
        == 7
    )


@pytest.mark.parametrize(
    "options",
    [
        ["--recipe", "llama-pro"],
        ["--layers", "0:20,6:"],
        ["--trim", "6", "--identity"],
        ["--trim", "6", "--copies", "3"],
    ],
)
def test_every_way_to_say_a_map_is_judged(options: list[str], gemma: Path, tmp_path: Path) -> None:
    (said,) = report_of(
        dus("upscale", gemma, *options, "-o", tmp_path / "out", "--dry-run", "--json")
    )["warnings"]
    assert said == WARNING
    assert (
        dus(
            "upscale", gemma, *options, "--for", "mlx", "-o", tmp_path / "out", "--dry-run"
        ).returncode
        == 1
    )


def test_a_name_that_is_no_engine_is_a_usage_error(gemma: Path, tmp_path: Path) -> None:
    done = dus("upscale", gemma, "--for", "mlx,tgi", "-o", tmp_path / "out")
    assert done.returncode == 2
    assert "dus knows no engine 'tgi'; it knows llama.cpp, mlx, vllm" in done.stderr
    assert parse_engines(["ollama, mlx", "all"])[:2] == ("llama.cpp", "mlx")
    with pytest.raises(UsageError, match="no engine ''"):
        parse_engines(["mlx,"])


def test_a_release_out_of_step_is_made_again_with_from(gemma: Path, tmp_path: Path) -> None:
    dus("upscale", gemma, "--trim", "6", "--checksums", "-o", tmp_path / "out", "-q")
    record = json.loads((tmp_path / "out/dus.json").read_text())
    # What another dus knew of engines is no part of what is made.
    (tmp_path / "dus.json").write_text(json.dumps(record | {"engines": []}))
    again = dus("upscale", "--from", tmp_path / "dus.json", "-o", tmp_path / "again", "--json")
    assert report_of(again)["warnings"] == [WARNING]
    refused = dus(
        "upscale", "--from", tmp_path / "out/dus.json", "--for", "mlx", "-o", tmp_path / "third"
    )
    assert refused.returncode == 1


# --- an output that exists ------------------------------------------------------------------------


def test_verify_judges_an_output_whoever_made_it(gemma: Path, tmp_path: Path) -> None:
    for name, trim in (("in-step", "7"), ("out-of-step", "6")):
        dus("upscale", gemma, "--trim", trim, "-o", tmp_path / name, "-q")
    assert dus("verify", tmp_path / "in-step", "--for", "all").returncode == 0
    out = tmp_path / "out-of-step"
    assert dus("verify", out).returncode == 0
    assert dus("verify", out, "--for", "vllm").returncode == 0
    (out / "dus.json").unlink()
    done = dus("verify", out, "--for", "llama.cpp", "--json")
    assert done.returncode == 1
    report = json.loads(done.stdout)
    assert report["problems"] == [
        (
            "layer_types does not repeat every 6 layers: llama.cpp counts layers and would compute "
            "another model in silence"
        )
    ]
    assert [(one["engine"], one["verdict"]) for one in report["engines"]] == [
        ("llama.cpp", "differs")
    ]


def test_a_config_alone_is_judged_by_what_its_class_makes_of_it() -> None:
    """A period without a list is what the class draws; where a list stands beside it, the list
    counts.
    """
    drawn = config("cohere2", 12, sliding_window_pattern=3)
    assert [one.engine.name for one in judge_config(drawn) if one.verdict.is_wrong] == ["llama.cpp"]
    listed = drawn | {"layer_types": LLLG * 3}
    judged = judge_config(listed)
    assert [one.engine.name for one in judged if one.verdict.is_wrong] == [
        "mlx",
        "transformers-4.52",
    ]
