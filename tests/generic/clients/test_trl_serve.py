# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`trl vllm-serve --enable-lora` with a registered model, asked by TRL's own client.

TRL hands on to `vllm serve` what its script does not know.
"""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from clients import served_llama
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import LlamaForCausalLM

from vllm.utils.network_utils import get_open_port

pytest.importorskip("trl")
pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPTS = ["1+2=", "3+4+5="]
FACTORY = """
from transformers import LlamaForCausalLM


def build(vllm_config, parallel_context):
    return LlamaForCausalLM(vllm_config.model_config.hf_config)
"""
PLUGIN = """
from vllm import ModelRegistry


def register():
    ModelRegistry.register_model("LlamaForCausalLM", "modeling_here:build")
"""


def by_auto_map(folder: Path, model: Path) -> tuple[list[str], str]:
    """The model directory has the factory. More options, and a path for modules."""
    (model / "modeling_here.py").write_text(FACTORY)
    config = json.loads((model / "config.json").read_text())
    config["auto_map"] = {"VllmModel": "modeling_here.build"}
    (model / "config.json").write_text(json.dumps(config))
    return ["--trust_remote_code", "True"], ""


def by_plugin(folder: Path, model: Path) -> tuple[list[str], str]:
    """A package that is installed registers it."""
    site = folder / "site"
    info = site / "here-1.dist-info"
    info.mkdir(parents=True)
    (site / "modeling_here.py").write_text(FACTORY)
    (site / "plugin_here.py").write_text(PLUGIN)
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: here\nVersion: 1\n")
    entry = "[vllm.general_plugins]\nhere = plugin_here:register\n"
    (info / "entry_points.txt").write_text(entry)
    return [], str(site)


def adapted(model: Path, folder: Path) -> nn.Module:
    """The model with an adapter of PEFT's that changes what it says, also saved."""
    base = LlamaForCausalLM.from_pretrained(model, dtype="float32")
    config = LoraConfig(r=4, target_modules="all-linear", init_lora_weights=False)
    torch.manual_seed(1)
    module = get_peft_model(base, config)
    module.save_pretrained(folder)
    return module.eval()


@torch.no_grad()
def logprobs(module: nn.Module, prompt: list[int], answer: list[int]) -> torch.Tensor:
    ids = torch.tensor([prompt + answer])
    rows = module(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
    return rows.gather(-1, torch.tensor(answer)[:, None])[:, 0]


def agrees(module: nn.Module, generated: dict[str, Any]) -> None:
    rows = zip(
        generated["prompt_ids"],
        generated["completion_ids"],
        generated["logprobs"],
        strict=True,
    )
    for prompt, answer, found in rows:
        theirs = torch.tensor(found)[:, 0]
        torch.testing.assert_close(
            logprobs(module, prompt, answer), theirs, atol=1e-4, rtol=0
        )


@pytest.mark.parametrize("register", [by_auto_map, by_plugin])
def test_trl_serves_a_registered_model_with_adapters(tmp_path, register):
    from trl.generation.vllm_client import VLLMClient

    model = tmp_path / "model"
    served_llama.save(model)
    module = adapted(model, tmp_path / "adapter")
    options, site = register(tmp_path, model)
    port = get_open_port()
    command = [
        sys.executable,
        "-m",
        "trl.cli.main",
        "vllm-serve",
        "--model",
        str(model),
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), "--enforce_eager", "True"]
    # "auto" is half precision for a model that a name or a directory registers
    command += ["--max_model_len", "64", "--dtype", "float32", *options]
    command += ["--enable-lora", "--max-lora-rank", "8"]
    command += ["--lora-modules", f"mine={tmp_path / 'adapter'}"]
    path = os.pathsep.join(filter(None, [site, os.environ.get("PYTHONPATH")]))
    with (tmp_path / "log.txt").open("w") as log:
        process = subprocess.Popen(
            command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": path}
        )
    try:
        url = f"http://127.0.0.1:{port}"
        try:
            client = VLLMClient(base_url=url, connection_timeout=240)
        except ConnectionError:
            pytest.fail((tmp_path / "log.txt").read_text()[-5000:])
        base = client.generate(PROMPTS, max_tokens=6)
        client.model = "mine"
        mine = client.generate(PROMPTS, max_tokens=6)
        agrees(module, mine)
        with module.disable_adapter():
            agrees(module, base)
        models = requests.get(f"{url}/v1/models", timeout=10).json()["data"]
        assert {card["id"] for card in models} >= {"mine"}
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(60)
