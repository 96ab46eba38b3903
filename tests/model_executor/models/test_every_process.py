# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A factory of `__main__` serves, whatever starts the processes that build it.

`serve_from_main.py` and the notebook also register a factory that cannot be pickled,
which has to fail in their own process before any worker starts.
"""

import ast
import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

import nbformat
import pytest
import torch
from nbclient import NotebookClient
from tiny_model import greedy, trained_model

from vllm.utils.network_utils import get_open_port

pytestmark = pytest.mark.engine

SERVE = Path(__file__).with_name("serve_from_main.py")
PROMPT = list(range(40))


def expected(sign: int = 1) -> list[int]:
    model = trained_model()
    with torch.no_grad():
        model.lm_head.weight.mul_(sign)
    return greedy(model, PROMPT, 8)


def run(*commands: list[str], **env: str) -> list[list[int]]:
    """What the processes of programs that run at the same time print as JSON.

    The i-th command finds `RANK` i in its environment, as `env` may ask for.
    """
    programs = [
        subprocess.Popen(
            [sys.executable, *command],
            env=os.environ
            | {"RAY_USAGE_STATS_ENABLED": "0"}
            | {name: value.format(rank=rank) for name, value in env.items()},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank, command in enumerate(commands)
    ]
    try:
        outputs = [program.communicate(timeout=300)[0] for program in programs]
    finally:
        for program in programs:
            program.kill()
    assert not any(program.returncode for program in programs)
    lines = "".join(outputs).splitlines()
    return [json.loads(line) for line in lines if line.startswith("[")]


@pytest.mark.parametrize("start_method", ["fork", "spawn", "forkserver"])
def test_multiprocessing(model_dir, start_method):
    tokens = run([SERVE, model_dir, start_method], VLLM_ENABLE_V1_MULTIPROCESSING="1")
    assert tokens == [expected()]


def test_ray(model_dir):
    """vLLM's Ray executor; its actors are told to be counted as GPUs."""
    tokens = run([SERVE, model_dir, "ray"], VLLM_ENABLE_V1_MULTIPROCESSING="0")
    assert tokens == [expected()]


def test_external_launcher(model_dir):
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2"]
    torchrun += ["--master-addr", "127.0.0.1", "--master-port", str(get_open_port())]
    tokens = run([*torchrun, SERVE, model_dir, "external_launcher"])
    assert tokens == [expected(), expected()]


def first_of_free_ports(count: int = 16) -> int:
    """vLLM counts on from the first, below those that other tests are given."""
    for first in range(20000 + os.getpid() % 500 * 20, 31000, count):
        with ExitStack() as stack:
            try:
                for port in range(first, first + count):
                    listener = stack.enter_context(socket.socket())
                    listener.bind(("127.0.0.1", port))
            except OSError:
                continue
        return first
    raise RuntimeError(f"no {count} ports in a row are free")


def test_offline_data_parallel(model_dir):
    """A process for each rank; vLLM wants a model with experts for it."""
    config = json.loads((model_dir / "config.json").read_text())
    (model_dir / "config.json").write_text(json.dumps(config | {"num_experts": 2}))
    tokens = run(
        *[[SERVE, model_dir, "data_parallel"]] * 2,
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_DP_RANK="{rank}",
        VLLM_DP_SIZE="2",
        VLLM_DP_MASTER_PORT=str(first_of_free_ports()),
    )
    assert tokens == [expected(), expected()]


# The cells of a notebook. Each ends with what it shows.
SETUP = """
import multiprocessing, os, threading

from tiny_model import TinyModel
from vllm import LLM, ModelRegistry, SamplingParams

def generate():
    llm = LLM(
        model=".", dtype="float32", max_model_len=128, skip_tokenizer_init=True,
        enforce_eager=True, kv_cache_memory_bytes=1 << 24,
    )
    params = SamplingParams(temperature=0, max_tokens=8, detokenize=False)
    prompt = {"prompt_token_ids": list(range(40))}
    outputs = llm.generate(prompt, params, use_tqdm=False)
    llm.llm_engine.engine_core.shutdown()
    return list(outputs[0].outputs[0].token_ids)

guard = threading.Lock()
ModelRegistry.register_model("TinyModel", lambda c, p: (guard, TinyModel())[1])
try:
    generate()
except TypeError as error:
    message = str(error)
message, multiprocessing.active_children()
"""
FIRST = """
class MyModel(TinyModel):
    pass

ModelRegistry.register_model("TinyModel", lambda c, p: MyModel())
generate()
"""
ANOTHER_FACTORY = """
class Negated(TinyModel):
    def compute_logits(self, hidden_states):
        return -self.lm_head(hidden_states)

def build(vllm_config, parallel_context):
    return Negated()

ModelRegistry.register_model("TinyModel", build)
generate()
"""
# The factory refers to the class by its name.
ANOTHER_CLASS = """
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"  # now in the notebook's process

class Negated(TinyModel):
    pass

ModelRegistry.register_model("TinyModel", build)
generate()
"""


def test_notebook(model_dir, monkeypatch):
    """A factory that is defined again in another cell is the one of the next `LLM`."""
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "1")
    cells = [SETUP, FIRST, ANOTHER_FACTORY, ANOTHER_CLASS]
    notebook = nbformat.v4.new_notebook(cells=[*map(nbformat.v4.new_code_cell, cells)])
    client = NotebookClient(
        notebook,
        timeout=300,
        kernel_name="python3",
        resources={"metadata": {"path": str(model_dir)}},
    )
    client.execute()
    shown = [
        ast.literal_eval(output.data["text/plain"])
        for cell in notebook.cells
        for output in cell.outputs
        if output.output_type == "execute_result"
    ]
    (message, children), *tokens = shown
    assert "because guard (a lock) cannot be pickled" in message and not children
    assert tokens == [expected(), expected(sign=-1), expected()]
