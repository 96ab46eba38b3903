# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A mixture of experts that trains and serves: the layer, and its routing."""

from vllm.model_executor.layers.trainable_experts.experts import TrainableExperts
from vllm.model_executor.layers.trainable_experts.routing import (
    recorded_routing,
    replayed_routing,
    top_experts,
)

__all__ = [
    "TrainableExperts",
    "recorded_routing",
    "replayed_routing",
    "top_experts",
]
