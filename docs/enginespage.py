"""docs/engines.md: the table of `maps/engines.py`, and the trims of well-known bases that are
right by it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import pairwise
from types import MappingProxyType
from typing import Any, NamedTuple

from dus_cli.maps.engines import (
    ENGINES,
    WAYS,
    Absent,
    ByDepth,
    Counts,
    Engine,
    OneWindow,
    Reads,
    Spells,
    Way,
)
from dus_cli.maps.layers import largest_trim
from dus_cli.maps.model_config import decoder_config
from dus_cli.planning.judging import Maps, choose_trim

_INTRO = """\
# Inference engines

A deeper model goes to llama.cpp, MLX, vLLM or an older transformers. Some of these do not read what config.json says of
each layer: they derive a layer's kind from its number, or a scale from the number of layers. A layer map shifts numbers,
so such an engine loads the model and computes another one, without an error. `dus` has a table of these engines:

- `dus upscale` warns in its plan, in `--json`, in dus.json and in the model card, and names the trims that are right.
- Without `--trim` it takes the trim nearest to a quarter with which the fewest engines compute another model, and says so
  if that is not a quarter. A `--trim` that was given is kept.
- `--for llama.cpp,mlx` (also repeated, or `--for all`) turns the warning into an error; without `--trim` it takes the trim
  nearest to a quarter that is right for those engines. `--recipe`, `--layers`, `--copies` and `--identity` are judged in the
  same way.
- `dus verify OUT --for llama.cpp` judges an existing model, made by dus or not.
- `dus probe` has a column for the engines that compute another model, and with `--for` recommends only maps that are right.

If an engine computes the *base* too in another way than config.json says (it has no sliding windows, for example), the map
is not the cause, and only `--for` reports it.\
"""

_TABLE = """\
## The table

Made from [`dus_cli/maps/engines.py`](../dus_cli/maps/engines.py) by `make docs`. A type without a row has layers of
one kind, or was not examined; an empty cell is an engine that was not examined for that type.\
"""

_WORDS = """\
*reads*: it reads from config.json what each layer is. *counts, n*: it derives that from the layer's number, every n-th layer
being of another kind. *by depth*: something is derived from the number of layers. *no windows*, *all windows*: every layer
gets full attention, or the window, in the base too. *no*: it does not know the type. Cells in brackets were read in the
source and not run.\
"""

_HELP = """\
## A GGUF that is right out of step

llama.cpp's library takes the kinds of the layers from the GGUF where it has an array of them. Its converter does not write
that array for `gemma2`, `gemma3_text`, `cohere2` and `gpt_oss`, so that the library counts. The gguf package, which is on
PyPI, can add it ([`layer_kinds.py`](gguf/layer_kinds.py) is ten lines); it copies the file and keeps every tensor:

```
python convert_hf_to_gguf.py OUT --outfile model.gguf
python docs/gguf/layer_kinds.py OUT model.gguf right.gguf
```

The file is then right for any map, in step or not, for `--layers` and for `--recipe llama-pro`: five outputs that
llama.cpp had computed differently, by more than 0.5 in log probability, then agreed with transformers within 0.05
(`tests/stack/test_engines.py`; xllamacpp 2026.10.11549, 2026-11-30). Quantise `right.gguf` afterwards as any other.

If the library itself counts layers, no array helps. This holds for `smollm3`, `llama4_text`, `afmoe` and `exaone4`, for
`minicpm3` and the lite models of DeepSeek at any other depth, for Gemma 2 with 46 layers and Gemma 3 with 62, and for
`gemma3n_text`, whose layers from number 20 on share keys. For these, use a trim that is right, or, if the table names none,
another engine.

There is no `dus export gguf`. It would add to these two lines only the converter, which is in no wheel: neither in
gguf nor in llama-cpp-python or xllamacpp, only in the source releases of the latter two and in llama.cpp's own
repository, each version for its own library. dus would have to maintain a copy of it.

`mlx_lm.convert` writes the same tensors as the folder has, and config.json as it is, with `layer_types`. But mlx-lm's class
for the type counts by a period and does not read that list, so an output that is out of step is computed differently,
converted or not: `gemma3_text` of 12 layers at trim 2 by 2.36 in log probability (mlx-lm 0.32.2, 2026-11-30). Only for
`exaone4` could a file express the pattern, as a text with a letter for each layer (`sliding_window_pattern`: "LLLGLLG…").
SGLang takes that text's length as the period, so dus does not write it.\
"""

