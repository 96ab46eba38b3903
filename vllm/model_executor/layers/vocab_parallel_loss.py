# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forwards to `vllm.training.loss`, where the functions are now."""

from vllm.training.loss import (
    vocab_parallel_cross_entropy,
    vocab_parallel_logits,
    vocab_parallel_token_log_probs,
)

__all__ = [
    "vocab_parallel_cross_entropy",
    "vocab_parallel_logits",
    "vocab_parallel_token_log_probs",
]
