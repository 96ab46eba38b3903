# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Weight sync as the backend of weight transfer that registered callables have."""

from __future__ import annotations

from vllm.config import VllmConfig
from vllm.config.weight_transfer import WeightTransferConfig
from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

BACKEND = "weight_sync"

WeightTransferEngineFactory.register_engine(
    BACKEND, "vllm.distributed.weight_transfer.weight_sync_engine", "WeightSyncEngine"
)


def use_weight_sync(vllm_config: VllmConfig) -> None:
    """Give a worker's config this backend, unless another one was asked for."""
    if vllm_config.weight_transfer_config is None:
        vllm_config.weight_transfer_config = WeightTransferConfig(backend=BACKEND)
