# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""No prefix caching beside states that are kept for running requests only."""

from vllm.config import VllmConfig
from vllm.logger import init_logger
from vllm.v1.kv_cache_interface import KVCacheSpec, MambaSpec

logger = init_logger(__name__)


def disable_prefix_caching_of_states(
    vllm_config: VllmConfig, kv_cache_specs: list[dict[str, KVCacheSpec]]
) -> None:
    """Turn prefix caching off if the state of a layer is not cached with a prefix.

    Args:
        vllm_config: Of the engine core, before it builds its scheduler.
        kv_cache_specs: Of each worker, by layer.

    """
    uncached = sorted(
        name
        for specs in kv_cache_specs
        for name, spec in specs.items()
        if isinstance(spec, MambaSpec) and spec.mamba_cache_mode == "none"
    )
    if uncached and vllm_config.cache_config.enable_prefix_caching:
        logger.info("Disabling prefix caching: %s has no cached states.", uncached[0])
        vllm_config.cache_config.enable_prefix_caching = False
