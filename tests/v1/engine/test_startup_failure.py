# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import msgspec
import pytest
import zmq

from vllm.v1.engine import startup_failure


@pytest.fixture
def sockets():
    """An engine core's socket and its front-end's."""
    context = zmq.Context()
    front_end, engine = context.socket(zmq.ROUTER), context.socket(zmq.DEALER)
    port = front_end.bind_to_random_port("tcp://127.0.0.1")
    engine.connect(f"tcp://127.0.0.1:{port}")
    yield engine, front_end
    context.destroy(linger=0)


def failure():
    error = KeyError("weights")
    error.add_note("raised by the factory")
    return error


def test_a_worker_report_carries_type_message_and_notes():
    report = startup_failure.worker_report(failure())
    with pytest.raises(RuntimeError) as error:
        startup_failure.raise_reported(report)
    lines = str(error.value).splitlines()
    assert lines[:2] == ["KeyError: 'weights'", "raised by the factory"]
    assert "log above" in lines[2]


def test_the_cause_is_told_once_through_two_processes():
    with pytest.raises(startup_failure.StartupError) as first:
        startup_failure.raise_reported(startup_failure.worker_report(failure()))
    report = startup_failure.worker_report(first.value)
    assert report["error"] == "KeyError: 'weights'\nraised by the factory"


def test_ready_messages_pass():
    startup_failure.raise_reported({"status": "READY"})


def test_what_an_engine_core_said_before_it_exited_is_raised(sockets):
    engine, front_end = sockets
    engine.send(msgspec.msgpack.encode({"status": "HELLO"}))
    engine.send(startup_failure.engine_report(failure(), local=True, headless=False))
    with pytest.raises(RuntimeError, match="^KeyError: 'weights'"):
        startup_failure.raise_pending([("sentinel", zmq.POLLIN)], front_end)


def test_a_plain_message_is_left_to_the_handshake(sockets):
    engine, front_end = sockets
    engine.send(startup_failure.engine_report(failure(), local=True, headless=False))
    assert front_end.poll(1000)
    startup_failure.raise_pending([(front_end, zmq.POLLIN)], front_end)
    assert front_end.poll(1000)


def test_an_engine_core_that_said_nothing(sockets):
    startup_failure.raise_pending([("sentinel", zmq.POLLIN)], sockets[1])
