# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forwards to `vllm.training.batch_invariance`, where its functions are now."""

from vllm.training.batch_invariance import batch_invariant, token_log_probs

__all__ = ["batch_invariant", "token_log_probs"]
