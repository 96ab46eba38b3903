# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Processes of `vllm serve` that serve TinyModel."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import requests

from vllm.utils.network_utils import get_open_port

OVERRIDE = '{"TinyModel": "tiny_model:build"}'
START_S = 300
STOP_S = 60


@contextmanager
def tiny_servers(
    model_dir: Path, logs: Path, count: int, *options: str, **environment: str
) -> Iterator[dict[str, psutil.Popen]]:
    """`count` servers by their URLs, in float32; they end with the block.

    Args:
        model_dir: The model's directory.
        logs: A folder for what they print.
        options: More of `vllm serve`; they count more than those that are here.
        environment: More variables.

    """
    servers: dict[str, psutil.Popen] = {}
    for number in range(count):
        port = get_open_port()
        command = [sys.executable, "-m", "vllm.entrypoints.cli.main", "serve"]
        command += [str(model_dir), "--host", "127.0.0.1", "--port", str(port)]
        command += ["--model-class-overrides", OVERRIDE, "--served-model-name", "tiny"]
        command += ["--dtype", "float32", "--max-model-len", "128", "--enforce-eager"]
        command += ["--kv-cache-memory-bytes", "16777216", *options]
        with (logs / f"{number}.txt").open("w") as log:
            servers[f"http://127.0.0.1:{port}"] = psutil.Popen(
                command, stdout=log, stderr=log, env=os.environ | environment
            )
    try:
        deadline = time.monotonic() + START_S
        for number, (url, process) in enumerate(servers.items()):
            while not _is_ready(url):
                text = (logs / f"{number}.txt").read_text()[-4000:]
                assert process.poll() is None and time.monotonic() < deadline, text
                time.sleep(0.2)
        yield servers
    finally:
        for process in servers.values():
            if process.poll() is None:
                process.terminate()
        for process in servers.values():
            try:
                process.wait(STOP_S)
            except (psutil.TimeoutExpired, subprocess.TimeoutExpired):
                process.kill()
                raise


@contextmanager
def tiny_server(
    model_dir: Path, logs: Path, *options: str, **environment: str
) -> Iterator[str]:
    """The URL of one server; see `tiny_servers`."""
    with tiny_servers(model_dir, logs, 1, *options, **environment) as servers:
        yield from servers


def _is_ready(url: str) -> bool:
    try:
        return requests.get(f"{url}/health", timeout=5).ok
    except requests.ConnectionError:
        return False
