# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forwards to the modules of `vllm.training`, where all of this is now."""

from vllm.training.checkpoints import TrainingState
from vllm.training.clipping import clip_grad_norm_
from vllm.training.groups import tensor_parallel_group
from vllm.training.initial_values import initialize_parameters

__all__ = [
    "TrainingState",
    "clip_grad_norm_",
    "initialize_parameters",
    "tensor_parallel_group",
]
