# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""No process outlives the one it works for, and none leaves sockets behind.

A process can be killed at any moment, so nothing depends on what it does last: the
processes that are left notice that it is gone.

Only the program handles Ctrl-C. A terminal sends it to all processes, but an engine's
processes block it. If the program ends, it ends them in order.
"""

from __future__ import annotations

import gc
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from functools import partial
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from multiprocessing.util import Finalize, get_temp_dir
from typing import TYPE_CHECKING

from vllm import envs
from vllm.utils.system_utils import kill_process_tree

if TYPE_CHECKING:
    import zmq


def socket_directory() -> str:
    """Where this engine's processes put their sockets and rendezvous files.

    `VLLM_RPC_BASE_PATH` if it is set, else the directory that multiprocessing shares
    between a process and its children and removes with the former.
    """
    # The tracker frees dead processes' shared memory; start it before forking, because
    # a child that starts its own tracker may be killed together with it.
    resource_tracker.ensure_running()
    return os.environ.get("VLLM_RPC_BASE_PATH") or get_temp_dir()


def rendezvous_file(name: str) -> str:
    """The path of a file that is removed when this process ends."""
    path = os.path.join(socket_directory(), name)
    Finalize(None, _remove, (path,), exitpriority=0)
    return path


def remove_with(socket: zmq.Socket, address: str) -> None:
    """Remove the file of `socket`, bound to `address`, with the socket or this process.

    ZeroMQ does not remove it.
    """
    if address.startswith("ipc://"):
        path = address.removeprefix("ipc://")
        Finalize(socket, _remove, (path,), exitpriority=0)


# In a worker, set once its executor shuts down, or is gone.
_executor_gone = threading.Event()


def _remove(path: str) -> None:
    with suppress(FileNotFoundError):  # its directory has been removed
        os.unlink(path)


def exit_on_interrupt() -> None:
    """Let Ctrl-C end this program at once, until another handler is installed.

    An event loop would cancel its task only at the next `await`, which is minutes away
    while an engine starts. An interrupt is not an error that needs a traceback.
    """
    signal.signal(signal.SIGINT, lambda *_: sys.exit(128 + signal.SIGINT))


@contextmanager
def interruptible() -> Iterator[None]:
    """Let Ctrl-C raise `KeyboardInterrupt` in the block, also under asyncio.

    asyncio would only cancel the task at its next `await`, after this block.
    """
    handler = signal.getsignal(signal.SIGINT)
    of_asyncio = isinstance(handler, partial) and (
        handler.func.__module__ == "asyncio.runners"
    )
    if not of_asyncio or threading.current_thread() is not threading.main_thread():
        yield
        return
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def start(process: BaseProcess) -> None:
    """Start `process` without Ctrl-C, even while it imports what it is to run."""
    # Else process.start() starts the tracker, which unblocks the signal again.
    resource_tracker.ensure_running()
    before = _block_interrupts()
    try:
        process.start()
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _block_interrupts() -> set[int | signal.Signals]:
    """Block Ctrl-C for this thread and what it starts; returns the previous mask."""
    return signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


def stop_starting() -> None:
    """End an engine core that is being constructed, as its parent asks.

    There is no request to finish, and the parent waits for it to end.
    """
    if multiprocessing.parent_process() is not None:
        raise SystemExit


def exit_with_parent() -> None:
    """Kill this process and its children once the process that started it is gone.

    What is left of the parent's sockets is removed.
    """
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    _prepare_child()

    def exit_now() -> None:
        parent.join()
        shutil.rmtree(get_temp_dir(), ignore_errors=True)
        kill_process_tree(os.getpid())

    _in_background(exit_now)


def exit_with_executor(death_pipe: Connection, ready_pipe: Connection) -> None:
    """End this worker when `death_pipe` closes: its executor shuts down, or is gone.

    A worker that is still starting ends at once, because it could only delay others.
    A worker that has reported on `ready_pipe`, and closed it, gets time to end by
    itself; one that is stuck in a collective ends when this time is over.
    """
    _prepare_child()

    def exit_now() -> None:
        wait([death_pipe])
        _executor_gone.set()
        if ready_pipe.closed:
            time.sleep(envs.VLLM_WORKER_SHUTDOWN_TIMEOUT_SECONDS)
        os._exit(1)

    _in_background(exit_now)


def exit_without_executor() -> None:
    """End this worker if its executor shuts down, or is gone, else return.

    A worker whose peers have ended fails in the next collective, and nobody is left to
    whom that error would say something.
    """
    if _executor_gone.is_set():
        os._exit(1)


def _prepare_child() -> None:
    _block_interrupts()  # a fork server's child does not inherit it
    # Without this, the interpreter spends seconds on garbage collection at its end.
    Finalize(None, gc.freeze, exitpriority=-1000)  # after all others


def _in_background(target: Callable[[], None]) -> None:
    threading.Thread(target=target, daemon=True, name="ProcessLifetime").start()
