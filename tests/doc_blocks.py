# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The code blocks of the documentation, and how a reader runs them."""

import os
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
FENCE = re.compile(r'^```(\w+)(?: title="([^"]+)")?\n(.*?)^```$', re.M | re.S)


def titled_blocks(page: Path) -> dict[str, str]:
    """The code blocks that have a file name as their title."""
    return {title: code for _, title, code in FENCE.findall(page.read_text()) if title}


def write_blocks(page: Path, folder: Path) -> None:
    for name, code in titled_blocks(page).items():
        path = folder / name
        assert not path.exists(), f"Rename {name} in {page.relative_to(ROOT)}."
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(code)


def run(folder: Path, *command: str, processes: bool = True, **environment: str) -> str:
    """Run a program in `folder` and return what it prints.

    Its engine's processes are forked: they have imported vLLM already.
    """
    few = {
        "VLLM_ENABLE_V1_MULTIPROCESSING": str(int(processes)),
        "VLLM_WORKER_MULTIPROC_METHOD": "fork",
    }
    completed = subprocess.run(
        [sys.executable, *command],
        cwd=folder,
        env=os.environ | few | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    output = completed.stdout + completed.stderr
    assert completed.returncode == 0, f"{' '.join(command)}:\n{output[-6000:]}"
    return completed.stdout


def last_line(printed: str) -> str:
    return (printed.splitlines() or [""])[-1]
