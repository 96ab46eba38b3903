# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import faulthandler
import multiprocessing
import os
import signal
import sys
from types import SimpleNamespace

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


# ---- Workers that die, and the executor that waits for them ----------------------

context = multiprocessing.get_context("fork")


def start_workers(*actions):
    """One process for each action, which gets the process's ready pipe."""
    pipes = {}
    for rank, action in enumerate(actions):
        reader, writer = context.Pipe(duplex=False)
        process = context.Process(target=action, args=(writer,))
        process.start()
        writer.close()
        pipes[reader] = SimpleNamespace(rank=rank, proc=process)
    return pipes


def reports(error):
    def action(pipe):
        startup_failure.begin_worker(0, pipe)
        pipe.send(startup_failure.worker_report(error))

    return action


def ends(code):
    """With the exit code, or the signal -code."""

    def action(pipe):
        startup_failure.begin_worker(0, pipe)
        startup_failure.enter_stage("building the model")
        faulthandler.disable()
        os.kill(os.getpid(), -code) if code < 0 else os._exit(code)

    return action


def is_ready(pipe):
    pipe.send({"status": "READY"})


@pytest.mark.parametrize(
    ("actions", "message"),
    [
        (
            [reports(KeyError("k")), is_ready],
            "KeyError: 'k'\n.on worker rank 0, while s",
        ),
        ([ends(3)], "Worker rank 0 exited with code 3 while building the model."),
        (
            [reports(ConnectionError("lost rank 1")), ends(-signal.SIGKILL)],
            "Worker rank 1 was killed by SIGKILL while building the model. The kernel",
        ),
        (
            [ends(-signal.SIGABRT), reports(KeyError("k"))],
            "KeyError: 'k'",
        ),
    ],
)
def test_the_executor_raises_the_cause(actions, message):
    with pytest.raises(startup_failure.StartupError, match=message):
        list(startup_failure.receive(start_workers(*actions)))


def test_ready_messages_come_with_their_pipes():
    pipes = start_workers(is_ready, is_ready)
    assert dict(startup_failure.receive(pipes)).keys() == pipes.keys()


def test_workers_that_were_asked_to_stop_are_no_error():
    with pytest.raises(SystemExit, match="asked to stop while building the model"):
        list(startup_failure.receive(start_workers(ends(0), ends(0))))


def test_an_engine_core_that_died():
    text = startup_failure.describe_exits({"EngineCore": -signal.SIGSEGV})
    assert text.startswith(
        "The process EngineCore was killed by SIGSEGV while starting"
    )


def test_a_program_without_a_file_is_named(monkeypatch):
    main = SimpleNamespace(__file__="/somewhere/<stdin>")
    monkeypatch.setitem(sys.modules, "__main__", main)
    text = startup_failure.describe_exits({"EngineCore": 1})
    assert "was read from <stdin>, which is no file: save it in one" in text
