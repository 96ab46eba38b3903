# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`vllm serve` loads, serves and replaces adapters of a registered callable."""

import pytest
import requests
import torch
from lora_adapters import add
from servers import tiny_server
from tiny_model import VOCAB, trained_model

from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdapterTrainer, TrainingSequence

pytestmark = [pytest.mark.engine, pytest.mark.slow]

PROMPT = list(range(40))


def greedy(trainer: AdapterTrainer, name: str | None, number: int) -> str:
    """The greedy continuation of the prompt, as words."""
    tokens = torch.tensor(PROMPT)
    for _ in range(number):
        ids = torch.arange(VOCAB).expand(len(tokens), VOCAB)
        [log_probs] = trainer.forward([TrainingSequence(name, tokens, ids)])
        tokens = torch.cat([tokens, log_probs[-1].argmax().view(1)])
    return words(tokens[len(PROMPT) :].tolist())


def words(token_ids: list[int]) -> str:
    return " ".join(f"t{i}" for i in token_ids)


def test_runtime_loading(model_dir_with_tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    trainer = AdapterTrainer(trained_model())
    for seed, name in enumerate(("a", "b"), 1):
        config = AdapterConfig(8, target_modules=("qkv", "projection", "lm_head"))
        add(trainer, name, config, seed)
        trainer.adapters[name].save(folder / name)
    options = ["--enable-lora", "--lora-modules", f"first={folder / 'a'}"]

    with tiny_server(
        model_dir_with_tokenizer,
        tmp_path_factory.mktemp("logs"),
        *options,
        VLLM_ALLOW_RUNTIME_LORA_UPDATING="1",
    ) as url:

        def answer(model: str) -> str:
            body = {"model": model, "prompt": words(PROMPT), "max_tokens": 6}
            body |= {"temperature": 0, "ignore_eos": True}
            reply = requests.post(f"{url}/v1/completions", json=body, timeout=60)
            assert reply.ok, reply.text
            return reply.json()["choices"][0]["text"].strip()

        def load(name: str, path, **options) -> requests.Response:
            body = {"lora_name": name, "lora_path": str(path), **options}
            return requests.post(f"{url}/v1/load_lora_adapter", json=body, timeout=60)

        expected = {name: greedy(trainer, name, 6) for name in ("a", "b", None)}
        assert len(set(expected.values())) == 3
        assert answer("first") == expected["a"]
        assert load("second", folder / "b").ok
        assert answer("second") == expected["b"]
        assert answer("tiny") == expected[None]
        assert load("second", folder / "a", load_inplace=True).ok
        assert answer("second") == expected["a"]
        trainer.adapters["b"].save(folder / "a")  # the same path, with other values
        assert load("second", folder / "a", load_inplace=True).ok
        assert answer("second") == expected["b"]
        missing = load("third", folder / "nowhere")
        assert missing.status_code == 404, missing.text
        body = {"lora_name": "second"}
        assert requests.post(f"{url}/v1/unload_lora_adapter", json=body, timeout=60).ok
