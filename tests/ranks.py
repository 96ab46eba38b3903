# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Run a function on every rank of a small process group of vLLM's, over gloo."""

import os
from collections.abc import Callable
from pathlib import Path

import torch

from vllm.config import ParallelConfig, VllmConfig, set_current_vllm_config
from vllm.distributed import (
    cleanup_dist_env_and_memory,
    ensure_model_parallel_initialized,
    init_distributed_environment,
)
from vllm.model_executor.parallel_context import ParallelContext


def run_ranks(
    function: Callable[[ParallelContext], None],
    tmp_path: Path,
    tensor_parallel_size: int = 1,
    pipeline_parallel_size: int = 1,
) -> None:
    """Call `function(parallel_context)` in one spawned process for every rank.

    Raises what the first rank to fail raised. `function` is at module level.
    """
    sizes = (tensor_parallel_size, pipeline_parallel_size)
    os.environ["VLLM_DIST_IDENT"] = tmp_path.name  # of the CPU's shared memory
    torch.multiprocessing.spawn(
        _run_rank,
        args=(function, f"file://{tmp_path}/store", sizes),
        nprocs=tensor_parallel_size * pipeline_parallel_size,
    )


def _run_rank(
    rank: int,
    function: Callable[[ParallelContext], None],
    init_method: str,
    sizes: tuple[int, int],
) -> None:
    parallel_config = ParallelConfig(
        tensor_parallel_size=sizes[0], pipeline_parallel_size=sizes[1]
    )
    config = VllmConfig(parallel_config=parallel_config)
    with set_current_vllm_config(config):
        init_distributed_environment(
            sizes[0] * sizes[1], rank, init_method, rank, backend="gloo"
        )
        ensure_model_parallel_initialized(*sizes)
        function(ParallelContext.from_config(parallel_config))
    cleanup_dist_env_and_memory()
