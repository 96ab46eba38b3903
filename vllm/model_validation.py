# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forwards to `vllm.validation`, where all of this is now."""

from vllm.validation.compare import Reference as Reference
from vllm.validation.compare import validate, validate_outputs
from vllm.validation.first_difference import OutputDifference, first_difference
from vllm.validation.report import LISTED as LISTED
from vllm.validation.report import RESOLUTION as RESOLUTION
from vllm.validation.report import (
    Check,
    Thresholds,
    TokenComparison,
    ValidationReport,
)

__all__ = [
    "Check",
    "OutputDifference",
    "Thresholds",
    "TokenComparison",
    "ValidationReport",
    "first_difference",
    "validate",
    "validate_outputs",
]
