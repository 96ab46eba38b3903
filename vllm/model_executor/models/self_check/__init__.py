# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The check of a registered model when its engine starts.

The model reads a short prompt twice: in pieces, through the engine's KV cache, and at
once, as its trainer's forward does. Both have to agree, up to rounding. A layer that
reads other tokens and keeps no state for it, or a position that is not vLLM's, is found
here and not in an answer.
"""

from .check import self_check

__all__ = ["self_check"]
