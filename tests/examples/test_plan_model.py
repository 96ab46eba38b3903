# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`examples/plan_model`, from training to requests at TP=2 x PP=2."""

import importlib.util
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import requests
import torch
from safetensors.torch import load_file
from transformers import AutoTokenizer

from vllm.utils.network_utils import get_open_port

EXAMPLE = Path(__file__).parents[2] / "examples/plan_model"
CLI = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
LINK = [sys.executable, "-m", "vllm.entrypoints.link_checkpoint"]
PROMPT = "The import statement"


def run(*command: str | Path) -> str:
    completed = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, timeout=300, check=True
    )
    return completed.stdout


def load_model(directory: Path) -> torch.nn.Module:
    spec = importlib.util.spec_from_file_location("m", directory / "modeling_plan.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = json.loads((directory / "config.json").read_text())
    model = module.PlanForCausalLM(SimpleNamespace(**config))
    model.load_state_dict(load_file(directory / "model.safetensors"))
    return model


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(400):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(1)
    pytest.fail(f"not up: {log.read_text()[-4000:]}")


@pytest.mark.engine
@torch.no_grad()
def test_trained_linked_and_served(tmp_path):
    directory = tmp_path / "model"
    train = [sys.executable, EXAMPLE / "train.py", "--train-seconds", "5"]
    run(*train, "--output-dir", directory, "--save-steps", "1")
    steps = [p.name for p in (directory / "checkpoints").iterdir()]
    last = max(steps, key=lambda name: int(name.removeprefix("checkpoint-")))
    linked = run(*LINK, directory).strip().splitlines()[-1]
    assert linked.endswith(f"model.safetensors -> checkpoints/{last}/model.safetensors")

    port = get_open_port()
    url = f"http://127.0.0.1:{port}"
    command = [*CLI, "serve", "--trust-remote-code", str(directory)]
    command += ["--tensor-parallel-size", "2", "--pipeline-parallel-size", "2"]
    command += ["--dtype", "float32", "--max-model-len", "128"]
    command += ["--kv-cache-memory-bytes", "16777216"]
    command += ["--host", "127.0.0.1", "--port", str(port)]
    log = tmp_path / "log.txt"
    # Six processes, which then import vLLM twice.
    environment = os.environ | {"VLLM_WORKER_MULTIPROC_METHOD": "forkserver"}
    with open(log, "w") as output:
        server = subprocess.Popen(
            command, stdout=output, stderr=output, env=environment
        )
    try:
        wait_for(url, server, log)
        models = requests.get(f"{url}/v1/models", timeout=60).json()["data"]
        assert [model["id"] for model in models] == [str(directory)]

        request = {"model": str(directory), "temperature": 0, "max_tokens": 8}
        request |= {"logprobs": 1, "return_token_ids": True, "ignore_eos": True}
        answer = requests.post(
            f"{url}/v1/completions", json={**request, "prompt": PROMPT}, timeout=60
        ).json()["choices"][0]
        model = load_model(directory)
        ids = AutoTokenizer.from_pretrained(directory)(PROMPT)["input_ids"]
        served = zip(
            answer["token_ids"], answer["logprobs"]["token_logprobs"], strict=True
        )
        for token, logprob in served:
            hidden = model(torch.tensor(ids), torch.arange(len(ids)))
            expected = model.compute_logits(hidden)[-1].log_softmax(-1)
            assert token == int(expected.argmax())
            assert abs(logprob - float(expected[token])) <= 1e-4
            ids.append(token)
        assert len(answer["token_ids"]) == 8

        chat = {**request, "messages": [{"role": "user", "content": PROMPT}]}
        chat["logprobs"] = False
        answer = requests.post(f"{url}/v1/chat/completions", json=chat, timeout=60)
        assert answer.json()["choices"][0]["message"]["content"]

        for name, *options in (["complete", "--max-tokens", "8"], ["chat"]):
            text = run(*CLI, name, "--url", f"{url}/v1", *options, "-q", PROMPT)
            assert text.partition(f"Using model: {directory}\n")[2].strip()
    finally:
        server.terminate()
        server.wait(timeout=60)
