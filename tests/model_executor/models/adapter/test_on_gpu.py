# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unchanged public models in an engine and in a trainer on a GPU."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.gpu

MODELS = [
    "a GPT in plain PyTorch",
    "Llama",
    "Qwen3",
    "GPT-2",
    "GPT-NeoX",
    "Phi-3",
    "OLMo-2",
    "Gemma 2",
    "Gemma 3",
    "gpt-oss",
    "Mixtral",
    "Qwen3-MoE",
]
# A graph of their forward is compiled, which loops over chosen experts have none of.
COMPILED = ["a GPT in plain PyTorch", "Llama", "GPT-2", "Phi-3", "Gemma 2", "Gemma 3"]


def compare(*arguments: str) -> dict[str, Any]:
    program = Path(__file__).with_name("engine_and_trainer.py")
    done = subprocess.run(
        [sys.executable, str(program), *arguments],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


@pytest.mark.parametrize("model", MODELS)
def test_equal_bits_in_the_exact_mode(model):
    found = compare(model)
    assert found["sampled"] == [96, 96], found
    assert found["prompt"] == [81, 81], found


@pytest.mark.parametrize("model", COMPILED)
def test_compiled_code_computes_what_the_module_does(model):
    """As far as bfloat16 tells: another module would be off by more than 1 nat."""
    found = compare(model, "--default")
    assert found["compiled"], found
    assert found["mean"] < 0.03, found
    assert found["largest"] < 0.3, found
