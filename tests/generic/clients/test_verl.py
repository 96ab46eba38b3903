# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""verl's own classes load weights into an engine of a registered model.

verl is in no list of requirements, because it pins other releases of what is used here.
Install it by `pip install --no-deps`, with what it imports: tensordict, pyvers,
codetiming, hydra-core, omegaconf, antlr4-python3-runtime, pylatexenc and torchdata.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("verl", reason="verl is not installed")
pytestmark = [pytest.mark.engine, pytest.mark.slow]
PROGRAM = Path(__file__).with_name("update_by_verl.py")


@pytest.mark.parametrize(
    ("architecture", "ranks"), [("LlamaForCausalLM", 2), ("PlainGPT", 1)]
)
def test_updates_from_verl(tmp_path: Path, architecture: str, ranks: int) -> None:
    paths = [str(PROGRAM.parent), os.environ["PYTHONPATH"]]
    env = {
        "PYTHONPATH": os.pathsep.join(paths),
        "VERL_PLATFORM": "cpu",
        "VERL_USE_EXTERNAL_MODULES": "verl_models",
    }
    done = subprocess.run(
        [sys.executable, str(PROGRAM), str(tmp_path), architecture, str(ranks)],
        env={k: v for k, v in os.environ.items() if k != "VLLM_CPU_KVCACHE_SPACE"}
        | env,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-6000:]
    worst = json.loads(done.stdout.splitlines()[-1])
    assert len(worst) == 2 and max(worst) <= 1e-4, worst
