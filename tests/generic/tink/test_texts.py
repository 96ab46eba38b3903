# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The smaller API, as curl uses it."""

import shutil
from typing import Any

import httpx
from tink_client import train, training
from tink_requests import KEY, post, result
from tink_server import TinkServer


def test_train_and_sample_by_texts(server: TinkServer) -> None:
    lora = {"lora_config": {"rank": 4, "seed": 0}}
    model = post(server, "lora", lora).json()["model_id"]
    batch = {"model_id": model, "data": [{"text": "to be or not to be"}]}
    losses = []
    for _ in range(14):
        losses.append(post(server, "fwdbwd", batch).json()["metrics"]["loss:sum"])
        step = {"model_id": model, "adam_params": {"learning_rate": 1e-2}}
        assert post(server, "optim", step).json()["metrics"]["grad_norm:mean"] > 0
    assert losses[-1] < losses[0] / 2
    body = {
        "model_id": model,
        "prompts": ["to be or", "to be"],
        "sampling_params": {"max_tokens": 6, "temperature": 0},
    }
    sampled = post(server, "sample", body).json()
    texts = [completion["text"] for completion in sampled["completions"]]
    assert len(texts) == 2
    base = post(server, "sample", body | {"model_id": None}).json()
    assert texts != [completion["text"] for completion in base["completions"]]
    pending = post(server, "asample", body).json()["request_id"]
    assert result(server, pending).json() == sampled


def test_adapters_from_files(server: TinkServer, service: Any) -> None:
    """A PEFT adapter below the adapters' directory, and nothing outside it."""
    client = training(service)
    train(client, 2)
    client.save_weights_for_sampler("export").result()
    folder = (
        server.root / "checkpoints" / client.model_id / "sampler_weights" / "export"
    )
    adapters = server.root / "adapters"
    shutil.copytree(folder, adapters / "mine")
    assert post(server, "lora", {"adapter_id": "a", "lora_path": "mine"}).json() == {
        "adapter_id": "a"
    }
    listed = httpx.get(f"{server.url}/api/v1/lora", headers=KEY).json()["adapters"]
    assert {"adapter_id": "a", "lora_path": str(adapters / "mine")} in listed
    body = {"model_id": "a", "prompts": ["be"], "sampling_params": {"max_tokens": 2}}
    assert len(post(server, "sample", body).json()["completions"]) == 1
    httpx.delete(f"{server.url}/api/v1/lora/a", headers=KEY).raise_for_status()
    assert post(server, "sample", body).status_code == 404
    for path, text in (
        ("nothing", "LoRA path does not exist"),
        ("../checkpoints", "outside"),
        (str(folder), "outside"),
    ):
        answer = post(server, "lora", {"lora_path": path})
        assert (answer.status_code, text in answer.json()["detail"]) == (400, True)


def test_a_sample_that_fails_is_answered(server: TinkServer) -> None:
    """Whoever waits for it gets the reason, whatever was raised."""
    folder = server.root / "adapters" / "broken"
    folder.mkdir(parents=True)
    (folder / "adapter_config.json").write_text("{")
    post(server, "lora", {"adapter_id": "broken", "lora_path": "broken"})
    body = {"model_id": "broken", "prompts": ["be"], "sampling_params": {}}
    pending = post(server, "asample", body).json()["request_id"]
    answer = result(server, pending).json()
    assert answer["category"] == "server" and "JSON" in answer["error"]
    assert post(server, "sample", body | {"model_id": None}).is_success
