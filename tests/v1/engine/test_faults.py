# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Ranks that die, hang, differ or run out of memory, and users that press Ctrl-C.

Each program ends promptly, says what happened, and leaves nothing behind.
"""

import http.client
import json
import os
import re
import signal
import socket
import sys
import time
from pathlib import Path

import pytest
import torch
from programs import Program
from ranks import run_ranks
from tiny_model import TinyModel
from torch import nn

from vllm.model_executor.models.callable_model.checks import check_same_on_all_ranks

pytestmark = pytest.mark.engine
SLOW = pytest.mark.slow

FAULTY_MODEL = str(Path(__file__).with_name("faulty_model.py"))
TWO_RANKS = {"tensor_parallel_size": 2}
# What an end may take: a second in which failures are gathered, and what vLLM gives a
# worker that is stuck (5 s), on a machine that is busy with other tests.
PROMPT_S = 20
# Python ends with the signal, unless it was raised in a callback of a C library.
INTERRUPTED = (1, -signal.SIGINT, 128 + signal.SIGINT)


@pytest.fixture
def serve(model_dir, tmp_path_factory):
    """Starts `faulty_model.py`; forks by default, which is quick."""
    programs = []

    def start(fault: str, options: dict | None = None, **env: str) -> Program:
        folder = tmp_path_factory.mktemp("program")
        (folder / "signs").mkdir()
        command = [sys.executable, FAULTY_MODEL, str(model_dir), f"{folder}/signs"]
        command += [fault, json.dumps(TWO_RANKS if options is None else options)]
        # Without the self-check, so that it is a request that comes to a fault.
        defaults = {
            "VLLM_WORKER_MULTIPROC_METHOD": "fork",
            "VLLM_MODEL_SELF_CHECK": "0",
        }
        env = defaults | env
        programs.append(program := Program(command, folder, **env))
        return program

    yield start
    for program in programs:
        program.__exit__(None, None, None)


def at(program: Program, sign: str) -> None:
    program.wait_until((program.log.parent / "signs" / sign).exists)


def the_last_error(program: Program) -> str:
    return program.output().rpartition("Traceback (most recent call last)")[2]


def ends_with_one_traceback(program: Program) -> None:
    """That of the interrupted program; its processes say nothing."""
    assert program.output().count("Traceback") == 1, program.output()
    assert "KeyboardInterrupt" in the_last_error(program)


# ---- A rank that fails -----------------------------------------------------------


@pytest.mark.parametrize(
    ("fault", "messages"),
    [
        (
            "kill while building",
            ["Worker rank 1 was killed by SIGKILL while building the model by the "],
        ),
        (
            "no memory while building",
            ["can't allocate memory", "on worker rank 1, while building the model"],
        ),
        pytest.param(
            "no memory for the cache",
            ["RuntimeError on worker rank 1: ", "can't allocate memory"],
            marks=SLOW,
        ),
    ],
)
def test_a_rank_that_fails_while_it_starts(serve, fault, messages):
    program = serve(fault)
    assert program.ends_within(240) == 1
    for message in messages:
        assert message in the_last_error(program)
    program.leaves_nothing()


@SLOW
@pytest.mark.parametrize(
    ("gibibytes", "message"),
    [
        (1 << 20, "on worker rank 0: Available memory on node"),
        (0, "No available memory for the cache blocks."),
    ],
)
def test_a_cache_of_an_impossible_size(serve, gibibytes, message):
    program = serve("none", VLLM_CPU_KVCACHE_SPACE=str(gibibytes))
    assert program.ends_within(240) == 1
    assert message in the_last_error(program)
    program.leaves_nothing()


def test_a_rank_that_hangs_while_it_builds(serve):
    # Long enough for the slower rank to come to where it hangs.
    program = serve("hang while building", VLLM_MODEL_FACTORY_TIMEOUT_S="10")
    at(program, "building")
    assert program.ends_within(PROMPT_S + 10) == 1
    error = the_last_error(program)
    assert "took longer than 10 s (VLLM_MODEL_FACTORY_TIMEOUT_S)" in error
    parts = re.findall(
        r"(.*?)\(on worker rank (\d), while building the model", error, re.DOTALL
    )
    text_of = {rank: text for text, rank in parts}  # whichever was first
    assert "in wait_for_all_ranks" in text_of["0"]
    assert "in wait_here" in text_of["1"]
    program.leaves_nothing()


@SLOW
def test_a_single_rank_that_hangs(serve):
    """It is in the engine core itself."""
    program = serve("hang alone", {}, VLLM_MODEL_FACTORY_TIMEOUT_S="3")
    assert program.ends_within(240) == 1
    error = the_last_error(program)
    assert "took longer than 3 s (VLLM_MODEL_FACTORY_TIMEOUT_S)" in error
    assert "in wait_here" in error
    program.leaves_nothing()


@pytest.mark.parametrize(
    "fault",
    [
        "kill while generating",
        pytest.param("no memory while generating", marks=SLOW),
    ],
)
def test_a_rank_that_fails_while_it_generates(serve, fault):
    program = serve(fault)
    assert program.ends_within(240) == 1
    assert "EngineDeadError" in the_last_error(program)
    # Either may come first: the monitor of the processes sees that the rank is gone, or
    # the other rank's collective does.
    causes = ("Worker proc VllmWorker-1 died unexpectedly", "gloo/transport/tcp")
    assert any(cause in program.output() for cause in causes), program.output()
    program.leaves_nothing()


class Other(TinyModel):
    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(3, 3)


def another_model_on_rank_1(context):
    model = Other() if context.tensor_parallel_rank == 1 else TinyModel()
    message = (
        "First difference: rank 0 has the class tiny_model.TinyModel; rank 1 has the "
        f"class {Other.__module__}.Other."
    )
    with pytest.raises(ValueError, match=message):
        check_same_on_all_ranks("TinyModel", model, context)


def another_tensor_on_rank_1(context):
    model = TinyModel()
    check_same_on_all_ranks("TinyModel", model, context)
    if context.tensor_parallel_rank == 1:
        model.register_parameter("extra", nn.Parameter(model.lm_head.weight[0]))
    with pytest.raises(ValueError, match="rank 1 has extra, 1 axes of torch.float32"):
        check_same_on_all_ranks("TinyModel", model, context)


@pytest.mark.parametrize("check", [another_model_on_rank_1, another_tensor_on_rank_1])
def test_a_rank_that_builds_another_model(check, tmp_path):
    run_ranks(check, tmp_path, tensor_parallel_size=2)


# ---- A user who stops it ---------------------------------------------------------


SPAWN = {"VLLM_WORKER_MULTIPROC_METHOD": "spawn"}
IN_PROCESS = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
COMPILED = TWO_RANKS | {"enforce_eager": False}


INTERRUPTS = [
    ("hang while building", "building", TWO_RANKS, SPAWN),
    ("hang while generating", "generating", TWO_RANKS, {}),
    ("none", "idle", {}, IN_PROCESS),
]
MORE_INTERRUPTS = [
    ("none", "importing", TWO_RANKS, {}),
    ("hang while building", "building", TWO_RANKS, IN_PROCESS),
    ("hang while building", "building", TWO_RANKS, {"IN_EVENT_LOOP": "1"}),
    ("hang alone", "building", {}, {}),
    ("hang while trying", "trying", TWO_RANKS, {}),
    ("hang while loading", "loading", TWO_RANKS, {}),
    ("hang while warming up", "warming up", COMPILED, {}),
    ("hang while generating", "generating", TWO_RANKS, IN_PROCESS),
    ("none", "idle", TWO_RANKS, {}),
]


@pytest.mark.parametrize(
    ("fault", "sign", "options", "env"),
    [
        *INTERRUPTS,
        *(pytest.param(*case, marks=SLOW) for case in MORE_INTERRUPTS),
    ],
)
def test_ctrl_c(serve, fault, sign, options, env):
    program = serve(fault, options, **env)
    at(program, sign)
    program.interrupt(everyone=True)
    assert program.ends_within(PROMPT_S) in INTERRUPTED
    ends_with_one_traceback(program)
    program.leaves_nothing()


@SLOW
def test_an_interrupt_of_the_program_alone(serve):
    program = serve("hang while building")
    at(program, "building")
    program.interrupt(everyone=False)
    assert program.ends_within(PROMPT_S) in INTERRUPTED
    ends_with_one_traceback(program)
    program.leaves_nothing()


@pytest.mark.parametrize(
    ("fault", "sign", "method"),
    [
        ("hang while generating", "generating", "fork"),
        pytest.param("hang while building", "building", "spawn", marks=SLOW),
        pytest.param("none", "idle", "fork", marks=SLOW),
    ],
)
def test_a_program_that_is_killed(serve, fault, sign, method):
    program = serve(fault, VLLM_WORKER_MULTIPROC_METHOD=method)
    at(program, sign)
    program.process.kill()
    program.leaves_nothing(PROMPT_S)


# ---- vllm serve ------------------------------------------------------------------


@pytest.fixture
def listener():
    """A socket that listens on a port of this machine."""
    with socket.create_server(("127.0.0.1", 0)) as taken:
        yield taken


class Slow(TinyModel):
    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        time.sleep(0.1)
        return super().forward(input_ids, positions)


def build_slow(vllm_config: object, context: object) -> Slow:
    return Slow()


def vllm_serve(model_dir, folder, port: int, *options: str) -> Program:
    command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
    command += [str(model_dir), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--model-class-overrides", '{"TinyModel": "test_faults:build_slow"}']
    command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "16777216", *options]
    path = f"{Path(__file__).parent}{os.pathsep}{os.environ['PYTHONPATH']}"
    return Program(command, folder, PYTHONPATH=path)


def test_a_port_for_process_groups_in_use(serve, listener):
    port = listener.getsockname()[1]
    two_hosts = {"nnodes": 2, "master_addr": "127.0.0.1", "master_port": port}
    program = serve("none", TWO_RANKS | two_hosts)
    assert program.ends_within(240) == 1
    error = the_last_error(program)
    assert f"port: {port}" in error
    assert "address already in use\n(on worker rank 0, while setting up" in error
    program.leaves_nothing()


def test_a_port_in_use(listener, model_dir_with_tokenizer, tmp_path_factory):
    port = listener.getsockname()[1]
    folder = tmp_path_factory.mktemp("program")
    with vllm_serve(model_dir_with_tokenizer, folder, port) as program:
        assert program.ends_within(120) == 1
        assert f"Cannot listen on 127.0.0.1:{port}" in the_last_error(program)
        program.leaves_nothing()


@pytest.mark.parametrize(
    ("options", "processes", "code"),
    [
        # itself, the resource tracker, and the engine core, which is importing
        ([], 3, 128 + signal.SIGINT),
        # those, the coordinator, another engine core, and two API servers
        pytest.param(["--data-parallel-size", "2"], 7, 0, marks=SLOW),
    ],
)
def test_ctrl_c_while_vllm_serve_starts(
    listener, model_dir_with_tokenizer, tmp_path_factory, options, processes, code
):
    port = listener.getsockname()[1]
    listener.close()
    folder = tmp_path_factory.mktemp("program")
    with vllm_serve(model_dir_with_tokenizer, folder, port, *options) as program:
        program.wait_until(lambda: len(program.processes()) >= processes)
        program.interrupt(everyone=True)
        assert program.ends_within(PROMPT_S) == code
        assert "Traceback" not in program.output()
        program.leaves_nothing()


def test_ctrl_c_while_vllm_serve_streams(
    listener, model_dir_with_tokenizer, tmp_path_factory
):
    port = listener.getsockname()[1]
    listener.close()

    def answers() -> bool:
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    folder = tmp_path_factory.mktemp("program")
    with vllm_serve(model_dir_with_tokenizer, folder, port) as program:
        program.wait_until(answers)
        request = {
            "model": str(model_dir_with_tokenizer),
            "prompt": "t1",
            "max_tokens": 120,
            "ignore_eos": True,
            "stream": True,
        }
        connection = http.client.HTTPConnection("127.0.0.1", port)
        headers = {"Content-Type": "application/json"}
        connection.request("POST", "/v1/completions", json.dumps(request), headers)
        stream = connection.getresponse()
        first = stream.readline()
        program.interrupt(everyone=True)
        assert program.ends_within(PROMPT_S) == 0
        assert first.startswith(b"data: ")
        assert b'"finish_reason":"abort"' in stream.read()
        assert "Traceback" not in program.output()
        program.leaves_nothing()
        assert not answers()