_HELD = """\
## A proof for any architecture

The tables cover only the types that they name. `dus verify OUT --base BASE --forward` (it needs the `heal` extra) uses no
table. The installed transformers loads OUT and runs it on a short text, or on the text of `--data`. Then it loads the base,
and calls each layer of the base, as the base calls it, with the inputs that its copies in OUT received, scaled by the
start's factor if there is one. The layer must return what the copies returned, and the modules before and after the layers
must agree too. Step by step this shows that the logits of OUT are those of the base's layers called in the map's order;
mostly to the bit, in fp32. If layers differ, the error names the first one, with the differences of its hidden
states and of the logits. `dus upscale --verify forward` does this before it publishes.

The weights of one layer at a time are in memory, beside embeddings and head. The text is longer than narrow sliding windows
(up to 1024 tokens); a wider window is a warning, because the text cannot show which layers have it. Layers that pass more
than hidden states to the next (`zaya`, `glm_moe_dsa`, `hy_v4`, `inkling2_text`, `reformer`, and Gemma's where they share
keys) cannot be called one by one, and are refused with the reason.

## How the rows were checked

For each row, a tiny random base, an output in step with the period and one out of step were run in fp32: the logits of the
engine were compared with those of transformers 5.23 on the same folder, over 40 tokens with a window of 8. A row counts as
run if the engine agrees with transformers on the base. Logits that differ do so by 1 to 10, where logits are up to 28, and
logits that agree by less than 0.03. [In the ordinary stack](ecosystem.md#engines-that-count-layers) says which of these
`make stack` runs; vLLM and ONNX Runtime GenAI were run once, by hand (2026-11-29). "read" rows were read in
the source at the line given, and not run.

Of other engines the source alone was read: sglang 0.5.10 counts for gemma2, exaone4 and llama4, lmdeploy 0.18.0 for
gemma3, gemma2 and llama4, Megatron Bridge 0.6.2 for gemma2, gemma3 and gpt_oss, torchtitan 0.3.0 for gpt_oss, exllamav3
1.6.5 for gemma2. Ollama and LM Studio run llama.cpp's GGUF. CTranslate2 4.8.5 reads `layer_types` (gemma3, run), and so
does transformers from 4.53 on.

Tried without a result (2026-11-30): `gemma3n_text` in llama.cpp. Even a tiny random base of 22 layers differs from
transformers by 7.5 (xllamacpp 2026.10.11549), an output by 7.2, and at another depth the library aborts. It expects keys and values of the layers that share those of others, which files on the Hub
have and transformers 5 does not save. No model of Google's own widths was available.

Known and not judged: llama.cpp derives the decay rates of MiniMax-Text-01 and MiniMax-M1 from the layer's number and the
number of layers (`src/models/minimax-01.cpp:288`), so no deeper model can be right there.\
"""

_TRIMS = """\
## Trims of thirty bases

These trims are right in every engine of the table that can be right, for two copies; more copies shift by the same step.
*trim* is what `dus upscale` takes if none is given.\
"""


class _Base(NamedTuple):
    """A published model: what its config.json says that an engine goes by."""

    name: str
    model_type: str
    num_layers: int
    fields: Mapping[str, Any] = MappingProxyType({})


def _gemma(hidden: int, heads: int, head_dim: int, scalar: int) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "head_dim": head_dim,
        "query_pre_attn_scalar": scalar,
        "sliding_window": 4096,
    }


_LLLG = ["sliding_attention"] * 3 + ["full_attention"]
_BASES = (
    _Base("google/gemma-3-270m", "gemma3_text", 18, _gemma(640, 4, 256, 256)),
    _Base("google/gemma-3-1b", "gemma3_text", 26, _gemma(1152, 4, 256, 256)),
    _Base("google/gemma-3-4b", "gemma3_text", 34, _gemma(2560, 8, 256, 256)),
    _Base("google/gemma-3-12b", "gemma3_text", 48, _gemma(3840, 16, 256, 256)),
    _Base("google/gemma-3-27b", "gemma3_text", 62, _gemma(5376, 32, 128, 168)),
    _Base("google/gemma-2-2b", "gemma2", 26, _gemma(2304, 8, 256, 256)),
    _Base("google/gemma-2-9b", "gemma2", 42, _gemma(3584, 16, 256, 256)),
    _Base("google/gemma-2-27b", "gemma2", 46, _gemma(4608, 32, 128, 144)),
    _Base("openai/gpt-oss-20b", "gpt_oss", 24),
    _Base("openai/gpt-oss-120b", "gpt_oss", 36),
    _Base("HuggingFaceTB/SmolLM3-3B", "smollm3", 36, {"use_sliding_window": False}),
    _Base("CohereLabs/c4ai-command-r7b-12-2024", "cohere2", 32),
    _Base("CohereLabs/c4ai-command-a-03-2025", "cohere2", 64),
    _Base("meta-llama/Llama-4-Scout-17B-16E", "llama4_text", 48),
    _Base("LGAI-EXAONE/EXAONE-4.0-1.2B", "exaone4", 30, {"layer_types": ["full_attention"] * 30}),
    _Base(
        "LGAI-EXAONE/EXAONE-4.0-32B",
        "exaone4",
        64,
        {"sliding_window": 4096, "sliding_window_pattern": "LLLG", "layer_types": _LLLG * 16},
    ),
    _Base("arcee-ai/Trinity-Mini", "afmoe", 32, {"num_dense_layers": 2}),
    _Base("allenai/Olmo-3-1025-7B", "olmo3", 32),
    _Base("Qwen/Qwen3-Next-80B-A3B-Instruct", "qwen3_next", 48),
    _Base("openbmb/MiniCPM3-4B", "minicpm3", 62),
    _Base(
        "deepseek-ai/DeepSeek-V2-Lite",
        "deepseek_v2",
        27,
        {"q_lora_rank": None, "first_k_dense_replace": 1},
    ),
    _Base("mistralai/Mistral-7B-v0.3", "mistral", 32, {"sliding_window": None}),
    _Base("meta-llama/Llama-3.1-8B", "llama", 32),
    _Base("meta-llama/Llama-3.2-1B", "llama", 16),
    _Base("Qwen/Qwen2.5-7B", "qwen2", 28, {"use_sliding_window": False}),
    _Base("Qwen/Qwen3-0.6B", "qwen3", 28, {"use_sliding_window": False}),
    _Base("Qwen/Qwen3-8B", "qwen3", 36, {"use_sliding_window": False}),
    _Base("HuggingFaceTB/SmolLM2-135M", "llama", 30),
    _Base("HuggingFaceTB/SmolLM2-1.7B", "llama", 24),
    _Base("ibm-granite/granite-3.3-2b-base", "granite", 40),
)


