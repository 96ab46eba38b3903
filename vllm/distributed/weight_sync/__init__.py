# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A trainer's weights into a running engine, each rank's own part of them.

`WeightSync` is the trainer's side. The engine's side is a backend of vLLM's weight
transfer, which every registered callable has unless another one is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.distributed.weight_sync.sync import WeightSync

__all__ = ["WeightSync"]


def __getattr__(name: str) -> Any:
    if name == "WeightSync":  # an engine's ranks do without it, and what it imports
        from vllm.distributed.weight_sync.sync import WeightSync

        return WeightSync
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
