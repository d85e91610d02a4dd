r"""transformers' Trainer on the rows that `dus heal` trains on, in a process of its own.

    python tests/benchmarks/trainer.py RUN_JSON --steps 15 [--eval-every 1] [--batch-rows 8] \
        [--lr 1e-4]

RUN_JSON is written by `dus heal --print-command` for the same model and data. Everything else is
the Trainer's default: fp32 weights under bf16 autocast, AdamW, full logits. Prints JSON lines:
step, tokens, loss or eval_loss, and at the end tokens_per_second, tokens_per_cpu_second and
peak_memory_bytes. The time of evaluations is not counted.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from dus_cli.data.streams import Prepared, Rows, RowsInOrder, heldout_rows
from dus_cli.heal.run import Run, read_run


class _Rows(Dataset[dict[str, Any]]):
    """The run's rows in its order. Labels are the inputs, because transformers shifts them itself."""

    def __init__(self, rows: Rows, count: int) -> None:
        self._rows, self._count = rows, count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> dict[str, Any]:
        ids = torch.from_numpy(self._rows.row(index).input_ids)
        return {"input_ids": ids, "labels": ids}


class _Watch(TrainerCallback):  # type: ignore[misc]  # transformers has no types here
    """Prints held-out losses, and adds up the time of steps only."""

    def __init__(self, run: Run, heldout: RowsInOrder, every: int, tokens: int) -> None:
        self._run, self._heldout, self._every, self._tokens = run, heldout, every, tokens
        self.seconds, self.cpu_seconds = 0.0, 0.0
        self._started, self._cpu_started = 0.0, 0.0

    def on_train_begin(self, *_: Any, model: Any, **__: Any) -> None:
        self._evaluate(0, model)

    def on_step_begin(self, *_: Any, **__: Any) -> None:
        self._started, self._cpu_started = time.perf_counter(), time.process_time()

    def on_step_end(self, _args: Any, state: Any, _control: Any, model: Any, **_: Any) -> None:
        self.seconds += time.perf_counter() - self._started
        self.cpu_seconds += time.process_time() - self._cpu_started
        if state.global_step % self._every == 0:
            self._evaluate(state.global_step, model)

    def _evaluate(self, step: int, model: Any) -> None:
        model.eval()
        total, count = 0.0, 0
        with (
            torch.no_grad(),
            torch.autocast("cpu", torch.bfloat16, enabled=self._run.fit.precision == "bf16"),
        ):
            for row in self._heldout if self._every < 10**9 else []:
                ids, labels, positions = (torch.from_numpy(part)[None] for part in row)
                logits = model(input_ids=ids, position_ids=positions).logits.float()
                total += float(
                    torch.nn.functional.cross_entropy(logits[0], labels[0], reduction="sum")
                )
                count += int((labels != -100).sum())
        model.train()
        if count:
            print(
                json.dumps(
                    {"step": step, "tokens": step * self._tokens, "eval_loss": total / count}
                ),
                flush=True,
            )


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--steps", type=int, required=True)
    parser.add_argument("--batch-rows", type=int, default=8)
    parser.add_argument("--eval-every", type=int, default=10**9)
    parser.add_argument("--lr", type=float, default=1e-4)
    options = parser.parse_args()
    run = read_run(options.run)
    data = Prepared.from_json(run.data)
    rows = Rows(data, run.tokens_folder, run.seq_length, run.recipe.seed)
    heldout = heldout_rows(
        data, run.tokens_folder, run.seq_length, max_tokens=run.keeping.eval_tokens
    )
    tokens = options.batch_rows * run.seq_length
    watch = _Watch(run, heldout, options.eval_every, tokens)
    with tempfile.TemporaryDirectory() as folder:
        trainer = Trainer(
            model=AutoModelForCausalLM.from_pretrained(run.model, dtype=torch.float32),
            args=TrainingArguments(
                output_dir=folder,
                per_device_train_batch_size=options.batch_rows,
                max_steps=options.steps,
                learning_rate=options.lr,
                lr_scheduler_type="constant",
                bf16=run.fit.precision == "bf16",  # else in fp32, as its weights are
                use_cpu=not torch.accelerator.is_available(),
                report_to=[],
                save_strategy="no",
                logging_strategy="no",
                disable_tqdm=True,
                seed=run.recipe.seed,
            ),
            train_dataset=_Rows(rows, options.steps * options.batch_rows),
            callbacks=[watch],
        )
        trainer.remove_callback(PrinterCallback)  # it prints what is no JSON
        trainer.train()
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    speeds = {"tokens_per_second": watch.seconds, "tokens_per_cpu_second": watch.cpu_seconds}
    speeds = {name: round(options.steps * tokens / seconds, 1) for name, seconds in speeds.items()}
    print(json.dumps(speeds | {"peak_memory_bytes": peak}))


if __name__ == "__main__":
    main()
