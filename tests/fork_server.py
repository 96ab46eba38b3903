# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processes that begin with vLLM imported, which takes longer than most tests.

A fork server imports vLLM once for all tests of this process. Engines and ranks are
forked from it, and get everything by a pickle, as spawned ones do.
"""

import multiprocessing
import multiprocessing.forkserver
import os
from collections.abc import Callable, Mapping
from typing import Any

FORK_SERVER = multiprocessing.get_context("forkserver")
multiprocessing.set_forkserver_preload(
    ["vllm.v1.worker.cpu_worker", "vllm.v1.engine.core", "vllm.v1.engine.async_llm"]
)


class Process(FORK_SERVER.Process):
    """Has the environment of the process that starts it, as a spawned one has."""

    def __reduce__(self) -> tuple[Callable, tuple, dict[str, Any]]:
        # What it starts in turn is forked from it.
        environment = os.environ | {"VLLM_WORKER_MULTIPROC_METHOD": "fork"}
        return _in_environment, (type(self), environment), vars(self)


def _in_environment(kind: type[Process], environment: Mapping[str, str]) -> Process:
    """Comes first of all that a new process unpickles."""
    os.environ.clear()
    os.environ.update(environment)
    return kind.__new__(kind)


class Context(type(FORK_SERVER)):  # type: ignore[misc]
    Process = Process
