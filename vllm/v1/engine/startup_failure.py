# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Why an engine did not start, told to the process that started it.

A worker reports to its executor over its ready pipe: what it does, and what went wrong.
An engine core reports to its front-end over the handshake socket, in the place of its
READY message. A process that dies without a report is reported by the one that waits.
"""

from __future__ import annotations

import os
import signal
import sys
import time
import traceback
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import TYPE_CHECKING, Any, cast

import msgspec

if TYPE_CHECKING:
    import zmq

    from vllm.v1.executor.multiproc_executor import UnreadyWorkerProcHandle

FAILED = "FAILED"
STAGE = "STAGE"
# Wait this long for the report that an engine core sent before it exited.
DRAIN_MS = 200
# Wait briefly after a failure: another rank may still report the real cause. Wait for
# longer after a time limit: ranks that wait for each other reach theirs one by one.
GATHER_S = 1.0
GATHER_TIMEOUTS_S = 5.0
# How long to wait for the exit code of a process that has closed its pipe.
REAP_S = 5.0


class StartupError(RuntimeError):
    """What another process reported: its root cause, then where its traceback is.

    Args:
        cause: The type, message and notes of the other process's exception.

    """

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"{cause}\n(The engine could not start; the traceback of the process that "
            "failed is in the log above.)"
        )
        self.cause = cause


@dataclass
class _Worker:
    """This process, if it is a worker that is starting."""

    rank: int
    ready_pipe: Connection
    stage: str = "starting"


_worker: _Worker | None = None


def describe(error: BaseException) -> str:
    """The root cause's type, message and notes, without its traceback."""
    if isinstance(error, StartupError):
        return error.cause
    return "".join(traceback.format_exception_only(error)).strip()


def begin_worker(rank: int, ready_pipe: Connection) -> None:
    """Say that this process is the worker `rank`, which reports to `ready_pipe`."""
    global _worker
    _worker = _Worker(rank, ready_pipe)
    enter_stage("setting up its device and process groups")


def enter_stage(stage: str) -> None:
    """Report what this worker does from now on, if it is one that is starting."""
    if _worker is not None and not _worker.ready_pipe.closed:
        _worker.stage = stage
        # Without its executor this worker is about to be ended.
        with suppress(BrokenPipeError):
            _worker.ready_pipe.send({"status": STAGE, "stage": stage})


def worker_report(error: BaseException) -> dict[str, Any]:
    """What a worker sends in the place of its READY message."""
    cause = describe(error)
    if _worker is not None:
        cause += f"\n(on worker rank {_worker.rank}, while {_worker.stage})"
    return {"status": FAILED, "error": cause}


def is_worker() -> bool:
    """Whether this process is a worker."""
    return _worker is not None


def exit_timed_out(error: TimeoutError) -> None:
    """Report that this worker reached a time limit, and exit.

    Only `os._exit` ends it: its main thread is the one that does not return.
    """
    assert _worker is not None
    _worker.ready_pipe.send(worker_report(error) | {"timed_out": True})
    os._exit(1)


def engine_report(error: BaseException, local: bool, headless: bool) -> bytes:
    """What an engine core sends in the place of its READY message."""
    report = {"status": FAILED, "error": describe(error)}
    return msgspec.msgpack.encode(report | {"local": local, "headless": headless})


def raise_reported(message: dict[str, Any]) -> None:
    """Raise `StartupError` if `message` reports one."""
    if message["status"] == FAILED:
        raise StartupError(message["error"])


def raise_pending(events: list[tuple[Any, int]], handshake_socket: zmq.Socket) -> None:
    """Raise what an engine core reported before its process exited, if it did.

    `events` are those of the poll that found an exited process, or only a message.
    """
    if [socket for socket, _ in events] == [handshake_socket]:
        return
    while handshake_socket.poll(DRAIN_MS):
        raise_reported(msgspec.msgpack.decode(handshake_socket.recv_multipart()[-1]))


