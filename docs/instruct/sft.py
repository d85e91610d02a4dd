"""SOLAR's second stage, instruction tuning of a healed model, with TRL: see docs/instruct.md.

Every option of TRL's SFTConfig is an option here. Usage: sft.py --model healed/ --data FILE…
--output_dir sft/
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from rows import instruction, load, set_template
from transformers import AutoTokenizer, HfArgumentParser
from trl import SFTConfig, SFTTrainer


@dataclass
class What:
    """What is trained, on what."""

    model: str = field(metadata={"help": "The directory of the healed model."})
    data: list[str] = field(
        metadata={"help": ".jsonl files, or data sets on the Hub: NAME[@SPLIT][:ROWS]."}
    )
    solar_template: bool = field(
        default=False, metadata={"help": "SOLAR's chat template in place of the model's."}
    )


# SOLAR's are not published. These are Zephyr's (alignment-handbook, recipes/zephyr-7b-beta), which
# it names.
DEFAULTS = {
    "learning_rate": 2e-5,
    "lr_scheduler_type": "cosine",
    "warmup_steps": 0.1,  # a share of the run
    "num_train_epochs": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 16,
    "max_length": 2048,
    "report_to": "none",
}


def main() -> None:
    parser = HfArgumentParser((What, SFTConfig))
    parser.set_defaults(**DEFAULTS)
    what, config = parser.parse_args_into_dataclasses()
    # Masters in fp32: at these rates most updates are less than half a step of bf16, and would be
    # lost.
    config.model_init_kwargs = {"dtype": torch.float32}
    tokenizer = AutoTokenizer.from_pretrained(what.model)
    set_template(tokenizer, solar=what.solar_template)
    data = load(what.data, instruction, config.seed)
    trainer = SFTTrainer(what.model, args=config, train_dataset=data, processing_class=tokenizer)
    trainer.train()
    trainer.model.to(torch.bfloat16)
    trainer.save_model(config.output_dir)


if __name__ == "__main__":
    main()
