# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""No process outlives the one it works for, and none leaves sockets behind.

A process can be killed at any moment, so nothing depends on what it does last: whoever
is left notices that it is gone.
"""

from __future__ import annotations

import multiprocessing
import os
import shutil
import threading
import time
from collections.abc import Callable
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.util import get_temp_dir

from vllm import envs
from vllm.utils.system_utils import kill_process_tree


def socket_directory() -> str:
    """Where this engine's processes put their sockets and rendezvous files.

    `VLLM_RPC_BASE_PATH` if it is set, else the directory that multiprocessing shares
    between a process and its children and removes with the former.
    """
    # It removes the shared memory of the dead. Forked children would start their own,
    # which is killed with them.
    resource_tracker.ensure_running()
    return os.environ.get("VLLM_RPC_BASE_PATH") or get_temp_dir()


def exit_with_parent() -> None:
    """Kill this process and its children once the process that started it is gone.

    What is left of the parent's sockets is removed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return

    def exit_now() -> None:
        parent.join()
        shutil.rmtree(get_temp_dir(), ignore_errors=True)
        kill_process_tree(os.getpid())

    _in_background(exit_now)


def exit_with_executor(death_pipe: Connection, ready_pipe: Connection) -> None:
    """End this worker when `death_pipe` closes: its executor shuts down, or is gone.

    At once while it starts, when all it could do is to hold up the others. A worker
    that has reported on `ready_pipe`, and closed it, has time to end by itself, unless
    it is stuck in a collective.
    """

    def exit_now() -> None:
        wait([death_pipe])
        if ready_pipe.closed:
            time.sleep(envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS)
        os._exit(1)

    _in_background(exit_now)


def _in_background(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True, name="ProcessLifetime").start()
