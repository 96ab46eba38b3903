# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Runs an action on the trainer's first rank, which has the engine, for all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch.distributed as dist

T = TypeVar("T")


def is_first_rank() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


def on_first_rank(action: Callable[[], T]) -> T:
    """What `action` returns or raises on the first rank, on every rank.

    Every rank calls it. Without a process group it is the plain call.
    """
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return action()
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    cause: BaseException | None = None
    if is_first_rank():
        try:
            outcome = [(action(), None)]
        except BaseException as error:
            cause = error
            outcome = [(None, f"{type(error).__name__}: {error}")]
    dist.broadcast_object_list(outcome, src=0)
    result, failure = outcome[0]
    if cause is not None:
        raise cause
    if failure is not None:
        raise RuntimeError(f"The trainer's first rank has failed. {failure}")
    return result  # type: ignore[return-value]
