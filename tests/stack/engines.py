"""Tiny random bases in the words of the Hub's files, and what each inference engine computes of
a checkpoint.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

from stack.helpers import ROOT, run

# Tokens that are put in, far beyond the windows of the bases.
IDS = [(37 * place * place + 11 * place + 5) % 700 + 20 for place in range(40)]

_SIZES: dict[str, Any] = {
    "vocab_size": 49152, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 4096, "sliding_window": 8,
    "initializer_range": 0.2, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class TinyBase:
    """A base of a few thousand parameters a layer: what its class is given, and what its file says
    in other words.

    `hub` are fields that its config.json gets, and `gone` those that it loses, so that it says what
    the Hub's does. `keeps_rope`: its `rope_parameters` stay, for its class has others where the
    file is silent.
    """

    model_type: str
    num_layers: int
    fields: dict[str, Any] = field(default_factory=dict)
    hub: dict[str, Any] = field(default_factory=dict)
    gone: tuple[str, ...] = ()
    needs_sentencepiece: bool = False
    keeps_rope: bool = False

    def write(self, folder: Path) -> Path:
        """The checkpoint, in fp32."""
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM

        torch.manual_seed(0)
        sizes = _SIZES | {"num_hidden_layers": self.num_layers} | self.fields
        config = AutoConfig.for_model(self.model_type, **sizes)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():  # norms that are all ones would hide where one is taken for another
            for name, parameter in model.named_parameters():
                if parameter.dim() == 1 and "sinks" not in name:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        model.save_pretrained(folder)
        said = (
            json.loads((folder / "config.json").read_text()) | {"torch_dtype": "float32"} | self.hub
        )
        if not self.keeps_rope:
            said |= _rope_as_on_the_hub(said.pop("rope_parameters", None) or {})
        (folder / "config.json").write_text(
            json.dumps({k: v for k, v in said.items() if k not in self.gone}, indent=2)
        )
        _write_tokenizer(folder, with_sentencepiece=self.needs_sentencepiece)
        return folder


def _rope_as_on_the_hub(rope: dict[str, Any]) -> dict[str, Any]:
    """Transformers 5 says `rope_parameters`, by kind of layer where they differ; files on the
    Hub a field for each.
    """
    if "full_attention" in rope:
        full, sliding = rope["full_attention"], rope["sliding_attention"]
        return {"rope_theta": full["rope_theta"], "rope_local_base_freq": sliding["rope_theta"]}
    return {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}


def _write_tokenizer(folder: Path, *, with_sentencepiece: bool) -> None:
    """SmolLM2's, which llama.cpp's converter knows by its hash; and a model of sentencepiece
    where it asks for one.
    """
    for name in (
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "vocab.json",
        "merges.txt",
    ):
        source = Path(os.environ["SMOLLM2"]) / name
        if source.exists():
            shutil.copyfile(source, folder / name)
    if with_sentencepiece:
        import sentencepiece

        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(text[:2000] for text in topics.values()),
            model_prefix=str(folder / "tokenizer"),
            vocab_size=400,
            minloglevel=2,
        )
        (folder / "tokenizer.vocab").unlink()


# --- engines: from a folder and ids to log probabilities ------------------------------------------


@dataclass(frozen=True)
class Computed:
    """Log probabilities, positions x tokens: of every position and token, or of some `tokens` at
    the last position.
    """

    values: Any
    tokens: Any = None

    def difference(self, reference: Computed) -> float:
        """The largest difference from a reference that has all, over the tokens that are likely
        in either.
        """
        import numpy as np

        theirs = reference.values if self.tokens is None else reference.values[-1:, self.tokens]
        is_likely = np.maximum(self.values, theirs) > -12
        return float(np.abs(self.values - theirs)[is_likely].max())


def by_transformers(folder: Path) -> Computed:
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager"
    ).eval()
    with torch.no_grad():
        return Computed(model(torch.tensor([IDS])).logits[0].log_softmax(-1).numpy())


def by_llama_cpp(folder: Path) -> Computed:
    """Its converter's GGUF, run."""
    out = converted(folder)
    try:
        return by_gguf(out)
    finally:
        out.unlink()


def by_llama_cpp_with_kinds(folder: Path) -> Computed:
    """The same GGUF with the kinds of its layers, as docs/engines.md has it, run."""
    out, right = converted(folder), folder.with_name(f"{folder.name}-right.gguf")
    run(sys.executable, ROOT / "docs/gguf/layer_kinds.py", folder, out, right)
    out.unlink()
    try:
        return by_gguf(right)
    finally:
        right.unlink()


def converted(folder: Path) -> Path:
    """The GGUF that llama.cpp's converter makes of a folder."""
    llama_cpp, out = (
        Path(os.environ["STACK"]) / "llama.cpp",
        folder.with_name(f"{folder.name}.gguf"),
    )
    convert = (
        sys.executable,
        llama_cpp / "convert_hf_to_gguf.py",
        folder,
        "--outtype",
        "f32",
        "--outfile",
        out,
    )
    run(*convert, PYTHONPATH=str(llama_cpp / "gguf-py"))
    return out


def by_gguf(path: Path) -> Computed:
    """What llama.cpp's library computes of a file: the best hundred tokens of the last position."""
    import numpy as np
    import xllamacpp

    params = xllamacpp.CommonParams()
    params.model.path, params.n_ctx, params.n_parallel, params.warmup = str(path), 128, 1, False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    asked = {"prompt": IDS, "max_tokens": 1, "temperature": 0, "logprobs": 100}
    (token,) = server.handle_completions(asked)["choices"][0]["logprobs"]["content"]
    best = token["top_logprobs"]
    return Computed(
        np.array([[one["logprob"] for one in best]]), np.array([one["id"] for one in best])
    )


def by_mlx(folder: Path) -> Computed:
    import mlx.core as mx
    import numpy as np
    from mlx_lm.utils import load_model

    mx.set_default_device(mx.cpu)
    model, _ = load_model(folder)
    logits = model(mx.array([IDS]))[0].astype(mx.float32)
    return Computed(np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True)))


# Run by an older transformers, so it imports nothing of ours.
_OLDER = """
import json, sys, numpy, torch, transformers
model = transformers.AutoModelForCausalLM.from_pretrained(
    sys.argv[1], torch_dtype=torch.float32, attn_implementation="eager"
).eval()
with torch.no_grad():
    numpy.save(sys.argv[3], model(torch.tensor([json.loads(sys.argv[2])])).logits[0].log_softmax(-1).numpy())
"""


def by_transformers_451(folder: Path) -> Computed:
    import numpy as np

    out = folder.with_name(f"{folder.name}.npy")
    libraries = str(Path(os.environ["STACK"]) / "transformers-4.51.3")
    run(
        sys.executable,
        "-W",
        "ignore",
        "-c",
        _OLDER,
        folder,
        json.dumps(IDS),
        out,
        PYTHONPATH=libraries,
    )
    values = np.load(out)
    out.unlink()
    return Computed(values)


# By the names that `--for` knows.
BY_ENGINE: dict[str, Callable[[Path], Computed]] = {
    "llama.cpp": by_llama_cpp,
    "mlx": by_mlx,
    "transformers-4.52": by_transformers_451,
}
