# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import asyncio
import signal
from types import SimpleNamespace

import pytest

from vllm.entrypoints.launchers.api_server import entry


@pytest.fixture
def handlers():
    """Puts the handlers of this process back."""
    signals = (signal.SIGINT, signal.SIGTERM)
    before = {number: signal.getsignal(number) for number in signals}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


def test_ctrl_c_ends_a_server_that_starts(handlers, monkeypatch):
    def setup(*args: object, **options: object) -> None:
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("the server goes on")

    monkeypatch.setattr(entry, "setup_server", setup)
    with pytest.raises(SystemExit) as exit:
        asyncio.run(entry.run_server(SimpleNamespace()))
    assert exit.value.code == 128 + signal.SIGINT
