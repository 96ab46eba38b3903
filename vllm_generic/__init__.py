# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Built on generic models, and no part of vLLM: rollouts, a LoRA service, a doctor."""
