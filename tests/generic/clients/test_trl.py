# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""TRL's trainers, unchanged, with vLLM's engine of a registered model in their process.

TRL calls `load_weights` for one tensor at a time, and gives no dtype.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from vllm.utils.network_utils import get_open_port

pytest.importorskip("trl")
PROGRAM = str(Path(__file__).with_name("train_by_trl.py"))


def train(
    directory: Path, steps: int, *options: str, ranks: int = 1, **variables: str
) -> Any:
    """What TRL logs of each step."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={ranks}"]
    env = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_KVCACHE_SPACE": "1",
        "MASTER_PORT": str(get_open_port()),  # else TRL takes the same one every time
    }
    done = subprocess.run(
        [*launcher, PROGRAM, str(directory), str(steps), *options],
        env=os.environ | env | variables,
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    return json.loads((directory / "log.json").read_text())


def check(log: Any, steps: int) -> None:
    differences = [row["sampling/sampling_logp_difference/max"] for row in log]
    assert len(log) == steps and max(differences) <= 1e-4, differences


@pytest.mark.engine
def test_grpo_of_trl_learns(tmp_path):
    log = train(tmp_path, 12)
    check(log, 12)
    rewards = [row["reward"] for row in log]
    assert rewards[-1] > 0.7 > 0.4 > rewards[0], rewards


@pytest.mark.slow
@pytest.mark.engine
@pytest.mark.parametrize("option", ["--lora", "--tied"])
def test_grpo_of_trl_in_other_forms(tmp_path, option):
    check(train(tmp_path, 4, option), 4)


@pytest.mark.engine
@pytest.mark.parametrize(
    "options", [[], pytest.param(["--cuda"], marks=pytest.mark.gpu)], ids=["cpu", "gpu"]
)
def test_the_exact_mode(tmp_path, options):
    """In bfloat16 only the last bit of TRL's own log-softmax differs."""
    log = train(tmp_path, 3, "--exact", *options, VLLM_BATCH_INVARIANT="1")
    differences = [row["sampling/sampling_logp_difference/max"] for row in log]
    assert len(log) == 3 and max(differences) <= 5e-7, differences


@pytest.mark.slow
@pytest.mark.engine
def test_two_ranks_of_trl_have_an_engine_each(tmp_path):
    check(train(tmp_path, 4, '{"per_device_train_batch_size": 16}', ranks=2), 4)
