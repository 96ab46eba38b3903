# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What is built on generic models and is no part of vLLM: rollouts, a LoRA service."""
