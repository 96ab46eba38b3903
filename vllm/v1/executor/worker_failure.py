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

# Wait this long for one rank's answer before looking at the other ranks' answers.
PATIENCE_S = 1.0

# Answers that were taken before their turn.
_early: weakref.WeakKeyDictionary[MessageQueue, Any] = weakref.WeakKeyDictionary()
# How many answers are still to come to calls that have ended with an error.
_late: weakref.WeakKeyDictionary[MessageQueue, int] = weakref.WeakKeyDictionary()


def with_rank(error: Exception, rank: int) -> Exception:
    """`error` with the rank in its message, because the executor keeps only that."""
    return RuntimeError(f"{type(error).__name__} on worker rank {rank}: {error}")


def exit_unasked() -> None:
    """End this worker, which failed in a call whose answer nobody waits for.

    The executor notices the exit. It is immediate, because a regular exit could wait
    for other ranks, which wait for this one.
    """
    logging.shutdown()
    os._exit(1)


def dequeue(
    queue: MessageQueue, queues: Sequence[MessageQueue], timeout: float | None
) -> tuple[Any, Any]:
    """The answer in `queue`, or the failure of a rank after it in `queues`.

    A rank that raised leaves others waiting in a collective: their answers may never
    come. If they do, they belong to this call, and the next one skips them.

    Raises:
        TimeoutError: neither came within `timeout` seconds.

    """
    remaining = list(queues)[list(queues).index(queue) :]
    try:
        source, answer = _first_answer(remaining, timeout)
    except TimeoutError:
        _give_up(remaining)
        raise
    if answer[0].name == "FAILURE":
        _give_up([other for other in remaining if other is not source])
    return answer


def _first_answer(
    queues: list[MessageQueue], timeout: float | None
) -> tuple[MessageQueue, tuple[Any, Any]]:
    """That of the first queue, or a failure in another, and where it came."""
    queue, *later = queues
    if queue in _early:
        return queue, _early.pop(queue)
    if not later:
        return queue, _next_answer(queue, timeout)
    deadline = float("inf") if timeout is None else time.monotonic() + timeout
    while True:
        remaining = deadline - time.monotonic()
        try:
            return queue, _next_answer(queue, max(0.0, min(PATIENCE_S, remaining)))
        except TimeoutError:
            if remaining <= 0:
                raise
        for other in later:
            if other in _early:
                continue
            try:
                answer = _next_answer(other, PATIENCE_S / 10)
            except TimeoutError:
                continue
            if answer[0].name == "FAILURE":
                return other, answer
            _early[other] = answer


def _next_answer(queue: MessageQueue, timeout: float | None) -> tuple[Any, Any]:
    """The next in `queue` that belongs to a call which still waits for it."""
    while _late.get(queue):
        queue.dequeue(timeout=timeout)
        _late[queue] -= 1
    return queue.dequeue(timeout=timeout)


def _give_up(queues: list[MessageQueue]) -> None:
    """End a call: later answers to it in `queues` will be skipped."""
    for queue in queues:
        if queue in _early:
            del _early[queue]
        else:
            _late[queue] = _late.get(queue, 0) + 1
