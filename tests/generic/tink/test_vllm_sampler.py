# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling by vLLM's engine in the service's process."""

import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from tink_client import MODEL, TEXT, logprobs, train, training
from tink_server import TinkServer
from tinker import types
from transformers import AutoModelForCausalLM

from vllm_generic.tink import vllm_backend


def _vllm_api_on_the_same_port(server: TinkServer, client: Any) -> None:
    """Completions of the base and of a checkpoint, chat, models, and errors."""
    http = httpx.Client(base_url=f"{server.url}/v1/", timeout=60)

    def complete(model: str) -> httpx.Response:
        body = {"model": model, "prompt": TEXT[:6], "max_tokens": 6, "temperature": 0}
        return http.post("completions", json=body | {"return_token_ids": True})

    path = client.save_weights_for_sampler("served").result().path
    folder = server.root / "checkpoints" / path.removeprefix("tinker://")
    shutil.copytree(folder, server.root.parent / "a")
    load = {"lora_name": "mine", "lora_path": "a"}
    assert http.post("load_lora_adapter", json=load).is_success
    assert {card["id"] for card in http.get("models").json()["data"]} == {MODEL, "mine"}
    (choice,) = complete("mine").json()["choices"]
    sampler = client.save_weights_and_get_sampling_client().result()
    greedy = types.SamplingParams(max_tokens=6, temperature=0.0)
    prompt = types.ModelInput.from_ints(TEXT[:6])
    (sequence,) = sampler.sample(prompt, 1, greedy).result().sequences
    assert choice["token_ids"] == list(sequence.tokens)
    assert complete(MODEL).json()["choices"][0]["token_ids"] != choice["token_ids"]
    _functions_for_servers(server, choice["text"])
    _chat(server, http, sampler)
    _adapter_of_peft(server, http)
    assert http.post("unload_lora_adapter", json={"lora_name": "mine"}).is_success
    assert complete("mine").status_code == 404
    for path, text in (("../elsewhere", "outside"), ("b", "does not exist")):
        answer = http.post("load_lora_adapter", json=load | {"lora_path": path})
        assert answer.status_code == 400 and text in answer.json()["detail"]
    assert httpx.get(f"{server.url}/server_info").status_code == 404
    assert httpx.get(f"{server.url}/health").json() == {"status": "ok"}


def _chat(server: TinkServer, http: httpx.Client, sampler: Any) -> None:
    """With the template of the tokenizer, by the base and by an adapter."""
    messages = [{"role": "user", "content": "to be or not to be"}]
    body = {"messages": messages, "max_tokens": 6, "temperature": 0, "logprobs": True}
    answers = {}
    for model in (MODEL, "mine"):
        answer = http.post("chat/completions", json=body | {"model": model})
        answers[model] = answer.json()["choices"][0]
        assert answers[model]["message"]["role"] == "assistant"
    assert answers[MODEL]["message"] != answers["mine"]["message"]
    tokens = httpx.post(f"{server.url}/tokenize", json=body | {"model": MODEL})
    prompt = types.ModelInput.from_ints(tokens.json()["tokens"])
    greedy = types.SamplingParams(max_tokens=6, temperature=0.0)
    (expected,) = sampler.sample(prompt, 1, greedy).result().sequences
    served = [token["logprob"] for token in answers["mine"]["logprobs"]["content"]]
    assert served == pytest.approx(expected.logprobs, abs=1e-4)


