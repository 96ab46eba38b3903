# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What vLLM 0.32.0's own `examples/rl/` call, on a model that a callable builds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import requests
import torch
from safetensors.torch import save_file
from servers import tiny_server

from vllm import LLM, ModelRegistry, SamplingParams
from vllm.utils.network_utils import get_open_port

transfer = pytest.importorskip("vllm.distributed.weight_transfer")
if not hasattr(transfer, "WeightTransferTrainerFactory"):
    pytest.skip("examples of 0.32.0 and later", allow_module_level=True)

from store_backend import CONFIG, DividedGPT, StoreInitInfo, build  # noqa: E402

pytestmark = [pytest.mark.engine, pytest.mark.slow]
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6]]
COUNT = 8


def module_of(seed: int) -> DividedGPT:
    torch.manual_seed(seed)
    model = DividedGPT()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.5)
    return model


def continued(model: DividedGPT, prompt: list[int]) -> list[int]:
    """The greedy continuation, by the module's own code."""
    ids = list(prompt)
    with torch.no_grad():
        for _ in range(COUNT):
            hidden = model(torch.tensor(ids), torch.arange(len(ids)))
            ids.append(int(model.lm_head(hidden[-1]).argmax()))
    return ids[len(prompt) :]


def directory_of(folder: Path, model: DividedGPT | None = None) -> Path:
    (folder / "config.json").write_text(json.dumps(CONFIG))
    if model is not None:
        save_file(model.state_dict(), folder / "model.safetensors")
    return folder


def completions(url: str) -> list[list[int]]:
    found = []
    for prompt in PROMPTS:
        body: dict[str, Any] = {"model": "tiny", "prompt": prompt, "temperature": 0}
        body |= {"max_tokens": COUNT, "return_token_ids": True, "ignore_eos": True}
        answer = requests.post(f"{url}/v1/completions", json=body, timeout=60)
        answer.raise_for_status()
        found.append(answer.json()["choices"][0]["token_ids"])
    return found


@pytest.mark.parametrize("ranks", [1, 2])
def test_calls_of_rlhf_http(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, ranks: int
) -> None:
    """Of `rlhf_http_nccl.py` and `rlhf_http_ipc.py`: dummy weights, then two updates.

    Their transport is replaced, because both need CUDA.
    """
    options = ["--model-class-overrides", '{"DividedGPT": "store_backend:build"}']
    options += ["--weight-transfer-config", '{"backend": "store"}']
    options += ["--load-format", "dummy", "--tensor-parallel-size", str(ranks)]
    options += ["--skip-tokenizer-init"]
    logs = tmp_path_factory.mktemp("logs")
    directory = directory_of(tmp_path)
    with tiny_server(directory, logs, *options, VLLM_SERVER_DEV_MODE="1") as url:
        world = requests.get(f"{url}/get_world_size", timeout=10).json()["world_size"]
        assert world == ranks
        model = module_of(1)
        nonsense = completions(url)
        engine = transfer.WeightTransferTrainerFactory.trainer_init(
            init_info=StoreInitInfo(
                master_address="127.0.0.1",
                master_port=get_open_port(),
                world_size=world + 1,
                rank=0,
            ),
            client=transfer.HTTPVLLMWeightSyncClient(url),
            source=transfer.ModuleSource(model),
        )
        for seed in (1, 2):
            model.load_state_dict(module_of(seed).state_dict())
            requests.post(f"{url}/pause", timeout=60).raise_for_status()
            engine.send_weights()
            requests.post(f"{url}/resume", timeout=60).raise_for_status()
            expected = [continued(model, prompt) for prompt in PROMPTS]
            assert completions(url) == expected != nonsense


def test_calls_of_skip_loading_weights(tmp_path: Path, start: Any) -> None:
    """Dummy weights first; `reload_weights` brings the checkpoint's."""
    ModelRegistry.register_model("DividedGPT", build)
    model = module_of(3)
    directory = directory_of(tmp_path, model)
    llm: LLM = start(model=str(directory), load_format="dummy", processes=True)
    llm.collective_rpc(
        "update_config", args=({"load_config": {"load_format": "auto"}},)
    )
    llm.collective_rpc("reload_weights")
    params = SamplingParams(temperature=0, max_tokens=COUNT, detokenize=False)
    inputs = [{"prompt_token_ids": prompt} for prompt in PROMPTS]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        assert list(output.outputs[0].token_ids) == continued(model, prompt)
