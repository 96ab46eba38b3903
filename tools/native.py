# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The native operators of `csrc/`, compiled where that is possible.

They are optional: vLLM works without them, slower, and says so once.
"""

import importlib.util
import shutil
import subprocess
import sys
from pathlib import Path

from tools import ROOT


def build(tree: Path) -> bool:
    """Compile the operators into `vllm/` of a composed tree, and say what was done.

    They are compiled for the torch of this Python. A build that pip isolates has
    none: `python -m tools develop` and `pip install --no-build-isolation .` have.
    """
    folder = ROOT / "build" / "native"
    reason = _compile(folder)
    if reason is None:
        for library in folder.glob("*.so"):
            shutil.copyfile(library, tree / "vllm" / library.name)
        print("Native operators: compiled", flush=True)
    else:
        print(f"Native operators: left out, {reason}", file=sys.stderr, flush=True)
    return reason is None


def _compile(folder: Path) -> str | None:
    """Run cmake in `folder`; returns why there are no operators, or None."""
    torch = importlib.util.find_spec("torch")
    if torch is None or torch.origin is None:
        return "for this Python has no torch to compile for"
    cmake = shutil.which("cmake")
    if cmake is None:
        return "for there is no cmake"
    root = Path(torch.origin).parent
    # -U: what was found for another torch
    paths = ["-S", str(ROOT), "-B", str(folder), "-U", "C10", "-U", "TORCH_CPU"]
    for command in (
        [cmake, *paths, f"-DTORCH_ROOT={root}"],
        [cmake, "--build", str(folder)],
    ):
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            output = (result.stdout + result.stderr).strip()
            return f"for `{' '.join(command)}` failed:\n{output[-2000:]}"
    return None
