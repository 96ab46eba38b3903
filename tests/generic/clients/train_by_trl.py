# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TRL's GRPO, unchanged, on a registered model. Prints what TRL logs, as JSON.

python train_by_trl.py DIRECTORY STEPS [--lora] [--tied] [--rloo] [--exact] [--cuda]
                       [GRPOConfig's as JSON]

`--exact` needs VLLM_BATCH_INVARIANT=1, and has engine and trainer in bfloat16.
"""

import json
import sys
from contextlib import nullcontext
from pathlib import Path

import served_llama
import torch
from datasets import Dataset
from peft import LoraConfig
from trl import GRPOConfig, GRPOTrainer, RLOOConfig, RLOOTrainer

from vllm.model_executor.models.adapter import use_vllm_attention
from vllm.model_executor.models.plans.whole import sum_as_divided
from vllm.training.batch_invariance import batch_invariant

ANSWER = 8


def even_digits(completions: list[str], **kwargs: object) -> list[float]:
    """The share of even digits in an answer of full length."""
    return [sum(c in "02468" for c in text) / ANSWER for text in completions]


def main(directory: Path, steps: int, flags: list[str], options: dict) -> None:
    exact = "--exact" in flags
    dtype = torch.bfloat16 if exact else torch.float32
    served_llama.register()
    # The engine has the dtype of config.json, as TRL gives none.
    served_llama.save(directory, dtype, tie_word_embeddings="--tied" in flags)
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
        "use_cpu": "--cuda" not in flags,
        "vllm_gpu_memory_utilization": 0.2,
        "model_init_kwargs": {"dtype": dtype},
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
    if exact:
        sum_as_divided(use_vllm_attention(trainer.model))
    with batch_invariant() if exact else nullcontext():
        trainer.train()
    if trainer.accelerator.is_main_process:
        log = [row for row in trainer.state.log_history if "reward" in row]
        (directory / "log.json").write_text(json.dumps(log))


if __name__ == "__main__":
    _, folder, number, *rest = sys.argv
    given = [argument for argument in rest if argument.startswith("--")]
    values = [json.loads(a) for a in rest if not a.startswith("--")]
    main(Path(folder), int(number), given, values[0] if values else {})
