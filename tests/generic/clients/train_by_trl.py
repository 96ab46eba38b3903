# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TRL's GRPO, unchanged, on a registered model. Prints what TRL logs, as JSON.

python train_by_trl.py DIRECTORY STEPS [--lora] [--tied] [--rloo] [GRPOConfig's as JSON]
"""

import json
import sys
from pathlib import Path

import served_llama
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

ANSWER = 8


def even_digits(completions: list[str], **kwargs: object) -> list[float]:
    """The share of even digits in an answer of full length."""
    return [sum(c in "02468" for c in text) / ANSWER for text in completions]


def main(directory: Path, steps: int, flags: list[str], options: dict) -> None:
    served_llama.register()
    served_llama.save(directory, tie_word_embeddings="--tied" in flags)
    defaults = {
        "use_vllm": True,
        "vllm_mode": "colocate",
        "vllm_max_model_length": 32,
        "max_completion_length": ANSWER,
        "num_generations": 8,
        "per_device_train_batch_size": 32,
        "learning_rate": 3e-3,
        "lr_scheduler_type": "constant",
        "max_steps": steps,
        "beta": 0.0,
        "logging_steps": 1,
        "report_to": [],
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
        "bf16": False,
        "seed": 0,
    }
    rloo = "--rloo" in flags
    config = (RLOOConfig if rloo else GRPOConfig)(
        str(directory / "out"), **(defaults | options)
    )
    lora = LoraConfig(r=8, target_modules="all-linear") if "--lora" in flags else None
    prompts = [{"prompt": f"{a}+{b}="} for a in range(10) for b in range(10)]
    trainer = (RLOOTrainer if rloo else GRPOTrainer)(
        str(directory),
        reward_funcs=even_digits,
        args=config,
        train_dataset=Dataset.from_list(prompts),
        peft_config=lora,
    )
    trainer.train()
    if trainer.accelerator.is_main_process:
        log = [row for row in trainer.state.log_history if "reward" in row]
        (directory / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    _, folder, number, *rest = sys.argv
    given = [argument for argument in rest if argument.startswith("--")]
    values = [json.loads(a) for a in rest if not a.startswith("--")]
    main(Path(folder), int(number), given, values[0] if values else {})
