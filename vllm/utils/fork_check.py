# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Whether a process that is forked now could use CUDA."""

import os

import torch

from vllm.platforms import current_platform


def forked_process_lacks_cuda() -> bool:
    """Whether PyTorch refuses CUDA in a process that is forked from this one.

    It does so after CUDA was initialized here, and also after a program has only asked
    which accelerator there is. Importing Transformers before vLLM asks that. In the
    second case `torch.cuda.is_initialized()` is false, and only a forked process can
    tell. So this function forks one, which ends at once. On a CPU nobody needs CUDA.
    """
    if current_platform.is_cpu() or not torch.backends.cuda.is_built():
        return False
    child = os.fork()
    if child == 0:
        os._exit(int(torch.cuda._is_in_bad_fork()))
    _, status = os.waitpid(child, 0)
    return status != 0
