# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Unchanged public models have equal bits in an engine and a trainer on a GPU."""

import json
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("model", MODELS)
def test_equal_bits_in_an_engine_and_a_trainer(model):
    program = Path(__file__).with_name("exact_on_gpu.py")
    done = subprocess.run(
        [sys.executable, str(program), model],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = json.loads(done.stdout.strip().splitlines()[-1])
    assert found["sampled"] == [96, 96], found
    assert found["prompt"] == [81, 81], found
