# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What will happen when vLLM serves a registered model, told before an engine starts.

python -m vllm_generic.doctor MODEL_DIR|module:factory ...
"""

from vllm_generic.doctor.examine import examine
from vllm_generic.doctor.report import Finding, Report

__all__ = ["Finding", "Report", "examine"]
