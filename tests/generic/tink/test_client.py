# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The real client against a service: training, weights, sampling."""

from typing import Any

import numpy as np
import pytest
import tinker
from tinker import types

MODEL = "tiny/model"
TEXT = list(range(40, 60))


def datum(tokens: list[int], **inputs: Any) -> types.Datum:
    inputs.setdefault("weights", [1.0] * (len(tokens) - 1))
    return types.Datum(
        model_input=types.ModelInput.from_ints(tokens[:-1]),
        loss_fn_inputs={"target_tokens": tokens[1:], **inputs},
    )


def training(service: Any, **options: Any) -> Any:
    options = {"rank": 8, "seed": 7} | options
    return service.create_lora_training_client(base_model=MODEL, **options)


def train(client: Any, steps: int, data: list[types.Datum] | None = None) -> list[float]:
    """Losses of as many steps on a text."""
    losses = []
    for _ in range(steps):
        passed = client.forward_backward(data or [datum(TEXT)], "cross_entropy")
        step = client.optim_step(types.AdamParams(learning_rate=1e-2))
        losses.append(passed.result().metrics["loss:sum"])
        assert step.result().metrics["grad_norm:mean"] > 0
    return losses


def logprobs(client: Any, tokens: list[int] = TEXT) -> np.ndarray:
    out = client.forward([datum(tokens)], "cross_entropy").result()
    return out.loss_fn_outputs[0]["logprobs"].to_numpy()


def test_train_then_sample(service: Any) -> None:
    client = training(service)
    losses = train(client, 6)
    assert losses[-1] < losses[0] / 2
    sampler = client.save_weights_and_get_sampling_client()
    prompt = types.ModelInput.from_ints(TEXT[:5])
    params = types.SamplingParams(max_tokens=8, seed=3, temperature=1.0)
    sampled = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    first, second = sampled.sequences
    assert first.tokens != second.tokens
    assert len(first.tokens) == len(first.logprobs) == 8
    # the trainer gives the same log-probabilities, bit for bit
    trained = logprobs(client, TEXT[:5] + first.tokens)
    assert (trained[-8:] == np.float32(first.logprobs)).all()
    again = sampler.sample(prompt, num_samples=2, sampling_params=params).result()
    assert [s.tokens for s in again.sequences] == [first.tokens, second.tokens]
