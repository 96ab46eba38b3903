# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The time limit of a factory."""

from __future__ import annotations

import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

import vllm.envs as envs
from vllm.v1.engine import startup_failure

FACTORY_TIMEOUT = "VLLM_MODEL_FACTORY_TIMEOUT_S"


@contextmanager
def time_limit(task: str) -> Iterator[None]:
    """Fail if the block takes longer than `VLLM_MODEL_FACTORY_TIMEOUT_S`, if set.

    A worker reports where it hangs, and exits. In any other process the block itself
    raises at that place. Only the main thread can be made to do so: in other threads
    there is no limit.

    Args:
        task: What the block does, for the message.

    Raises:
        TimeoutError: The block took longer.

    """
    limit = envs.VLLM_MODEL_FACTORY_TIMEOUT_S
    in_main_thread = threading.current_thread() is threading.main_thread()
    # Not those of this function, of contextlib and of the caller.
    outside = len(traceback.extract_stack()) - 3

    def message(frame: FrameType | None) -> str:
        inside = traceback.format_list(traceback.extract_stack(frame)[outside:])
        return (
            f"{task} took longer than {limit:g} s ({FACTORY_TIMEOUT}) and was stopped "
            f"here:\n{''.join(inside).rstrip()}"
        )

    def stop_worker(thread: int) -> None:
        frame = sys._current_frames()[thread]
        startup_failure.exit_timed_out(TimeoutError(message(frame)))

    def stop_task(signum: int, frame: FrameType | None) -> None:
        raise TimeoutError(message(frame))

    if limit and startup_failure.is_worker():
        timer = threading.Timer(limit, stop_worker, (threading.get_ident(),))
        timer.daemon = True
        timer.start()
        try:
            yield
        finally:
            timer.cancel()
    elif limit and in_main_thread:
        previous = signal.signal(signal.SIGALRM, stop_task)
        signal.setitimer(signal.ITIMER_REAL, limit)
        try:
            yield
        finally:
            signal.setitimer(signal.ITIMER_REAL, 0)
            signal.signal(signal.SIGALRM, previous)
    else:
        yield
