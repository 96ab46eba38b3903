# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The programs of docs/way_here run as a reader runs them, on random weights."""

import importlib.util
import re
from pathlib import Path

import pytest
from clients import served_llama
from doc_blocks import DOCS, run, write_blocks
from tink_server import TinkServer

pytestmark = pytest.mark.engine


@pytest.fixture
def folder(tmp_path) -> Path:
    """With the model directory that pages name."""
    served_llama.save(tmp_path / "path/to/model")
    return tmp_path


def run_page(name: str, program: str, folder: Path, **environment: str) -> str:
    """What a program of a page prints."""
    write_blocks(DOCS / "way_here" / name, folder)
    return run(folder, program, processes=False, **environment)


def test_from_vllm(folder):
    assert "PASSED" in run_page("vllm.md", "compare.py", folder)


@pytest.mark.slow
def test_from_trl(folder):
    pytest.importorskip("trl")
    printed = run_page("trl.md", "train.py", folder)
    assert float(printed.split()[-1]) <= 1e-4, printed


@pytest.mark.slow
def test_from_tinker(folder):
    pytest.importorskip("tinker")
    with TinkServer(folder / "tink") as server:
        address = {"TINKER_BASE_URL": server.url, "TINKER_API_KEY": "tml-local"}
        printed = run_page("tinker.md", "train.py", folder, **address)
    losses = [float(line) for line in printed.splitlines()[:10]]
    assert losses[-1] < losses[0] / 2 and re.search(r"^\[\d+, ", printed, re.M)


@pytest.mark.slow
def test_from_chatlearn(folder):
    printed = run_page("chatlearn.md", "rollout.py", folder)
    assert "torch.Size([4, " in printed


@pytest.mark.slow
def test_from_megatron(folder):
    pytest.importorskip("megatron.core")
    served_llama.save_tokenizer(folder / "path/to/megatron")
    assert re.search(r"\S", run_page("megatron.md", "serve.py", folder))


@pytest.mark.slow
def test_from_torchtitan(folder):
    """It needs torchtitan, which is not among what the tests install."""
    if importlib.util.find_spec("torchtitan") is None:
        pytest.skip("torchtitan is not installed")
    assert "PASSED" in run_page("torchtitan.md", "compare.py", folder)
