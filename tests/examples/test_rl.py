# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""examples/rl/grpo.py: the same curve again, also over a checkpoint, and by FSDP2."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.engine
PROGRAM = str(Path(__file__).parents[2] / "examples" / "rl" / "grpo.py")
SMALL = ["--prompts=8", "--answers=4", "--held-out=8"]
# So early no answer is wholly right, but some tokens are.
SMALL += ["--pretrain-steps=3", "--save-every=2", "--reward=share"]


def curve(directory: Path, *options: str, ranks: int = 1) -> list[tuple[float, float]]:
    """Reward and entropy of each step."""
    launcher = [sys.executable]
    if ranks > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone"]
        launcher += [f"--nproc-per-node={ranks}"]
    done = subprocess.run(
        [*launcher, PROGRAM, f"--output-dir={directory}", *SMALL, *options],
        env={k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"},
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-6000:]
    lines = (directory / "log.jsonl").read_text().splitlines()
    return [(row["reward"], row["entropy"]) for row in map(json.loads, lines)]


def test_a_resumed_run_has_the_same_curve(tmp_path):
    whole = curve(tmp_path / "whole", "--steps=4")
    curve(tmp_path / "parts", "--steps=2")
    assert curve(tmp_path / "parts", "--steps=4", "--resume") == whole
    assert len(whole) == 4 and (tmp_path / "whole" / "curves.png").exists()


@pytest.mark.slow
@pytest.mark.parametrize("division", ["fsdp2", "tensor-parallel"])
def test_a_divided_trainer_has_the_curve_of_one_rank(tmp_path, division):
    """With an engine of another layout, and over a checkpoint."""
    alone = curve(tmp_path / "alone", "--steps=3")
    options = ["--tensor-parallel"] if division == "tensor-parallel" else []
    curve(tmp_path / division, "--steps=2", *options, ranks=2)
    divided = curve(tmp_path / division, "--steps=3", "--resume", *options, ranks=2)
    for step, other in zip(alone, divided, strict=True):
        assert step == pytest.approx(other, abs=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("seed", [2, 4])  # slow learners, for which 62 steps were few
def test_the_first_lesson_ends_when_the_model_knows_enough(seed, monkeypatch):
    monkeypatch.syspath_prepend(str(Path(PROGRAM).parent))
    from first_lesson import pretrain, share_right
    from reverse_digits import ReverseGPT, problems

    torch.manual_seed(seed)
    model = ReverseGPT()
    steps = pretrain(model, goal=0.2, most_steps=150, seed=seed)
    assert 62 < steps < 150
    assert 0.15 < share_right(model, problems(1000, seed=5, held_out=True)) < 0.3
