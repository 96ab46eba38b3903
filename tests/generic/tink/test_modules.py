# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Hugging Face models as the service trains and samples them."""

import asyncio
import logging
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    LlamaConfig,
    PreTrainedConfig,
    Qwen3Config,
    Qwen3MoeConfig,
)

from vllm.lora.adapter_config import AdapterConfig
from vllm.lora.adapter_trainer import AdamWParams
from vllm_generic.tink.backends.base import (
    Batch,
    Datum,
    LoraSpec,
    SampleJob,
    SamplingParams,
)
from vllm_generic.tink.backends.hf_sampler import HFSampler
from vllm_generic.tink.backends.module_trainer import ModuleTrainer
from vllm_generic.tink.backends.packed_model import PackedModel, WholeModel, pack
from vllm_generic.tink.serve import _module, _trainer
from vllm_generic.tink.settings import Settings

SIZES = {
    "vocab_size": 64,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 32,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
}


def model_of(config: PreTrainedConfig) -> Any:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    model.config.architectures = [type(model).__name__]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(3)
    return model.requires_grad_(False)


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**SIZES),
        Qwen3Config(**SIZES, tie_word_embeddings=True),
        # its attention has a window of 4 tokens in some layers, and a soft cap
        Gemma2Config(
            **SIZES,
            final_logit_softcapping=None,
            sliding_window=4,
            query_pre_attn_scalar=32,
        ),
    ],
    ids=["llama", "qwen3", "gemma2"],
)
def test_packed_sequences_have_the_models_logits(config: PreTrainedConfig) -> None:
    model = model_of(config)
    packed = ModuleTrainer(pack(model), packed=True)
    whole = ModuleTrainer(WholeModel(model), packed=False)
    random = np.random.default_rng(0)
    data = []
    for length in (5, 30, 1):
        tokens = random.integers(0, 64, length + 1)
        inputs = {"target_tokens": tokens[1:], "weights": np.ones(length, "f4")}
        data.append(Datum(tokens[:-1], inputs))
    outputs = []
    for trainer in (packed, whole):
        trainer.create("a", LoraSpec(4, seed=0))
        batch = {"a": Batch(data, "cross_entropy")}
        outputs.append(trainer.forward_backward(batch)["a"])
    for mine, theirs in zip(outputs[0].logprobs, outputs[1].logprobs, strict=True):
        assert mine == pytest.approx(theirs, abs=1e-4)
    grads = [
        torch.cat([p.grad.flatten() for p in t._trainer.adapters["a"].parameters()])
        for t in (packed, whole)
    ]
    error = (grads[0] - grads[1]).norm() / grads[1].norm()
    assert grads[1].norm() > 0 and error < 1e-3


def test_a_model_that_cannot_be_packed_is_trained_as_it_is(
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Its logits are capped after the head, which a packed model does not know."""
    config = Gemma2Config(**SIZES, final_logit_softcapping=1.0)
    model = model_of(config)
    with pytest.raises(ValueError, match="computes other logits when its sequences"):
        pack(model)
    with caplog.at_level(logging.WARNING):
        settings = Settings(Path("unused"), packed=True)
        trainer = _trainer(settings, model, _module(settings, model))
    assert "one sequence at a time by Hugging Face instead" in caplog.text
    assert trainer.max_runs_in_a_pass == 1
    trainer.create("a", LoraSpec(4, seed=0))
    tokens = np.arange(1, 9)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(7, "f4")}
    batch = {"a": Batch([Datum(tokens[:-1], inputs)], "cross_entropy")}
    (found,) = trainer.forward_backward(batch)["a"].logprobs
    logits = model(input_ids=torch.from_numpy(tokens[None, :-1])).logits[0]
    assert float(logits.abs().max()) < 1
    expected = logits.log_softmax(-1).gather(1, torch.from_numpy(tokens[1:, None]))
    assert found == pytest.approx(expected[:, 0].numpy(), abs=1e-5)
    # and it is sampled with these log-probabilities
    sampler = HFSampler(model, WholeModel(model), tokenizer=None)
    params = SamplingParams(max_tokens=1, ignore_eos=True)
    job = SampleJob(tokens.tolist(), params, prompt_logprobs=True)
    output = asyncio.run(sampler.sample(None, job))
    assert output.prompt_logprobs is not None
    assert (output.prompt_logprobs[1:] == found).all()
    sampler.close()


MIXTURE = Qwen3MoeConfig(
    **SIZES, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True
)


def test_experts_are_trained_as_mlp(caplog: pytest.LogCaptureFixture) -> None:
    """Transformers keeps all experts of a block in one parameter."""
    model = model_of(MIXTURE)
    with caplog.at_level(logging.WARNING):
        trainer = ModuleTrainer(WholeModel(model), packed=False)
    assert "experts" not in caplog.text
    trainer.create("a", LoraSpec(4, seed=0))
    trainer.create("b", LoraSpec(4, seed=0, train_mlp=False))
    trainer.create("c", LoraSpec(4, seed=0, train_attn=False, train_unembed=False))
    stack = "model.layers.0.mlp.experts.down_proj"
    assert stack in trainer.export("a").factors
    assert not any("mlp" in name for name in trainer.export("b").factors)
    assert {name.split(".")[3] for name in trainer.export("c").factors} == {"mlp"}
    tokens = np.arange(1, 17)
    inputs = {"target_tokens": tokens[1:], "weights": np.ones(15, "f4")}
    batch = Batch([Datum(tokens[:-1], inputs)], "cross_entropy")
    losses = []
    for _ in range(4):
        out = trainer.forward_backward({"c": batch})["c"]
        losses.append(out.metrics["loss:sum"])
        trainer.optim_step("c", AdamWParams(learning_rate=1e-2))
    assert losses[-1] < 0.8 * losses[0]


def test_experts_that_are_left_out_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """A GPU's engine adapts none, and vLLM's experts and Megatron's take none."""
    model = model_of(MIXTURE)
    for block in model.model.layers:
        block.mlp.experts.quant_method = None  # as one of vLLM's
    with caplog.at_level(logging.WARNING):
        trainer = ModuleTrainer(pack(model), packed=True)
    parameter = r"model\.layers\.0\.mlp\.experts\.\w+"
    assert re.search(rf"the experts of this model \({parameter} and 3", caplog.text)
    trainer.create("a", LoraSpec(4, seed=0))
    assert not any("experts" in name for name in trainer.export("a").factors)
    config = AdapterConfig(4, target_modules=("layers.0.mlp.experts",))
    with pytest.raises(ValueError, match="one parameter of all by target_parameters"):
        trainer._trainer.add("b", config)


def test_what_has_no_base_and_head_is_told() -> None:
    class Odd(torch.nn.Module):
        base_model_prefix = "model"
        config = LlamaConfig(**SIZES)

        def get_output_embeddings(self) -> None:
            return None

    with pytest.raises(ValueError, match="Odd has no base model and head"):
        PackedModel(Odd())
