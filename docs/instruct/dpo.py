"""SOLAR's third stage, alignment tuning of an instruction-tuned model, with TRL: see
docs/instruct.md.

Every option of TRL's DPOConfig is an option here. Usage: dpo.py --model sft/ --data FILE…
--output_dir dpo/
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from rows import load, preference
from transformers import AutoTokenizer, HfArgumentParser
from trl import DPOConfig, DPOTrainer


@dataclass
class What:
    """What is trained, on what."""

    model: str = field(
        metadata={"help": "The directory of the instruction-tuned model; also the reference."}
    )
    data: list[str] = field(
        metadata={"help": ".jsonl files, or data sets on the Hub: NAME[@SPLIT][:ROWS]."}
    )


# SOLAR's are not published. These are Zephyr's (alignment-handbook, recipes/zephyr-7b-beta), which
# it names.
DEFAULTS = {
    "beta": 0.01,
    "learning_rate": 5e-7,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of the run
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_length": 1024,
    "report_to": "none",
}


def main() -> None:
    parser = HfArgumentParser((What, DPOConfig))
    parser.set_defaults(**DEFAULTS)
    what, config = parser.parse_args_into_dataclasses()
    # Masters in fp32: at this rate nearly every update is less than half a step of bf16, and would
    # be lost.
    config.model_init_kwargs = {"dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(what.model)
    data = load(what.data, preference, config.seed)
    trainer = DPOTrainer(what.model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.model.to(torch.bfloat16)
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
