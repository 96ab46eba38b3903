# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Plans: a plain single-device module, made parallel as its plans say."""

from vllm.model_executor.models.plans.apply import apply_plans
from vllm.model_executor.models.plans.styles import STYLES as STYLES
from vllm.model_executor.models.plans.styles import Style

__all__ = ["Style", "apply_plans"]
