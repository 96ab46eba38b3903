# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The programs of docs/way_here run as a reader runs them, on random weights."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from clients import served_llama
from tink_server import TinkServer

PAGES = Path(__file__).parents[3] / "docs" / "way_here"
TITLED = re.compile(r'^```\w+ title="([^"]+)"\n(.*?)^```$', re.M | re.S)

pytestmark = pytest.mark.engine


@pytest.fixture
def folder(tmp_path) -> Path:
    """With the model directory that pages name."""
    served_llama.save(tmp_path / "path/to/model")
    return tmp_path


def run(page: str, program: str, folder: Path, **environment: str) -> str:
    """What a program of a page prints."""
    for name, code in TITLED.findall((PAGES / page).read_text()):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(code)
    few = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_WORKER_MULTIPROC_METHOD": "fork"}
    done = subprocess.run(
        [sys.executable, program],
        cwd=folder,
        env=os.environ | few | environment,
        capture_output=True,
        text=True,
        timeout=400,
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-5000:]
    return done.stdout


def test_from_vllm(folder):
    assert "PASSED" in run("vllm.md", "compare.py", folder)


@pytest.mark.slow
def test_from_trl(folder):
    pytest.importorskip("trl")
    printed = run("trl.md", "train.py", folder)
    assert float(printed.split()[-1]) <= 1e-4, printed


@pytest.mark.slow
def test_from_tinker(folder):
    pytest.importorskip("tinker")
    with TinkServer(folder / "tink") as server:
        address = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
        printed = run("tinker.md", "train.py", folder, **address)
    losses = [float(line) for line in printed.splitlines()[:10]]
    assert losses[-1] < losses[0] / 2 and "tokens" in printed


@pytest.mark.slow
def test_from_chatlearn(folder):
    printed = run("chatlearn.md", "rollout.py", folder)
    assert "torch.Size([4, " in printed


@pytest.mark.slow
def test_from_megatron(folder):
    pytest.importorskip("megatron.core")
    served_llama.save_tokenizer(folder / "path/to/megatron")
    assert re.search(r"\S", run("megatron.md", "serve.py", folder))


@pytest.mark.slow
def test_from_torchtitan(folder):
    """It needs torchtitan, which is not among what the tests install."""
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed")
    assert "PASSED" in run("torchtitan.md", "compare.py", folder)
