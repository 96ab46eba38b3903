# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The values of earlier tokens, for layers beside attention that read them."""

from vllm.model_executor.layers.previous_tokens.layer import PreviousTokens

__all__ = ["PreviousTokens"]
