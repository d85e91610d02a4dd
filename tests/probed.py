"""Tiny models with a tokenizer of letters, and their losses by `dus probe` and by transformers."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
import zoo

from dus_cli.common.reference import ModelRef
from dus_cli.data.sample import Packed, read_sample
from dus_cli.data.tokeniser import open_tokeniser
from dus_cli.models.precision import Precision
from dus_cli.probe.found import Probe
from dus_cli.probe.options import ProbeOptions
from dus_cli.probe.verb import probe
from dus_cli.progress import NoProgress

LETTERS = "abcdefghijklmnopqrstuvwxyz ."


def write_model(folder: Path, model_type: str, *, whole: bool = False) -> Path:
    """Write a tiny random model of seven layers and a tokenizer of letters, whose ids are all below
    the model's vocabulary of 96.
    """
    from tokenizers import Tokenizer, models

    zoo.tiny_model(model_type, whole=whole).save_pretrained(folder)
    vocab = {"<unk>": 0, "<eos>": 2} | {letter: 3 + index for index, letter in enumerate(LETTERS)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[], unk_token="<unk>"))
    tokenizer.add_special_tokens(["<eos>"])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": "<eos>",
        "unk_token": "<unk>",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def measured(model: Path, corpus: Path, **options: Any) -> Probe:
    """Probe 100 tokens in rows of 24, which is longer than the sliding windows, in fp32."""
    usual = ProbeOptions(data=(str(corpus),), tokens=100, seq_length=24, precision=Precision.fp32)
    has_maps = options.keys() & {"trims", "layers", "double", "search"}
    maps = {} if has_maps else {"trims": (2, 3)}
    settings = replace(usual, **(maps | options))
    ref = ModelRef.parse(str(model))
    return probe(ref, settings, NoProgress(), quiet=True)


def own_loss(folder: Path, corpus: Path) -> float:
    """The loss that transformers computes for the model in a folder, on the same rows."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    tokeniser = open_tokeniser(folder, 96)
    rows = Packed(
        read_sample([str(corpus)], tokeniser, 100).texts, tokeniser, 24, document_mask=False
    )
    total, count = 0.0, 0
    for row in rows:
        labels = torch.from_numpy(row.labels)
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(row.input_ids)[None]).logits[0].float()
        total += float(torch.nn.functional.cross_entropy(logits, labels, reduction="sum"))
        count += int((labels != -100).sum())
    return total / count
