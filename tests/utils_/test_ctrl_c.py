# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The processes of a program leave Ctrl-C to it."""

import signal

from vllm.v1.utils import APIServerProcessManager


def is_blocked() -> bool:
    return signal.SIGINT in signal.pthread_sigmask(signal.SIG_BLOCK, [])


def serve(listen_address: str, sock: object, args: object, config: object) -> None:
    raise SystemExit(0 if is_blocked() else 1)


def test_an_api_server_process_starts_with_the_signal_blocked():
    listeners = [Listener()]
    manager = APIServerProcessManager("", None, None, 1, listeners, listeners, serve)
    (process,) = manager.processes
    process.join()
    assert process.exitcode == 0
    assert not is_blocked()  # here


class Listener:
    """Of what the manager passes on."""

    address, socket = "", None

    def close(self) -> None:
        """There is none."""
