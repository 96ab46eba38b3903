# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The Megatron model that trains, in the service's engine.

In the exact mode trainer and sampler have to be one module: Megatron's layers round
otherwise than Transformers', which the engine serves by default.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch

from vllm.lora.adapter import Adapter
from vllm.model_executor.model_loader.full_checkpoint import load_full_checkpoint
from vllm.model_executor.parallel_context import ParallelContext
from vllm_generic.tink.backends import packed_model
from vllm_generic.tink.backends.megatron_names import Names
from vllm_generic.tink.backends.megatron_trainer import MegatronModel


class ServedMegatron(MegatronModel):
    """Loads a checkpoint, and takes adapters, of Hugging Face's names."""

    def __init__(self, config: Any, context: ParallelContext) -> None:
        super().__init__(config, context)
        self._context = context

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        found = dict(weights)
        # The head is a layer of its own also where it shares the embedding's weight.
        found.setdefault("lm_head.weight", found["model.embed_tokens.weight"])
        named = Names(self.config).tensors(found)
        return load_full_checkpoint(self, named.items(), self._context)

    def read_adapter(self, adapter: Adapter) -> Adapter:
        return Names(self.config).from_hf(adapter, may_stack=True)


def build(vllm_config: Any, parallel_context: ParallelContext) -> ServedMegatron:
    """The callable that the service registers with vLLM."""
    return ServedMegatron(vllm_config.model_config.hf_config, parallel_context)


def register(folder: Path) -> None:
    """Let vLLM serve the model of a directory by Megatron, in all its processes."""
    packed_model.register(folder, f"{__name__}:build")
