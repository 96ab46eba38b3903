# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What config.json says of scores and logits is not left out, unsaid."""

from types import SimpleNamespace

import pytest
from tiny_model import TinyModel
from torch import nn

from vllm import ModelRegistry
from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.models.callable_model.config_caps import check_caps


def check(module: nn.Module, runner: str = "generate", **config: float | None) -> None:
    text_config = SimpleNamespace(**config)
    model_config = SimpleNamespace(hf_text_config=text_config, runner_type=runner)
    check_caps("M", module, model_config)


class Capped(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        for layer in self.layers:
            layer.attention = TrainableAttention(2, 32, logits_soft_cap=50.0)

    def compute_logits(self, hidden_states):
        return 30 * (self.lm_head(hidden_states) / 30).tanh()


def test_what_is_applied_is_taken() -> None:
    check(TinyModel(), attn_logit_softcapping=None, logit_scale=1.0)
    check(Capped(), attn_logit_softcapping=50.0, final_logit_softcapping=30.0)
    check(TinyModel(), runner="pooling", final_logit_softcapping=30.0)
    check(nn.Linear(2, 2), attn_logit_softcapping=50.0)  # a stage without attention


@pytest.mark.parametrize(
    "key", ["final_logit_softcapping", "logits_scaling", "logit_scale"]
)
def test_logits_of_a_head_alone_are_refused(key: str) -> None:
    with pytest.raises(ValueError, match=f"{key} 8.0, but TinyModel returns hidden"):
        check(TinyModel(), **{key: 8.0})


@pytest.mark.engine
def test_attention_without_the_cap_is_refused(start) -> None:
    ModelRegistry.register_model("TinyModel", lambda config, context: TinyModel())
    with pytest.raises(ValueError, match="Build them with logits_soft_cap=50.0"):
        start(hf_overrides={"attn_logit_softcapping": 50.0})
    ModelRegistry.register_model("TinyModel", lambda config, context: Capped())
    start(hf_overrides={"attn_logit_softcapping": 50.0})
