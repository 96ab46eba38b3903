# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A mixture of experts in the service, whose adapters change its experts."""

from pathlib import Path

import numpy as np
import pytest
import torch
from tink_client import TEXT, logprobs, train
from tink_server import TinkServer
from tinker import types
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


@pytest.mark.engine
def test_experts_are_trained_and_sampled(tmp_path: Path) -> None:
    """By vLLM, with the trainer's log-probabilities; beside an adapter without."""
    torch.manual_seed(0)
    config = Qwen3MoeConfig(
        vocab_size=64,
        hidden_size=64,
        moe_intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=32,
        num_experts=4,
        num_experts_per_tok=2,
        norm_topk_prob=True,
        max_position_embeddings=128,
        initializer_range=0.1,
        pad_token_id=0,
    )
    Qwen3MoeForCausalLM(config).save_pretrained(tmp_path / "mixture")
    options = (str(tmp_path / "mixture"), "--sampler", "vllm")
    with TinkServer(tmp_path / "state", *options) as server:
        service = server.client()
        (model,) = service.get_server_capabilities().supported_models
        prompt = types.ModelInput.from_ints(TEXT[:6])
        params = types.SamplingParams(max_tokens=6, seed=5, stop=[])
        parts = {"train_attn": False, "train_unembed": False}, {"train_mlp": False}
        for number, left_out in enumerate(parts):
            client = service.create_lora_training_client(
                base_model=model.model_name, rank=8, seed=number, **left_out
            ).result()
            losses = train(client, 5)
            assert losses[-1] < 0.9 * losses[0]
            sampler = client.save_weights_and_get_sampling_client().result()
            (sequence,) = sampler.sample(prompt, 1, params).result().sequences
            trained = logprobs(client, TEXT[:6] + list(sequence.tokens))[-6:]
            assert np.float32(sequence.logprobs) == pytest.approx(trained, abs=1e-4)
        assert "leave out the experts" not in server.log.read_text()
