# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Attention that trains and serves: one module, one state dict.

In an engine step these layers are vLLM's paged `Attention`. Anywhere else they are
differentiable attention over packed variable-length or padded batches.
"""

from vllm.model_executor.layers.trainable_attention.attention import (
    TrainableAttention,
)
from vllm.model_executor.layers.trainable_attention.self_attention import (
    TrainableFlashAttention,
)
from vllm.v1.attention.training.sequences import packed_sequences

__all__ = ["TrainableAttention", "TrainableFlashAttention", "packed_sequences"]
