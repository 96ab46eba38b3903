# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""examples/token_shift.py: a state beside attention, served as it was trained."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).parents[2] / "examples" / "token_shift.py")


@pytest.mark.engine
@pytest.mark.slow
def test_served_as_trained_in_chunks_and_with_preemption(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+)", done.stdout)]
    assert losses[-1] < 0.1 < losses[0]
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["agrees"]
    assert result["max_logprob_diff"] <= 1e-4
    assert result["preemptions"] > 0
