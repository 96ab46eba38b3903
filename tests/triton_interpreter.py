# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Triton's kernels on a CPU, in Triton's interpreter."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

# Triton decides when it is imported whether it interprets, so this is a process of its
# own; and vLLM hides Triton where there is no GPU.
PROGRAM = """
import json
import triton, triton.language as tl
import vllm.triton_utils
vllm.triton_utils.triton, vllm.triton_utils.tl = triton, tl
import {module}
print("\\n" + json.dumps({module}.{function}()))
"""


def interpret(file: str, function: str) -> Any:
    """What a function of the test module `file` returns in the interpreter, as JSON."""
    path = Path(file)
    program = PROGRAM.format(module=path.stem, function=function)
    places = os.pathsep.join([str(path.parent), os.environ["PYTHONPATH"]])
    run = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": places},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])
