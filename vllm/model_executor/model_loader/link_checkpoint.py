# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forwards to `vllm.entrypoints.link_checkpoint`, where the command is now."""

from vllm.entrypoints.link_checkpoint import link_checkpoint, main

__all__ = ["link_checkpoint", "main"]

if __name__ == "__main__":
    main()
