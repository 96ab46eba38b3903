# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Recipes of tinker-cookbook 0.6.1, unchanged, against a service with a tiny model.

It is no part of the tests' requirements. Install it, and what it imports, by
`pip install --no-deps tinker-cookbook==0.6.1 chz blobfile pyrage termcolor pylatexenc
math-verify latex2sympy2_extended antlr4-python3-runtime==4.13.2 lxml`.
"""

import importlib.util
import json
import os
import random
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tink_server import TinkServer
from tinker import types

from vllm_generic.tink.backends.tiny_model import make_tokenizer

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        importlib.util.find_spec("tinker_cookbook") is None,
        reason="tinker-cookbook is not installed",
    ),
]

MODEL = "Qwen/Qwen3-8B-Base"  # a name that the cookbook knows, of the tiny model here
ENVIRONMENT = {
    "TINKER_API_KEY": "tml-local",
    "TINKER_TELEMETRY": "0",
    "HF_HUB_OFFLINE": "1",
    "HF_DATASETS_OFFLINE": "1",
}
KL = ("optim/kl_sample_train_v1", "optim/kl_sample_train_v2")


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[TinkServer]:
    root = tmp_path_factory.mktemp("cookbook")
    with TinkServer(root / "state", "--model-name", MODEL) as server:
        yield server


def run(server: TinkServer, folder: Path, recipe: str, **options: Any) -> list[Any]:
    """The metrics of each step."""
    make_tokenizer(folder / MODEL)
    options |= {"model_name": MODEL, "base_url": server.url, "log_path": folder / "log"}
    options |= {"eval_every": 0, "behavior_if_log_dir_exists": "delete"}
    command = [sys.executable, "-m", f"tinker_cookbook.recipes.{recipe}.train"]
    subprocess.run(
        [*command, *(f"{name}={value}" for name, value in options.items())],
        cwd=folder,
        env=os.environ | ENVIRONMENT,
        check=True,
        timeout=540,
    )
    lines = (folder / "log" / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def test_chat_sl(served: TinkServer, tmp_path: Path) -> None:
    """The loss falls."""
    import tinker_cookbook

    package = Path(tinker_cookbook.__file__).parent
    steps = run(
        served,
        tmp_path,
        "chat_sl",
        dataset=package / "example_data" / "conversations.jsonl",
        batch_size=16,
        max_steps=6,
        infrequent_eval_every=0,
        max_length=512,
        learning_rate=3e-3,
    )
    losses = [step["train_mean_nll"] for step in steps if "train_mean_nll" in step]
    assert len(losses) == 6 and losses[-1] < 0.95 * losses[0]


def test_math_rl(served: TinkServer, tmp_path: Path) -> None:
    """The reward rises, and sampled log-probabilities are the trainer's.

    A random model never ends an answer, so that all rewards are equal. The run begins
    with an adapter that has learned to end some of them.
    """
    steps = run(
        served,
        tmp_path,
        "math_rl",
        env="arithmetic",
        loss_fn="importance_sampling",
        group_size=8,
        groups_per_batch=8,
        max_tokens=12,
        max_steps=8,
        save_every=0,
        learning_rate=1e-3,
        load_checkpoint_path=half_learned(served),
    )
    steps = [step for step in steps if KL[0] in step]  # the last line has only a state
    assert len(steps) == 8
    for step in steps:
        assert all(abs(step[name]) <= 1e-8 for name in KL)
    rewards = [step["env/all/reward/total"] for step in steps]
    assert len(set(rewards)) > 1
    assert sum(rewards[-3:]) > sum(rewards[:3]) + 0.03


def half_learned(server: TinkServer) -> str:
    """A state of an adapter that ends about half of its answers."""
    service = server.client()
    client = service.create_lora_training_client(base_model=MODEL, rank=32, seed=1)
    training = client.result()
    tokenizer = training.get_tokenizer()
    rng = random.Random(0)
    for _ in range(30):
        data = []
        for ends in (True, False) * 4:
            one, two = rng.randint(0, 100), rng.randint(0, 100)
            prompt = tokenizer.encode(
                "User: What is 4 + 5?\n\nAssistant: 9\n\n"
                f"User: What is {one} + {two}?\n\nAssistant:"
            )
            after = "\n\nUser:" if ends else f" {rng.randint(0, 10**6)}" * 3
            answer = tokenizer.encode(f" {rng.randint(0, 200)}{after}")
            tokens = prompt + answer
            weights = [0.0] * (len(prompt) - 1) + [1 / 8] * len(answer)
            data.append(
                types.Datum(
                    model_input=types.ModelInput.from_ints(tokens[:-1]),
                    loss_fn_inputs={"target_tokens": tokens[1:], "weights": weights},
                )
            )
        passed = training.forward_backward(data, "cross_entropy")
        training.optim_step(types.AdamParams(learning_rate=5e-3))
    passed.result()
    return training.save_state("half-learned").result().path
