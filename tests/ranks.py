# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Run a function on every rank of a small process group of vLLM's.

On a machine with GPUs each rank has one, and the default device is that.
"""

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import fork_server  # noqa: F401  # what ranks find imported
import torch

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.parallel_context import ParallelContext
from vllm.platforms import current_platform


def run_ranks(
    function: Callable[[ParallelContext], None],
    tmp_path: Path,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
    data_parallel_size: int = 1,
    enable_expert_parallel: bool = False,
) -> None:
    """Call `function(parallel_context)` in a process of its own for every rank.

    Each process sets vLLM up as a training script under torchrun does. Raises what
    the first rank to fail raised. `function` is at module level.
    """
    os.environ["VLLM_DIST_IDENT"] = tmp_path.name  # of the CPU's shared memory
    options = {
        "tensor_parallel_size": tensor_parallel_size,
        "pipeline_parallel_size": pipeline_parallel_size,
        "data_parallel_size": data_parallel_size,
        "enable_expert_parallel": enable_expert_parallel,
    }
    # A device is better set up in a process that has imported nothing yet.
    method = "forkserver" if current_platform.is_cpu() else "spawn"
    torch.multiprocessing.start_processes(
        _run_rank,
        args=(dict(os.environ), function, f"file://{tmp_path}/store", options),
        nprocs=tensor_parallel_size * pipeline_parallel_size * data_parallel_size,
        start_method=method,
    )


def _run_rank(
    rank: int,
    environment: dict[str, str],
    function: Callable[[ParallelContext], None],
    init_method: str,
    options: dict[str, Any],
) -> None:
    os.environ |= environment | {"RANK": str(rank)}
    parallel_config = ParallelConfig(
        distributed_executor_backend="external_launcher", **options
    )
    config = VllmConfig(parallel_config=parallel_config)
    backend = "gloo"
    if current_platform.is_cuda_alike():
        torch.cuda.set_device(rank)
        torch.set_default_device("cuda")
        backend = "nccl"
    with set_current_vllm_config(config):
        init_distributed_environment(
            parallel_config.world_size, rank, init_method, rank, backend
        )
        ensure_model_parallel_initialized(
            options["tensor_parallel_size"], options["pipeline_parallel_size"]
        )
        function(ParallelContext.from_config(parallel_config))
    cleanup_dist_env_and_memory()
