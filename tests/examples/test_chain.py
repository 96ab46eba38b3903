# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""examples/chain.py: a stock model is trained, served, reinforced and adapted."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).parents[2] / "examples" / "chain.py")
SMALL = ["--pretrain-steps=20", "--steps=2", "--prompts=4", "--answers=4"]


TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]


@pytest.mark.engine
@pytest.mark.slow
@pytest.mark.parametrize(
    "launcher, options",
    [
        ([], []),
        ([], ["--model=nanogpt"]),
        ([], ["--model=megatron"]),
        (TORCHRUN, ["--tensor-parallel-size=2"]),
        ([], ["--exact"]),
        ([], ["--exact", "--tensor-parallel-size=2"]),
        ([], ["--exact", "--model=nanogpt"]),
        ([], ["--exact", "--model=megatron"]),
    ],
    ids=[
        "llama",
        "nanogpt",
        "megatron",
        "FSDP2 and TP=2",
        "exact",
        "exact, TP=2",
        "exact, nanogpt",
        "exact, megatron",
    ],
)
def test_every_joint_holds(tmp_path, launcher, options):
    if "--model=megatron" in options:
        pytest.importorskip("megatron.core")
    small = [*SMALL, "--adapter-steps=3", "--json=joints.json"]
    done = subprocess.run(
        [sys.executable, *launcher, PROGRAM, *small, *options],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-6000:]
    joints = json.loads((tmp_path / "joints.json").read_text())
    assert [joint["joint"] for joint in joints] == [
        "trainer → vllm serve",
        "2 GRPO steps",
        "after the last update",
        "adapter: trainer → sampler",
    ]
    assert all(joint["max_logprob_diff"] <= 1e-4 for joint in joints)
    assert "version 2" in joints[1]["says"]
    if "--exact" in options:
        assert [joint["max_logprob_diff"] for joint in joints] == [0.0] * 4
