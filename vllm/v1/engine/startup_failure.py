# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Why an engine did not start, told to the process that started it.

A worker reports to its executor over its ready pipe; an engine core reports to its
front-end over the handshake socket, in the place of its READY message.
"""

from __future__ import annotations

import traceback
from typing import TYPE_CHECKING, Any

import msgspec

if TYPE_CHECKING:
    import zmq

FAILED = "FAILED"
# A dying engine core sends its report before it exits; allow for its way here.
DRAIN_MS = 200


class StartupError(RuntimeError):
    """What another process reported: its root cause, then where its traceback is."""

    def __init__(self, cause: str) -> None:
        super().__init__(
            f"{cause}\n(The engine could not start; the traceback of the process that "
            "failed is in the log above.)"
        )
        self.cause = cause


def describe(error: BaseException) -> str:
    """The root cause's type, message and notes, without its traceback."""
    if isinstance(error, StartupError):
        return error.cause
    return "".join(traceback.format_exception_only(error)).strip()


def worker_report(error: BaseException) -> dict[str, Any]:
    """What a worker sends in the place of its READY message."""
    return {"status": FAILED, "error": describe(error)}


def engine_report(error: BaseException, local: bool, headless: bool) -> bytes:
    """What an engine core sends in the place of its READY message."""
    report = worker_report(error) | {"local": local, "headless": headless}
    return msgspec.msgpack.encode(report)


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
