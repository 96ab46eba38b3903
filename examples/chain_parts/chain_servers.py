# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The processes that the chain samples from, and how it asks them."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
from chain_models import Subject
from chain_tasks import PROMPT, reward

from vllm.utils.network_utils import get_open_port


@contextmanager
def started(command: list[str], log: Path, ready: str) -> Iterator[re.Match[str]]:
    """A process, once its log has `ready`; it ends with the block."""
    places = [str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
    environment = {
        "PYTHONPATH": os.pathsep.join(filter(None, places)),
        "VLLM_SERVER_DEV_MODE": "1",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=os.environ | environment,
            stdout=file,
            stderr=file,
        )
    try:
        while (found := re.search(ready, log.read_text())) is None:
            if process.poll() is not None:
                raise RuntimeError(f"{command[0]} did not start:\n{log.read_text()}")
            time.sleep(0.1)
        yield found
    finally:
        process.terminate()
        process.wait()


@contextmanager
def served(
    subject: Subject, directory: Path, ranks: int, *options: str
) -> Iterator[str]:
    """The URL of `vllm serve`, where the model is registered by its name."""
    url = f"http://127.0.0.1:{get_open_port()}"
    command = ["vllm.entrypoints.cli.main", "serve", str(directory)]
    command += ["--host=127.0.0.1", f"--port={url.rpartition(':')[2]}"]
    override = f'{{"{subject.architecture}": "{subject.factory}"}}'
    command += ["--model-class-overrides", override]
    command += ["--served-model-name=stock", "--max-model-len=64", "--enforce-eager"]
    # nanoGPT's model takes as many tokens in one step as it has positions
    command += [f"--dtype={subject.dtype}", "--max-num-batched-tokens=512"]
    # The trainer has the rest of a GPU. A cache of a known size needs no look at how
    # much is free, which other programs change.
    command += ["--gpu-memory-utilization=0.3", f"--kv-cache-memory-bytes={1 << 28}"]
    command += [f"--tensor-parallel-size={ranks}", *options]
    log = directory / "serve.log"
    with started(command, log, "Application startup complete"):
        yield url


def sample(
    url: str, prompt: list[int], n: int, temperature: float, model: str = "stock"
) -> list[dict]:
    """Answers with the engine's log-probabilities."""
    asked = {
        "model": model,
        "prompt": prompt,
        "n": n,
        "temperature": temperature,
        "max_tokens": PROMPT,
        "logprobs": 1,
        "return_token_ids": True,
    }
    response = httpx.post(f"{url}/v1/completions", json=asked, timeout=120)
    response.raise_for_status()
    return [
        {
            "prompt": prompt,
            "answer": choice["token_ids"],
            "logprobs": choice["logprobs"]["token_logprobs"],
            "reward": reward(prompt, choice["token_ids"]),
        }
        for choice in response.json()["choices"]
    ]
