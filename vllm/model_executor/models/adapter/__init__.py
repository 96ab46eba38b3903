# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Modules that serve as they stand.

A module that was written for training is tried once on a few tokens, before it loads
its weights. What its forward does is seen: `seen` tells it, from a `trial`. In an
engine step `routing` then takes its attention calls to vLLM's paged cache, and gives it
vLLM's positions where it counts its tokens. No attribute of PyTorch, of a library or of
the module's code is replaced.
"""

from vllm.model_executor.models.adapter.adapter import Adapter
from vllm.model_executor.models.adapter.full_forward import full_forward
from vllm.model_executor.models.adapter.training import use_vllm_attention

__all__ = ["Adapter", "full_forward", "use_vllm_attention"]
