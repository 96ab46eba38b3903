# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs that megatron-core trains, with Hugging Face's names outside."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tink_client import MODEL, TEXT, logprobs, train, training
from tink_server import TinkServer
from tinker import types
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

from vllm.distributed import cleanup_dist_env_and_memory
from vllm.lora.adapter import Adapter
from vllm.lora.adapter_trainer import AdamWParams
from vllm_generic.tink.backends.base import Batch, Datum, LoraSpec
from vllm_generic.tink.errors import UserError

pytest.importorskip("megatron.core")

from vllm_generic.tink.backends.megatron_names import Names  # noqa: E402
from vllm_generic.tink.backends.megatron_trainer import (  # noqa: E402
    MegatronTrainer,
    megatron_model,
)

SIZES = {
    "vocab_size": 64,
    "hidden_size": 128,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}
CONFIGS = [
    LlamaConfig(**SIZES),
    Qwen2Config(**SIZES),  # with biases
    Qwen3Config(**SIZES, head_dim=64, tie_word_embeddings=True),  # with norms
]
TYPES = [config.model_type for config in CONFIGS]


@pytest.fixture(scope="module", autouse=True)
def groups_end_with_the_tests() -> Iterator[None]:
    """Other tests of this process start an engine's groups themselves."""
    yield
    cleanup_dist_env_and_memory()


def model_of(config: PreTrainedConfig) -> Any:
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():  # biases and norms too
            noise = torch.randn(parameter.shape, generator=generator)
            parameter.mul_(0.5).add_(0.05 * noise)
    return model.requires_grad_(False)


def datum(seed: int) -> Datum:
    tokens = np.random.default_rng(seed).integers(0, 64, 21)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(20, "f4")}
    return Datum(tokens[:-1], inputs)


@pytest.mark.parametrize("config", CONFIGS, ids=TYPES)
def test_log_probabilities_and_gradients_are_those_of_peft_in_float64(
    config: PreTrainedConfig, tmp_path: Path
) -> None:
    from peft import PeftModel

    base = model_of(config)
    trainer = MegatronTrainer(base, packed=True)
    untied = not config.tie_word_embeddings  # PEFT's adapter would change both
    trainer.create("run", LoraSpec(4, seed=1, train_unembed=untied))
    batch = {"run": Batch([datum(0), datum(1)], "cross_entropy")}
    trainer.forward_backward(batch)
    trainer.optim_step("run", AdamWParams(learning_rate=1e-2))
    trainer.export("run").save(tmp_path)
    (found, _) = trainer.forward_backward(batch)["run"].logprobs
    own = trainer._trainer.adapters["run"]
    grads = Adapter(
        own.config, {n: (a.grad, b.grad) for n, (a, b) in own.factors.items()}
    )

    peft = PeftModel.from_pretrained(base, tmp_path, is_trainable=True).double()
    expected = []
    for one in batch["run"].data:
        logits = peft(input_ids=torch.from_numpy(one.tokens)[None]).logits[0]
        targets = torch.from_numpy(one.loss_inputs["target_tokens"])[:, None]
        expected.append(logits.log_softmax(-1).gather(1, targets)[:, 0])
    (-torch.cat(expected).sum()).backward()
    assert found == pytest.approx(expected[0].detach().numpy(), abs=1e-4)
    theirs = {
        name.replace(".default", ""): parameter.grad
        for name, parameter in peft.named_parameters()
        if parameter.requires_grad
    }
    compared = 0
    for name, parts in trainer._names.parts.items():
        if name not in grads.factors:
            continue
        keys = [f"base_model.model.{part}.lora_{{}}.weight" for part in parts]
        # the gradient of what layers share is the sum of theirs
        a = sum(theirs[key.format("A")] for key in keys)
        b = torch.cat([theirs[key.format("B")] for key in keys])
        mine = trainer._names.to_hf(Adapter(own.config, {name: grads.factors[name]}))
        columns = torch.cat([mine.factors[part][1] for part in parts], 1)
        for ours, correct in ((grads.factors[name][0], a), (columns.t(), b)):
            assert correct.norm() > 0
            assert (ours - correct).norm() / correct.norm() < 1e-3
            compared += 1
    assert compared == 2 * len(grads.factors) == 2 * (8 + untied)


