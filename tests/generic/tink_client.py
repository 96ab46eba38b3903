# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls of the real client that several tests make."""

from typing import Any

import numpy as np
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
    return service.create_lora_training_client(base_model=MODEL, **options).result()


def train(
    client: Any, steps: int, data: list[types.Datum] | None = None
) -> list[float]:
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
