# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Copies a trainer's weights into running engines, to each rank its own part.

`WeightSync` is the trainer's side. The engine's side is a backend of vLLM's weight
transfer, which every registered callable has unless another one is asked for.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.distributed.weight_sync.sync import WeightSync

__all__ = ["WeightSync"]


def __getattr__(name: str) -> Any:
    if name == "WeightSync":  # imported late: an engine's ranks do not need it
        from vllm.distributed.weight_sync.sync import WeightSync

        return WeightSync
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
