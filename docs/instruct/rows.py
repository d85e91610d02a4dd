"""Rows of published data sets as TRL's trainers read them, and SOLAR's chat template."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from datasets import Dataset, concatenate_datasets, load_dataset
from transformers import PreTrainedTokenizerBase

Row = dict[str, Any]

# The text that SOLAR-10.7B-Instruct-v1.0's own template makes of a turn, and behind each answer the
# end-of-text token: the published template has none there, and a model that never sees one does not
# learn to stop.
SOLAR_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message.role == 'system' %}{% if message.content %}"
    "{{ '### System:\n' + message.content + '\n\n' }}"
    "{% endif %}"
    "{% elif message.role == 'user' %}{{ '### User:\n' + message.content + '\n\n' }}"
    "{% elif message.role == 'assistant' %}{{ '### Assistant:\n' + message.content + eos_token }}"
    "{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '### Assistant:\n' }}{% endif %}"
    "{% endfor %}"
)


def instruction(row: Row) -> Row:
    """A row of Alpaca-GPT4, OpenOrca, MetaMathQA, or of messages: a prompt and the answer to learn.

    Raises:
        ValueError: columns of none of them.
    """
    if "messages" in row:
        return {"prompt": row["messages"][:-1], "completion": row["messages"][-1:]}
    if "instruction" in row:  # c-s-ale/alpaca-gpt4-data
        question = "\n\n".join(part for part in (row["instruction"], row.get("input")) if part)
        return {"prompt": _asked(question), "completion": _answered(row["output"])}
    if "question" in row:  # Open-Orca/OpenOrca
        return {
            "prompt": _asked(row["question"], row.get("system_prompt")),
            "completion": _answered(row["response"]),
        }
    if "query" in row:  # meta-math/MetaMathQA
        return {"prompt": _asked(row["query"]), "completion": _answered(row["response"])}
    raise ValueError(f"no instruction in a row of {', '.join(row)}")


def preference(row: Row) -> Row:
    """A row of Orca DPO Pairs or Ultrafeedback: a prompt, the answer preferred, the one rejected.

    Raises:
        ValueError: columns of neither of them.
    """
    if not {"chosen", "rejected"} <= row.keys():
        raise ValueError(f"no preference in a row of {', '.join(row)}")
    if isinstance(row["chosen"], str):  # Intel/orca_dpo_pairs
        prompt = _asked(row["question"], row.get("system"))
        return {
            "prompt": prompt,
            "chosen": _answered(row["chosen"]),
            "rejected": _answered(row["rejected"]),
        }
    # allenai/ultrafeedback_binarized_cleaned: whole conversations, equal up to the last answer
    return {
        "prompt": row["chosen"][:-1],
        "chosen": row["chosen"][-1:],
        "rejected": row["rejected"][-1:],
    }


def load(sources: list[str], convert: Callable[[Row], Row], seed: int) -> Dataset:
    """The rows of all sources, converted and shuffled.

    A source is a .jsonl file or a data set on the Hub, with @SPLIT for another split than train,
    and :N for N rows chosen at random: Open-Orca/OpenOrca:100000.
    """
    parts = []
    for source in sources:
        name, _, num_rows = source.partition(":")
        name, _, split = name.partition("@")
        if name.endswith(".jsonl"):
            rows = load_dataset("json", data_files=name, split="train")
        else:
            rows = load_dataset(name, split=split or "train")
        if num_rows:
            rows = rows.shuffle(seed=seed).select(range(min(int(num_rows), len(rows))))
        parts.append(rows.map(convert, remove_columns=rows.column_names))
    return concatenate_datasets(parts).shuffle(seed=seed)


def set_template(tokenizer: PreTrainedTokenizerBase, *, solar: bool) -> None:
    """SOLAR's chat template for a tokenizer that has none, or where it is asked for."""
    if solar or tokenizer.chat_template is None:
        tokenizer.chat_template = SOLAR_TEMPLATE


def _asked(question: str, system: str | None = None) -> list[Row]:
    first = [{"role": "system", "content": system}] if system else []
    return [*first, {"role": "user", "content": question}]


def _answered(text: str) -> list[Row]:
    return [{"role": "assistant", "content": text}]
