# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The example of the LoRA service, as a reader would start it."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("tinker")
PROGRAM = Path(__file__).parents[2] / "examples/lora_service/two_adapters.py"


def test_two_adapters_learn_their_texts() -> None:
    run = subprocess.run(
        [sys.executable, str(PROGRAM), "--steps", "40"],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert run.returncode == 0, run.stderr
    for name in ("proverbs", "weather"):
        first, last = re.search(rf"^{name} +(\S+) +(\S+)", run.stdout, re.M).groups()
        assert float(last) < float(first) / 10
    (line,) = re.findall(r"^'The early'.*", run.stdout, re.M)
    assert "bird catches the worm" in line