def _adapter_of_peft(server: TinkServer, http: httpx.Client) -> None:
    """One that Hugging Face and PEFT have trained, elsewhere."""
    base = AutoModelForCausalLM.from_pretrained(server.root / "tiny_model")
    config = LoraConfig(r=4, target_modules=["q_proj", "v_proj", "down_proj"])
    model = get_peft_model(base, config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    tokens = torch.tensor([TEXT])
    for _ in range(8):
        model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(server.root.parent / "peft")
    load = {"lora_name": "from PEFT", "lora_path": "peft"}
    assert http.post("load_lora_adapter", json=load).is_success
    body = {"model": "from PEFT", "prompt": TEXT, "max_tokens": 1, "temperature": 0}
    answer = http.post("completions", json=body | {"prompt_logprobs": 0}).json()
    (choice,) = answer["choices"]
    found = [
        entry[str(token)]["logprob"]
        for token, entry in zip(TEXT[1:], choice["prompt_logprobs"][1:], strict=True)
    ]
    log_probs = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    expected = log_probs.gather(1, tokens[0, 1:, None])[:, 0].detach()
    assert found == pytest.approx(expected.numpy(), abs=1e-4)
    with model.disable_adapter():
        plain = model(input_ids=tokens).logits[0, :-1].log_softmax(-1)
    assert (plain - log_probs).abs().max() > 1e-2


def _functions_for_servers(server: TinkServer, expected: str) -> None:
    """`vllm_backend` with this server, as a worker calls it."""
    servers = vllm_backend.initialize_vllm_client({"base_url": server.url})
    assert servers.model == MODEL
    vllm_backend.register_lora_adapter("worker", str(server.root.parent / "a"))
    sampled = vllm_backend.generate_with_vllm(
        [TEXT[:6]] * 2, "worker", max_tokens=6, temperature=0
    )
    assert sampled == [expected] * 2
    assert vllm_backend.generate_with_vllm([TEXT[:6]], temperature=0) != [expected]
    vllm_backend.unregister_lora_adapter("worker")


def _sample_from_its_api(url: str, root: Path, patch: pytest.MonkeyPatch) -> TinkServer:
    """Another service, which trains and asks the first one's /v1 for samples."""
    patch.setenv("USE_VLLM", "true")
    patch.setenv("VLLM_BASE_URL", f"http://127.0.0.1:9, {url}")
    other = TinkServer(root).start()
    service = other.client()
    one = training(service)
    two = training(service, rank=4, seed=1, train_unembed=False)
    prompt = types.ModelInput.from_ints(TEXT[:6])
    for client, steps in ((one, 3), (two, 5)):
        train(client, steps)
        sampler = client.save_weights_and_get_sampling_client().result()
        params = types.SamplingParams(max_tokens=6, seed=5)
        output = sampler.sample(prompt, 2, params, topk_sample_logprobs=2).result()
        for sequence in output.sequences:
            trained = logprobs(client, TEXT[:6] + sequence.tokens)[-6:]
            assert np.float32(sequence.logprobs) == pytest.approx(trained, abs=1e-4)
            assert [len(top) for top in sequence.topk_logprobs] == [2] * 6
        scores = sampler.compute_logprobs(types.ModelInput.from_ints(TEXT)).result()
        assert np.float32(scores[1:]) == pytest.approx(logprobs(client), abs=1e-4)
    log = other.log.read_text()
    reason = "Hugging Face instead: vLLM scores prompts without an adapter of the head"
    assert log.count("sampling by Hugging Face instead") == log.count(reason) == 1
    return other


def _sample_without_it(other: TinkServer) -> None:
    sampler = other.client().create_sampling_client(base_model=MODEL).result()
    prompt = types.ModelInput.from_ints(TEXT[:6])
    params = types.SamplingParams(max_tokens=4, stop=[])
    (sequence,) = sampler.sample(prompt, 1, params).result().sequences
    assert len(sequence.tokens) == 4
    log = other.log.read_text()
    assert "Hugging Face instead: The vLLM server can't be reached at http" in log


@pytest.mark.engine
def test_vllm_samples_what_was_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two adapters and the base in one batch; the trainer's log-probabilities."""
    options = ("--sampler", "vllm", "--adapters-dir", str(tmp_path))
    with TinkServer(tmp_path / "state", *options) as server:
        service = server.client()
        # an adapter of the head, and one without it, whose prompts vLLM scores
        one = training(service)
        two = training(service, rank=4, seed=1, train_unembed=False)
        train(one, 3)
        train(two, 5)
        prompt = types.ModelInput.from_ints(TEXT[:6])
        samplers = [
            one.save_weights_and_get_sampling_client().result(),
            two.save_weights_and_get_sampling_client().result(),
            service.create_sampling_client(base_model=MODEL).result(),
        ]
        params = types.SamplingParams(max_tokens=6, seed=5)
        with ThreadPoolExecutor() as pool:
            futures = [s.sample(prompt, 2, params) for s in samplers]
            outputs = list(pool.map(lambda future: future.result(), futures))
        untrained = training(service, train_unembed=False)
        for client, output in zip((one, two, untrained), outputs, strict=True):
            first, second = output.sequences
            assert first.tokens != second.tokens
            trained = logprobs(client, TEXT[:6] + first.tokens)[-6:]
            assert np.float32(first.logprobs) == pytest.approx(trained, abs=1e-4)
        text = types.ModelInput.from_ints(TEXT)
        for client, sampler in zip((one, two), samplers, strict=False):
            scores = sampler.compute_logprobs(text).result()
            assert scores[0] is None
            assert np.float32(scores[1:]) == pytest.approx(logprobs(client), abs=1e-4)
        greedy = types.SamplingParams(max_tokens=8, temperature=0.0, stop=[])
        targets = torch.full((5, 2), -1, dtype=torch.int64)
        targets[4, 1] = TEXT[5]
        free = (
            samplers[1]
            .sample(
                prompt,
                1,
                greedy,
                include_prompt_logprobs=True,
                topk_sample_logprobs=2,
                topk_prompt_logprobs=2,
                target_prompt_logprobs=types.TensorData.from_torch_sparse(targets, -1),
                prompt_alt_tokens_k=3,
            )
            .result()
        )
        (sequence,) = free.sequences
        assert len(sequence.tokens) == 8 and sequence.stop_reason == "length"
        assert [top[0][0] for top in sequence.topk_logprobs] == list(sequence.tokens)
        assert free.topk_prompt_logprobs[0] is None
        assert free.target_prompt_logprobs.to_torch()[4, 1] == pytest.approx(
            free.prompt_logprobs[5], abs=1e-6
        )
        assert free.prompt_alt_tokens.tokens.to_torch().shape == (5, 3)
        stop = sequence.tokens[3]
        stopped = samplers[1].sample(
            prompt, 1, types.SamplingParams(max_tokens=8, temperature=0.0, stop=[stop])
        )
        (shorter,) = stopped.result().sequences
        assert shorter.stop_reason == "stop" and shorter.tokens[-1] == stop
        _vllm_api_on_the_same_port(server, one)
        other = _sample_from_its_api(server.url, tmp_path / "other", monkeypatch)
    try:
        _sample_without_it(other)
    finally:
        other.stop()
