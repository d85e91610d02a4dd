"""lm-evaluation-harness: the plain command on a local task, held against the loglikelihoods that
transformers gives.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from stack.helpers import run

TASK = """\
task: capitals
dataset_path: json
dataset_kwargs: {{data_files: {{test: {data}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: "{{{{answer}}}}"
metric_list: [{{metric: acc}}]
metadata: {{version: 1}}
"""

QUESTIONS: list[dict[str, Any]] = [
    {
        "question": f"The capital of {country} is",
        "choices": ["Paris", "Rome", "Berlin"],
        "answer": answer,
    }
    for country, answer in (("France", 0), ("Italy", 1), ("Germany", 2), ("the moon", 1))
]


def loglikelihood(model: Any, tokenizer: Any, context: str, choice: str) -> float:
    """Of the choice's tokens behind the context's, as the harness splits them."""
    import torch

    ids, start = tokenizer(f"{context} {choice}").input_ids, len(tokenizer(context).input_ids)
    with torch.no_grad():
        logs = model(torch.tensor([ids])).logits[0].float().log_softmax(-1)
    return sum(float(logs[place - 1, ids[place]]) for place in range(start, len(ids)))


def test_the_harness_scores_the_healed_model_as_its_logits_say(
    healed: Path, tokenizer: Any, tmp_path: Path
) -> None:
    import torch
    from transformers import AutoModelForCausalLM

    data = tmp_path / "capitals.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in QUESTIONS))
    (tmp_path / "tasks").mkdir()
    (tmp_path / "tasks/capitals.yaml").write_text(TASK.format(data=data))
    command = [
        shutil.which("lm_eval", path=str(Path(sys.executable).parent)) or "lm_eval",
        "run",
        "--model",
        "hf",
    ]
    command += ["--model_args", f"pretrained={healed},dtype=float32", "--tasks", "capitals"]
    command += ["--include_path", str(tmp_path / "tasks"), "--device", "cpu", "--batch_size", "1"]
    command += ["--output_path", str(tmp_path / "results"), "--log_samples"]
    run(*command, HF_DATASETS_CACHE=str(tmp_path / "cache"))

    model = AutoModelForCausalLM.from_pretrained(healed, dtype=torch.float32)
    expected = [
        [loglikelihood(model, tokenizer, row["question"], choice) for choice in row["choices"]]
        for row in QUESTIONS
    ]
    samples = [
        json.loads(line)
        for line in next(tmp_path.glob("results/*/samples_*.jsonl")).read_text().splitlines()
    ]
    found = [[float(answer[0][0]) for answer in sample["resps"]] for sample in samples]
    for ours, theirs in zip(expected, found, strict=True):
        assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-3
    right = sum(
        scores.index(max(scores)) == row["answer"]
        for scores, row in zip(expected, QUESTIONS, strict=True)
    )
    results = json.loads(next(tmp_path.glob("results/*/results_*.json")).read_text())
    assert results["results"]["capitals"]["acc,none"] == right / len(QUESTIONS)
    assert results["config"]["model_num_parameters"] == sum(p.numel() for p in model.parameters())
