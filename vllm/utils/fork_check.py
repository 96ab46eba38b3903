# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a process that is forked now could use CUDA."""

import os

import torch


def forked_process_lacks_cuda() -> bool:
    """Whether PyTorch would let a forked process use no CUDA.

    That is so once a program has initialized CUDA, or has only asked for an accelerator
    without NVML, as importing Transformers before vLLM does. Then
    `torch.cuda.is_initialized()` is false all the same, and only a forked process can
    tell: this function makes one, which ends at once.
    """
    if not torch.backends.cuda.is_built():
        return False
    child = os.fork()
    if child == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(child, 0)
    return status != 0
