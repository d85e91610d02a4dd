"""The commands of docs/instruct.md, as they stand there, on data sets with the columns of the
published ones.
"""

from __future__ import annotations

import json
import re
import shlex
import sys
from pathlib import Path
from typing import Any

import pytest
from stack.helpers import ROOT, run, tensors

SIZE = "--max_steps 2 --gradient_accumulation_steps 1 --max_length 96 --logging_steps 1 --save_strategy no".split()
CPU = "--use_cpu --bf16 False".split()


def commands() -> dict[str, list[str]]:
    """The Python commands of the page by their script's name."""
    page = (ROOT / "docs/instruct.md").read_text().replace("\\\n", " ")
    lines = [
        shlex.split(line) for line in re.findall(r"^python docs/instruct/.*$", page, re.MULTILINE)
    ]
    return {Path(line[1]).stem: line[1:] for line in lines}


def write_rows(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, healed: Path) -> Path:
    """Where the commands run: the healed model, and folders that datasets finds before it asks
    the Hub.
    """
    folder = tmp_path_factory.mktemp("instruct")
    (folder / "healed").symlink_to(healed)

    def talk(question: str, answer: str) -> list[dict[str, str]]:
        return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]

    few = range(6)
    write_rows(
        folder / "c-s-ale/alpaca-gpt4-data/train.jsonl",
        [
            {
                "instruction": f"Name the layer after layer {i}.",
                "input": "",
                "output": f"Layer {i + 1}.",
            }
            for i in few
        ],
    )
    write_rows(
        folder / "Open-Orca/OpenOrca/train.jsonl",
        [
            {"id": str(i), "system_prompt": "", "question": f"{i} + 2?", "response": f"{i + 2}."}
            for i in few
        ],
    )
    write_rows(
        folder / "meta-math/MetaMathQA/train.jsonl",
        [
            {
                "type": "GSM_Rephrased",
                "query": f"What is {i}+1?",
                "response": f"The answer is: {i + 1}",
            }
            for i in few
        ],
    )
    write_rows(
        folder / "Intel/orca_dpo_pairs/train.jsonl",
        [
            {"system": "", "question": f"{i} + 3?", "chosen": f"{i + 3}.", "rejected": "No idea."}
            for i in few
        ],
    )
    write_rows(
        folder / "allenai/ultrafeedback_binarized_cleaned/data/train_prefs-00000-of-00001.jsonl",
        [
            {"prompt": "Hi?", "chosen": talk("Hi?", f"Hello {i}."), "rejected": talk("Hi?", "No.")}
            for i in few
        ],
    )
    return folder


def trained(folder: Path, name: str) -> str:
    """Run one of the page's commands for two steps; what it logged."""
    script, *options = commands()[name]
    cache = str(folder / "cache")
    return run(
        sys.executable, ROOT / script, *options, *SIZE, *CPU, cwd=folder, HF_DATASETS_CACHE=cache
    )


def changed(before: Path, after: Path) -> int:
    """How many tensors differ; names, shapes and dtypes must not."""
    a, b = tensors(before), tensors(after)
    assert {name: (t.shape, t.dtype) for name, t in a.items()} == {
        name: (t.shape, t.dtype) for name, t in b.items()
    }
    return sum(not a[name].equal(b[name]) for name in a)


def test_the_page_has_every_script_and_no_other() -> None:
    assert list(commands()) == ["sft", "dpo", "adapter"]


def test_instruction_tuning_then_alignment_tuning_of_the_healed_model(
    folder: Path, healed: Path
) -> None:
    log = trained(folder, "sft")
    losses = [float(loss) for loss in re.findall(r"'loss': '?([0-9.e-]+)", log)]
    assert len(losses) == 2, log
    assert all(0 < loss < 20 for loss in losses)
    assert changed(healed, folder / "sft") > 46
    log = trained(folder, "dpo")
    first = float(re.findall(r"'loss': '?([0-9.e-]+)", log)[0])
    assert abs(first - 0.6931) < 0.001, (
        "the first loss of DPO is log 2: policy and reference are one"
    )
    assert changed(folder / "sft", folder / "dpo") > 0

    from transformers import AutoTokenizer, pipeline

    tokenizer = AutoTokenizer.from_pretrained(folder / "dpo")
    prompt = tokenizer.apply_chat_template(
        [{"role": "user", "content": "2 + 2?"}], tokenize=False, add_generation_prompt=True
    )
    assert prompt == "### User:\n2 + 2?\n\n### Assistant:\n"
    generate = pipeline("text-generation", model=str(folder / "dpo"), dtype="float32")
    assert generate(prompt, max_new_tokens=4, do_sample=False)[0]["generated_text"].startswith(
        prompt
    )


def test_an_answer_ends_with_the_end_of_text(tokenizer: Any) -> None:
    from copy import deepcopy

    from rows import set_template

    solar = deepcopy(tokenizer)
    set_template(solar, solar=True)
    talk = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "U"},
        {"role": "assistant", "content": "A"},
    ]
    text = solar.apply_chat_template(talk, tokenize=False)
    assert text == f"### System:\nS\n\n### User:\nU\n\n### Assistant:\nA{tokenizer.eos_token}"
    own = deepcopy(tokenizer)
    set_template(own, solar=False)
    assert own.chat_template == tokenizer.chat_template


def test_rows_of_no_known_data_set_are_refused() -> None:
    from rows import instruction, preference

    for convert in (instruction, preference):
        with pytest.raises(ValueError, match="in a row of text"):
            convert({"text": "…"})
