# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Forgets the cached prefixes of an adapter whose weights were replaced in place.

The key of a cached block has the adapter's name and path, which stay the same. This
adds the number of replacements, so that no later request finds a block of the earlier
weights.
"""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from vllm.lora.request import LoRARequest
    from vllm.v1.core.sched.scheduler import Scheduler

# By name, which is an adapter's identity in a cache's keys. Engines that share a
# process share the numbers, which costs a cache hit at most.
_replacements: Counter[str] = Counter()


def forget_cached_prefixes(request: LoRARequest, scheduler: Scheduler) -> None:
    """Keep waiting requests from blocks that were cached with the earlier weights."""
    if not request.load_inplace:
        return
    _replacements[request.lora_name] += 1
    for waiting in scheduler.requests.values():
        if waiting.lora_request == request and waiting.num_computed_tokens == 0:
            waiting.block_hashes.clear()
            waiting.update_block_hashes()


def replacement_keys(request: LoRARequest) -> list[tuple[str, str, str]]:
    """What a block's key has beside the adapter's name and path."""
    number = _replacements[request.lora_name]
    return [("lora_replaced", request.lora_name, str(number))] if number else []
