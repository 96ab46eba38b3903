# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The examples on sequences of sums: a state beside attention, and a draft head."""

import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"

pytestmark = pytest.mark.engine


def run(example: str, model: str, folder: Path) -> tuple[list[float], dict[str, Any]]:
    """The losses of `model`, and the result."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / example)],
        cwd=folder,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    losses = re.findall(rf"^{model}, step.*loss ([\d.]+)$", done.stdout, re.M)
    return [float(loss) for loss in losses], json.loads(done.stdout.splitlines()[-1])


@pytest.mark.slow
def test_a_token_shift_is_served_as_trained_in_chunks_and_with_preemption(tmp_path):
    losses, result = run("token_shift.py", "model", tmp_path)
    assert losses[-1] < 0.1 < losses[0]
    assert result["agrees"]
    assert result["max_logprob_diff"] <= 1e-4
    assert result["preemptions"] > 0


def test_a_draft_head_gives_the_same_answers_in_fewer_steps(tmp_path):
    losses, result = run("draft_head.py", "head", tmp_path)
    assert losses[-1] < losses[0] / 2
    assert result["equal"]
    assert result["accepted"] > 0.3
    assert result["tokens_in_a_step"] > 1.9
