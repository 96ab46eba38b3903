# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rollouts for reinforcement learning, by vLLM, of the model that trains."""

from vllm_generic.rollout.batch import Sample, collate
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.module import VLLMModule
from vllm_generic.rollout.prompts import PromptDataset

__all__ = ["PromptDataset", "RolloutConfig", "Sample", "VLLMModule", "collate"]
