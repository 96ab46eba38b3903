# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forwards to `vllm.model_executor.models.plans`, where all of this is now."""

from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.models.plans.patterns import STACKS as STACKS
from vllm.model_executor.models.plans.pipeline import HIDDEN_STATES as HIDDEN_STATES
from vllm.model_executor.models.plans.styles import STYLES as STYLES
from vllm.model_executor.models.plans.styles import Style

__all__ = ["Style", "apply_plans"]
