# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rollouts for reinforcement learning, by vLLM, of the model that trains."""

from vllm_generic.rollout.ahead import answered_ahead
from vllm_generic.rollout.batch import Sample, collate
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.episodes import Episode, Turn
from vllm_generic.rollout.module import VLLMModule
from vllm_generic.rollout.prompts import PromptDataset
from vllm_generic.rollout.rewards import score

__all__ = [
    "Episode",
    "PromptDataset",
    "RolloutConfig",
    "Sample",
    "Turn",
    "VLLMModule",
    "answered_ahead",
    "collate",
    "score",
]