def test_what_megatron_does_not_take(tmp_path: Path) -> None:
    base = model_of(LlamaConfig(**SIZES))
    trainer = MegatronTrainer(base, packed=False)
    trainer.create("run", LoraSpec(4, seed=1))
    adapter = trainer.export("run")
    a, b = adapter.factors["model.layers.1.self_attn.k_proj"]
    adapter.factors["model.layers.1.self_attn.k_proj"] = (a + 1, b)
    adapter.save(tmp_path)
    with pytest.raises(UserError, match="k_proj, .*v_proj are one layer of Megatron's"):
        trainer.load("run", tmp_path, optimizer=False)
    sizes = {"vocab_size": 64, "n_embd": 64, "n_layer": 1, "n_head": 2}
    with pytest.raises(ValueError, match="type 'gpt2' is not built with Megatron"):
        megatron_model(model_of(GPT2Config(**sizes)))


def test_adapters_of_peft_are_stacked(tmp_path: Path) -> None:
    """Some of the layers that are one in Megatron, of other ranks and scales."""
    from peft import LoraConfig, get_peft_model

    config = LlamaConfig(**SIZES)
    base = model_of(config)
    plain = {name: weight.clone() for name, weight in base.state_dict().items()}
    layers = {"q_proj": 3, "v_proj": 5, "up_proj": 2, "down_proj": 4}
    peft = get_peft_model(
        base,
        LoraConfig(
            r=4,
            lora_alpha=6,
            target_modules=list(layers),
            rank_pattern=layers,
            alpha_pattern={"v_proj": 40},
        ),
    )
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in peft.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1, generator=generator)
    peft.save_pretrained(tmp_path)
    names = Names(config)
    stacked = names.from_hf(Adapter.load(tmp_path), may_stack=True)
    ranks = {len(a) for a, _ in stacked.factors.values()}
    assert ranks == {3 + 5, 2, 4} and len(stacked.factors) == 3 * 2
    merged = dict(peft.merge_and_unload().state_dict())
    changes = {name: merged[name] - plain[name] for name in plain}
    expected = names.tensors(changes)
    for name, (a, b) in stacked.factors.items():
        change = stacked.config.scale_of(name) * (b.t() @ a)
        assert change.norm() > 0.1
        torch.testing.assert_close(change, expected[f"{name}.weight"])
    # and back: each layer has its own change
    for name, (a, b) in names.to_hf(stacked).factors.items():
        change = names.to_hf(stacked).config.scale_of(name) * (b.t() @ a)
        torch.testing.assert_close(change, changes[f"{name}.weight"])


@pytest.mark.engine
def test_vllm_samples_what_megatron_trained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two runs, each with the bits that it has alone; a restart goes on with them."""
    monkeypatch.setenv("USE_MEGATRON", "true")
    prompt = types.ModelInput.from_ints(TEXT[:6])
    with TinkServer(tmp_path / "state", "--sampler", "vllm") as server:
        service = server.client()
        one = training(service)
        two = training(service, rank=4, seed=1, train_unembed=False)
        for client, steps in ((one, 3), (two, 5)):
            losses = train(client, steps)
            assert losses[-1] < losses[0]
            sampler = client.save_weights_and_get_sampling_client().result()
            params = types.SamplingParams(max_tokens=8, seed=5, stop=[])
            (sampled,) = sampler.sample(prompt, 1, params).result().sequences
            trained = logprobs(client, TEXT[:6] + sampled.tokens)[-8:]
            assert np.float32(sampled.logprobs) == pytest.approx(trained, abs=1e-4)
            text = types.ModelInput.from_ints(TEXT)
            scores = np.float32(sampler.compute_logprobs(text).result()[1:])
            assert scores == pytest.approx(logprobs(client), abs=1e-4)
        base = service.create_sampling_client(base_model=MODEL).result()
        untrained = np.float32(base.compute_logprobs(text).result()[1:])
        assert np.abs(scores - untrained).max() > 1e-2
        state = two.save_state("after-five").result().path
        expected = train(two, 2)
    with TinkServer(tmp_path / "state") as server:  # sampled by Hugging Face
        service = server.client()
        again = service.create_training_client_from_state_with_optimizer(state).result()
        assert train(again, 2) == expected
        alone = training(service, rank=4, seed=1, train_unembed=False)
        train(alone, 5)
        assert train(alone, 2) == expected