def engines_page() -> str:
    """The page in Markdown."""
    heads = [f"{engine.title} ({engine.version.split()[-1]})" for engine in ENGINES]
    types = sorted({name for of_engine in WAYS.values() for name in of_engine})
    rows = [[f"`{name}`", *(_cell(engine, name) for engine in ENGINES)] for name in types]
    parts = [
        _INTRO,
        _TABLE,
        _table(["model type", *heads], rows),
        _WORDS,
        "## What each engine computes differently",
        _table(["engine", "model type", "what it does", "line", "checked"], list(_departures())),
        _HELP,
        _HELD,
        _TRIMS,
        _table(
            ["base", "layers", "trim", "right with", "wrong with any trim"],
            [_trims(base) for base in _BASES],
        ),
    ]
    return "\n\n".join(parts) + "\n"


def _table(head: list[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(
        "|" + "".join(f" {cell} |" if cell else " |" for cell in line) for line in lines
    )


def _cell(engine: Engine, model_type: str) -> str:
    words = [
        _word(way) if way.is_run else f"({_word(way)})"
        for way in WAYS[engine.name].get(model_type, ())
    ]
    return ", ".join(dict.fromkeys(words))


def _word(way: Way) -> str:
    if isinstance(way, Counts):
        return f"counts, {way.period}"
    if isinstance(way, OneWindow):
        return "all windows" if way.all_slide else "no windows"
    names: dict[type, str] = {
        Reads: "reads",
        Spells: "counts, its text",
        ByDepth: "by depth",
        Absent: "no",
    }
    return names[type(way)]


def _departures() -> Iterator[list[str]]:
    for engine in ENGINES:
        for model_type, of_type in sorted(WAYS[engine.name].items()):
            for way in of_type:
                if not isinstance(way, (Reads, Absent)):
                    checked = "run" if way.is_run else "read"
                    yield [engine.title, f"`{model_type}`", str(way), f"`{way.source}`", checked]


def _trims(base: _Base) -> list[str]:
    config = {"model_type": base.model_type, "num_hidden_layers": base.num_layers, **base.fields}
    maps = Maps(config, decoder_config(config))
    wrong = {
        trim: {one.engine.title for one in maps.of_trim(trim) if one.verdict.is_wrong}
        for trim in range(largest_trim(base.num_layers) + 1)
        if maps.can_be(trim)
    }
    never = set.intersection(*wrong.values())
    right = [trim for trim, engines in wrong.items() if engines == never]
    always = ", ".join(engine.title for engine in ENGINES if engine.title in never)
    return [
        base.name,
        str(base.num_layers),
        str(choose_trim(maps).trim),
        _span(right, list(wrong)),
        always,
    ]


def _span(trims: list[int], every: list[int]) -> str:
    """Numbers in short: all of them, runs of one step, or as they are."""
    if trims == every:
        return "every trim" if trims[0] == 0 else f"every trim from {trims[0]} on"
    steps = {after - before for before, after in pairwise(trims)}
    if len(steps) == 1 and len(trims) > 4:
        return f"{trims[0]}, {trims[1]}, {trims[2]} … {trims[-1]}"
    missing = [trim for trim in every if trim not in trims]
    if len(missing) < len(trims) // 3:
        return f"every trim except {', '.join(map(str, missing))}"
    return ", ".join(map(str, trims))
