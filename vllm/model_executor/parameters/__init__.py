# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A served module's tensors: how ranks divide them, and how weights reach them."""
