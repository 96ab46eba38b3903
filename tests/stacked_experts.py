# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A model with experts of Transformers, whose weights are one parameter for all."""

from typing import Any

import torch
from tiny_model import HIDDEN, TinyModel, trained_model
from torch import nn
from transformers import GptOssConfig, MixtralConfig
from transformers.models.gpt_oss.modeling_gpt_oss import GptOssMLP
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

SIZES: dict[str, Any] = {
    "hidden_size": HIDDEN,
    "intermediate_size": 48,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "experts_implementation": "eager",
}


def mixtral_block() -> nn.Module:
    return MixtralSparseMoeBlock(MixtralConfig(**SIZES))


def square_block() -> nn.Module:
    """Both stacks have inputs of one width, so that shapes do not tell them apart."""
    return MixtralSparseMoeBlock(MixtralConfig(**SIZES | {"intermediate_size": HIDDEN}))


def gpt_oss_block() -> nn.Module:
    """Its stacks are `[experts, inputs, outputs]`, and it returns a tuple."""
    return GptOssMLP(GptOssConfig(**SIZES))


class Model(TinyModel):
    def __init__(self, block: nn.Module) -> None:
        super().__init__()
        self.load_state_dict(trained_model().state_dict(), strict=False)
        self.mlp = block
        with torch.no_grad():
            for name, parameter in self.named_parameters():
                parameter.mul_(0.3)
                if name.startswith("mlp."):
                    parameter.normal_(std=0.2)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = super().forward(input_ids, positions)
        out = self.mlp(x.unsqueeze(0))
        return x + (out[0] if isinstance(out, tuple) else out).view(x.shape)
