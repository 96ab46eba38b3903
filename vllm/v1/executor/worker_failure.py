# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A rank that fails in a call to all workers, while the others wait for it."""

from __future__ import annotations

import logging
import os
import time
import weakref
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from vllm.distributed.device_communicators.shm_broadcast import MessageQueue

# How long one rank's answer is waited for before the others' are looked at.
PATIENCE_S = 1.0

# Answers that were taken before their turn.
_early: weakref.WeakKeyDictionary[MessageQueue, Any] = weakref.WeakKeyDictionary()


def with_rank(error: Exception, rank: int) -> Exception:
    """`error` as it is told to the executor, which keeps the message only."""
    return RuntimeError(f"{type(error).__name__} on worker rank {rank}: {error}")


def exit_unasked() -> None:
    """End this worker, which failed where no answer is expected of it.

    The executor notices that. A regular exit could wait for the other ranks, which wait
    for this one.
    """
    logging.shutdown()
    os._exit(1)


def dequeue(
    queue: MessageQueue, queues: Sequence[MessageQueue], timeout: float | None
) -> tuple[Any, Any]:
    """The answer in `queue`, or the failure of a rank after it in `queues`.

    A rank that raised leaves others waiting in a collective: their answers never come.

    Raises:
        TimeoutError: neither came within `timeout` seconds.

    """
    if queue in _early:
        return _early.pop(queue)
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    later = list(queues)[list(queues).index(queue) + 1 :]
    if not later:
        return queue.dequeue(timeout=timeout)
    while True:
        remaining = deadline - time.monotonic()
        try:
            return queue.dequeue(timeout=max(0.0, min(PATIENCE_S, remaining)))
        except TimeoutError:
            if remaining <= 0:
                raise
        for other in later:
            if other in _early:
                continue
            try:
                answer = other.dequeue(timeout=PATIENCE_S / 10)
            except TimeoutError:
                continue
            if answer[0].name == "FAILURE":
                return answer
            _early[other] = answer
