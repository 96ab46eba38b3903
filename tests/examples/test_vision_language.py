# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""`examples/vision_language`, from training to an image in a request."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import requests

from vllm.utils.network_utils import get_open_port

EXAMPLE = Path(__file__).parents[2] / "examples/vision_language"
CLI = [sys.executable, "-m", "vllm.entrypoints.cli.main"]
STOP_S = 60


def run(*command: str | Path, **environment: str) -> str:
    completed = subprocess.run(
        list(map(str, command)),
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
        env=os.environ | environment,
    )
    assert completed.returncode == 0, completed.stdout
    return completed.stdout


@pytest.mark.engine
def test_trained_and_asked_about_images(tmp_path):
    """It learns colors first; log-probabilities are the module's own."""
    model = tmp_path / "shapes"
    train = [EXAMPLE / "train.py", "--train-seconds", "6", "--num-prompts", "6"]
    output = run(sys.executable, *train, "--output-dir", model)
    assert "PASSED" in output and " of 6 answers are right" in output

    port = get_open_port()
    url = f"http://127.0.0.1:{port}"
    command = [*CLI, "serve", str(model), "--trust-remote-code"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32"]
    command += ["--max-model-len", "128", "--enforce-eager"]
    command += ["--kv-cache-memory-bytes", "16777216"]
    log = tmp_path / "log.txt"
    with log.open("w") as written:
        server = subprocess.Popen(command, stdout=written, stderr=written)
    try:
        wait_for(url, server, log)
        asked = run(sys.executable, EXAMPLE / "ask.py", "--url", url)
    finally:
        server.terminate()
        server.wait(STOP_S)
    assert asked.startswith("an image of ")
    assert asked.count("(it is ") == 3, asked


def wait_for(url: str, server: subprocess.Popen, log: Path) -> None:
    for _ in range(600):
        assert server.poll() is None, log.read_text()[-4000:]
        try:
            if requests.get(f"{url}/health", timeout=5).ok:
                return
        except requests.ConnectionError:
            time.sleep(0.5)
    pytest.fail(f"not up: {log.read_text()[-4000:]}")
