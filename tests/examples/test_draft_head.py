# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""examples/draft_head.py: a callable's EAGLE head drafts for its target."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROGRAM = str(Path(__file__).parents[2] / "examples" / "draft_head.py")


@pytest.mark.engine
@pytest.mark.slow
def test_the_same_answers_in_fewer_steps(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, PROGRAM],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stdout + done.stderr[-4000:]
    losses = [float(loss) for loss in re.findall(r"head.*loss ([\d.]+)", done.stdout)]
    assert losses[-1] < losses[0] / 2
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["equal"]
    assert result["accepted"] > 0.3
    assert result["tokens_in_a_step"] > 1.9
