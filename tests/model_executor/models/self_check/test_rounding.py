# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""How much the self-check takes for rounding."""

import copy

import pytest
import torch
from tiny_model import VOCAB, TinyModel
from torch import nn

from vllm.model_executor.models.self_check.rounding import (
    relative_error,
    rounded_otherwise,
)

CPU = torch.device("cpu")
IDS = torch.arange(40) % VOCAB


def logprobs(model: TinyModel) -> torch.Tensor:
    with torch.no_grad():
        hidden_states = model(IDS, torch.arange(len(IDS)))
        return model.lm_head(hidden_states).double().log_softmax(-1)


@pytest.mark.parametrize(
    "narrow, wide", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)]
)
def test_it_is_about_the_distance_to_the_wider_dtype(narrow, wide):
    generator = torch.Generator().manual_seed(0)
    model = TinyModel().to(narrow)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.2, generator=generator)
    exact = logprobs(copy.deepcopy(model).to(wide))
    distance = (logprobs(model) - exact).abs().max()
    with rounded_otherwise(model, relative_error(narrow, CPU), seed=1):
        moved = (logprobs(model) - exact).abs().max()
    assert distance / 4 < moved < distance * 16


def test_equal_outputs_are_changed_equally_and_hooks_go():
    """Ranks that hold one tensor must hold one tensor afterwards."""
    first, second = nn.Linear(4, 4), nn.Linear(4, 4)
    second.load_state_dict(first.state_dict())
    x = torch.randn(3, 4)
    changed = []
    for layer in (first, second):
        with rounded_otherwise(layer, 0.1, seed=3):
            changed.append(layer(x))
    assert changed[0].equal(changed[1])
    assert not changed[0].equal(first(x))
    assert first(x).equal(second(x))
