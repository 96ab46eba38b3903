# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What `VERL_USE_EXTERNAL_MODULES` names: models to serve, and CPUs as verl's platform.

verl imports it in each of its processes. verl 0.9.1 knows no platform of CPUs; of this
module, a user with GPUs needs the registrations of models alone.
"""

from types import ModuleType
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, LlamaConfig, LlamaForCausalLM
from verl.plugin.platform.platform_cuda import PlatformCUDA
from verl.plugin.platform.platform_manager import PlatformRegistry

from vllm import ModelRegistry
from vllm.model_executor.layers import TrainableFlashAttention


@PlatformRegistry.register(platform="cpu")
class PlatformCPU(PlatformCUDA):
    """Weights go through shared memory; memory needs no cache to be emptied."""

    device_name = "cpu"
    vendor_name = "cpu"

    @property
    def device_module(self) -> ModuleType:
        module = ModuleType("cpu_of_verl")
        module.synchronize = torch.cpu.synchronize
        module.empty_cache = lambda: None
        return module

    def is_available(self) -> bool:
        return True

    def is_ipc_supported(self) -> bool:
        return False


class PlainConfig(LlamaConfig):
    """Sizes, under a name that `AutoConfig` finds; verl reads every config by it."""

    model_type = "plain_gpt"


class PlainGPT(nn.Module):
    """A model of one's own: nothing of it is called `model`, and it has a buffer."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        size = config.hidden_size
        self.table = nn.Embedding(config.vocab_size, size)
        self.attentions = nn.ModuleList(
            TrainableFlashAttention(size, config.num_attention_heads, rope_theta=1e4)
            for _ in range(config.num_hidden_layers)
        )
        self.lm_head = nn.Linear(size, config.vocab_size, bias=False)
        self.register_buffer("scale", torch.ones(1))

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.table(input_ids)
        for attention in self.attentions:
            x = x + attention(x, positions)
        return x * self.scale


MODELS = {"LlamaForCausalLM": LlamaForCausalLM, "PlainGPT": PlainGPT}


def build(architecture: str, config: Any) -> nn.Module:
    return MODELS[architecture](config)


def logits_of(module: nn.Module, token_ids: list[int]) -> torch.Tensor:
    """`[tokens, vocab]`, by the module's own code."""
    ids = torch.tensor([token_ids])
    with torch.no_grad():
        if isinstance(module, LlamaForCausalLM):
            return module(ids).logits[0]
        return module.lm_head(module(ids, torch.arange(len(token_ids))))[0]


AutoConfig.register("plain_gpt", PlainConfig)
for name in MODELS:
    ModelRegistry.register_model(
        name,
        lambda vllm_config, parallel_context, name=name: build(
            name, vllm_config.model_config.hf_config
        ),
    )