def describe_exits(exit_codes: Mapping[str, int]) -> str:
    """Say how processes ended that exited without a report.

    Args:
        exit_codes: The exit code of each process, by its name.

    """
    ends = [
        f"The process {name} {_how_it_ended(code, 'starting')} Its log is above."
        for name, code in exit_codes.items()
    ]
    program = getattr(sys.modules["__main__"], "__file__", None)
    if program is not None and not os.path.exists(program):
        ends.append(
            "A process that is spawned imports the program again, but that was read "
            f"from {os.path.basename(program)}, which is no file: save it in one, or "
            "set VLLM_ENABLE_V1_MULTIPROCESSING=0."
        )
    return " ".join(ends)


def receive(
    pipes: Mapping[Connection, UnreadyWorkerProcHandle],
) -> Iterator[tuple[Connection, dict[str, Any]]]:
    """The READY messages of starting workers, each with the pipe it came from.

    Raises:
        StartupError: A worker failed or died. What other workers report within a
            second is compared: a death causes errors on other ranks, while an abort is
            often caused by one.
        SystemExit: A worker was asked to stop, as by Ctrl-C.

    """
    waiting = dict(pipes)
    stages = dict.fromkeys(waiting, "starting")
    failures: list[_Failure] = []
    deadline: float | None = None
    while waiting:
        patience = None if deadline is None else max(0.0, deadline - time.monotonic())
        pending = wait(list(waiting), patience)
        if not pending:
            break
        for pipe in cast(list[Connection], pending):
            try:
                message = pipe.recv()
            except (EOFError, ConnectionError):
                failures.append(_death(waiting.pop(pipe), stages[pipe]))
                continue
            if message["status"] == STAGE:
                stages[pipe] = message["stage"]
                continue
            del waiting[pipe]
            if message["status"] == FAILED:
                order = TIMED_OUT if message.get("timed_out") else REPORTED
                failures.append(_Failure(order, message["error"]))
            else:
                yield pipe, message
        if failures and deadline is None:
            timed_out = failures[0].order == TIMED_OUT
            deadline = time.monotonic() + (GATHER_TIMEOUTS_S if timed_out else GATHER_S)
    if failures:
        still = [f"Worker rank {waiting[p].rank} was {stages[p]}." for p in waiting]
        _raise_first(failures, still)


# The kinds of failure of a worker. An earlier kind may cause a later one.
DIED, REPORTED, TIMED_OUT, ABORTED, STOPPED = range(5)


@dataclass
class _Failure:
    order: int
    text: str


def _death(worker: UnreadyWorkerProcHandle, stage: str) -> _Failure:
    """A worker that closed its pipe without a report."""
    worker.proc.join(REAP_S)
    code = worker.proc.exitcode
    order = {None: STOPPED, 0: STOPPED, -signal.SIGABRT: ABORTED}.get(code, DIED)
    return _Failure(order, f"Worker rank {worker.rank} {_how_it_ended(code, stage)}")


def _raise_first(failures: list[_Failure], still: list[str]) -> None:
    """Raise the first cause; for a time limit, say also where each rank is."""
    first = min(failures, key=lambda failure: failure.order)
    if first.order == STOPPED:  # all processes were asked to stop, as by Ctrl-C
        sys.exit(first.text)
    if first.order == TIMED_OUT:
        texts = [failure.text for failure in failures if failure.order == TIMED_OUT]
        raise StartupError("\n".join(texts + still))
    raise StartupError(first.text)


def _how_it_ended(exit_code: int | None, stage: str) -> str:
    if not exit_code:
        return f"was asked to stop while {stage}."
    if exit_code > 0:
        return f"exited with code {exit_code} while {stage}."
    name = signal.Signals(-exit_code).name
    hint = ""
    if -exit_code == signal.SIGKILL:
        hint = " The kernel does so when memory runs out: see `dmesg`."
    return f"was killed by {name} while {stage}.{hint}"
