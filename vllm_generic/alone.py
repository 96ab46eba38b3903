# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM's process groups in a process that is the only rank."""

import tempfile

from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import init_distributed_environment, initialize_model_parallel


def make_groups_of_one(vllm_config: VllmConfig, backend: str = "gloo") -> None:
    """Initialize vLLM's groups, each with this process alone.

    Args:
        vllm_config: The config that is current while they are made.
        backend: Of torch.distributed: "gloo" or "nccl".

    """
    with (
        tempfile.TemporaryDirectory(prefix="vllm-groups-") as folder,
        set_current_vllm_config(vllm_config),
    ):
        init_distributed_environment(1, 0, f"file://{folder}/store", 0, backend)
        initialize_model_parallel()
