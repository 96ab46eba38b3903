# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is a draft head of a callable's, and what one may return."""

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from vllm.model_executor.models.callable_model import draft_head
from vllm.model_executor.models.callable_model.checks import forward_keywords


def config(method: str = "eagle", stages: int = 1) -> Any:
    target = SimpleNamespace(architectures=["Target"])
    own = SimpleNamespace(architectures=["EagleOwn"], quantization=None)
    speculation = SimpleNamespace(
        draft_model_config=own,
        method=method,
        use_eagle=lambda: method in ("eagle", "eagle3", "mtp"),
    )
    return SimpleNamespace(
        model_config=target,
        speculative_config=speculation,
        parallel_config=SimpleNamespace(pipeline_parallel_size=stages),
        load_config=None,
        compilation_config=object(),
        quant_config="of the target",
    )


def test_a_head_has_its_own_config_and_the_table_of_layers(monkeypatch):
    monkeypatch.setattr(draft_head, "get_draft_quant_config", lambda config: None)
    given = config()
    found = draft_head.config_of("EagleOwn", given)
    assert found.model_config is given.speculative_config.draft_model_config
    assert found.quant_config is None
    assert found.compilation_config is given.compilation_config
    assert given.model_config.architectures == ["Target"]
    # The target itself, and a draft that needs no hidden states.
    assert draft_head.config_of("Target", given) is None
    assert draft_head.config_of("EagleOwn", config("draft_model")) is None
    given.model_config = given.speculative_config.draft_model_config
    assert draft_head.config_of("EagleOwn", given) is None


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (config("eagle3"), "'eagle3' works with vLLM's own classes only"),
        (config("mtp"), "'mtp' works with .* by method \"eagle\""),
        (config(stages=2), "pipeline_parallel_size=2; expected 1"),
    ],
)
def test_what_no_head_can_do_is_refused(given, message):
    with pytest.raises(ValueError, match=f"^EagleOwn: .*{message}"):
        draft_head.config_of("EagleOwn", given)


def test_one_result_counts_twice():
    one, other = torch.zeros(3, 8), torch.ones(3, 8)
    assert draft_head.results("Own", one, 3) == (one, one)
    assert draft_head.results("Own", (one, other), 3) == (one, other)


@pytest.mark.parametrize(
    "found",
    [
        torch.zeros(1, 3, 8),
        torch.zeros(2, 8),
        (torch.zeros(3, 8),),
        (torch.zeros(3, 8), None),
        None,
    ],
)
def test_other_results_are_refused(found):
    with pytest.raises(ValueError, match="^Own: the draft head returned .* 3 tokens"):
        draft_head.results("Own", found, 3)


class WithoutHiddenStates(nn.Module):
    def forward(self, input_ids, positions):
        return input_ids


def test_a_head_has_to_take_hidden_states():
    with pytest.raises(TypeError, match="token ids and positions and hidden_states"):
        forward_keywords("Own", WithoutHiddenStates(), (draft_head.HIDDEN,))
