# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's process groups in a program that trains."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    init_distributed_environment,
    initialize_model_parallel,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.platforms import current_platform


@contextmanager
def tensor_parallel_group() -> Iterator[ParallelContext]:
    """Set up vLLM's process groups in a program that torchrun started.

    All processes form one tensor-parallel group. Inside the context, vLLM's layers can
    be built, and the current CUDA device is the one of this rank.

    Raises:
        RuntimeError: The program was not started by torchrun.

    """
    try:
        rank, local_rank, size = (
            int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE")
        )
    except KeyError as error:
        raise RuntimeError(
            f"The environment variable {error} is not set. Start the program with "
            "`torchrun --nproc-per-node N program.py`."
        ) from None
    # The name of the CPU's shared memory: the same on all ranks of this run, and
    # different from that of any other run on this host.
    os.environ.setdefault("VLLM_DIST_IDENT", f"torchrun-{os.environ['MASTER_PORT']}")
    backend = "gloo"
    if current_platform.is_cuda_alike():
        torch.cuda.set_device(local_rank)
        backend = "nccl"
    parallel_config = ParallelConfig(
        tensor_parallel_size=size, distributed_executor_backend="external_launcher"
    )
    with set_current_vllm_config(VllmConfig(parallel_config=parallel_config)):
        init_distributed_environment(size, rank, "env://", local_rank, backend)
        initialize_model_parallel(size)
        try:
            yield ParallelContext.from_config(parallel_config)
        finally:
            cleanup_dist_env_and_memory()
