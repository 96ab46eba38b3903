# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""What a request to a LoRA service costs: ours, and SkyRL's server as its peer.

SkyRL's has other pins than vLLM, so it needs an environment of its own, with
`pip install "skyrl-tx[tinker,jax]"`. Both serve one model, and get the same requests.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
from harness import median_seconds

# SkyRL starts its engine by uv, which would make another environment.
UV = '#!/bin/sh\nwhile [ "$1" != -m ]; do shift; done\nexec "{python}" "$@"\n'
START_S = 300


class Client:
    """The few requests that are timed, over HTTP."""

    def __init__(self, url: str, base_model: str, rank: int) -> None:
        self._http = httpx.Client(base_url=f"{url}/api/v1/", timeout=START_S)
        asked = {"tags": [], "sdk_version": "0.38.0"}
        session = self.post("create_session", asked)["session_id"]
        created = self.post(
            "create_model",
            {
                "session_id": session,
                "model_seq_id": 0,
                "base_model": base_model,
                "lora_config": {"rank": rank, "seed": 0, "train_unembed": False},
            },
        )
        self.model = self.result(created)["model_id"]
        self._seq = self._samplers = 0

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        answer = self._http.post(path, json=body)
        answer.raise_for_status()
        return answer.json()

    def result(self, future: dict[str, Any]) -> dict[str, Any]:
        return self.post("retrieve_future", {"request_id": future["request_id"]})

    def operation(self, kind: str, **body: Any) -> dict[str, Any]:
        self._seq += 1
        asked = {"model_id": self.model, "seq_id": self._seq} | body
        return self.result(self.post(kind, asked))

    def step(self) -> None:
        adam = {"learning_rate": 1e-4, "beta1": 0.9, "beta2": 0.95, "eps": 1e-8}
        self.operation("optim_step", adam_params=adam)

    def sampler(self) -> None:
        self._samplers += 1
        self.operation(
            "save_weights_for_sampler", sampling_session_seq_id=self._samplers
        )


def service(
    folder: Path, device: str, rank: int, skyrl: str | None = None
) -> dict[str, float]:
    """Medians in seconds, with samplers that draw one token.

    Args:
        folder: A Hugging Face model with a tokenizer. For SkyRL it gets what older
            releases of Transformers read.
        device: "cpu" or "cuda".
        rank: Of the adapter.
        skyrl: The Python of an environment that has SkyRL's server.

    """
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        with _ours(folder, device, directory) as url:
            found |= _timed("", Client(url, str(folder), rank))
        if skyrl is not None:
            _for_older_transformers(folder)
            with _skyrl(skyrl, folder, directory) as url:
                found |= _timed("SkyRL: ", Client(url, str(folder), rank))
    return found


def _timed(name: str, client: Client) -> dict[str, float]:
    return {
        f"{name}step without gradients, s": median_seconds(client.step, 100),
        f"{name}weights for a sampler, s": median_seconds(client.sampler, 9),
    }


@contextmanager
def _ours(folder: Path, device: str, directory: str) -> Iterator[str]:
    command = [sys.executable, "-m", "vllm_generic.tink", "serve", str(folder)]
    command += ["--model-name", str(folder), "--port", "0", "--device", device]
    command += ["--root", f"{directory}/ours"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    try:
        assert process.stderr is not None
        started = (line for line in process.stderr if "tink serves" in line)
        line = next(started, None)
        if line is None:
            raise RuntimeError("the service did not start")
        yield line.partition(" on ")[2].partition(",")[0]
    finally:
        process.terminate()
        process.wait()


@contextmanager
def _skyrl(python: str, folder: Path, directory: str) -> Iterator[str]:
    from vllm.utils.network_utils import get_open_port

    home = Path(directory)
    (home / "uv").write_text(UV.format(python=python))
    (home / "uv").chmod(0o755)
    url = f"http://127.0.0.1:{get_open_port()}"
    command = [python, "-m", "tx.tinker.api", "--host", "127.0.0.1"]
    command += ["--port", url.rpartition(":")[2], "--base-model", str(folder)]
    command += ["--checkpoints-base", f"{directory}/skyrl"]
    command += ["--database-url", f"sqlite:///{directory}/skyrl.db"]
    command += ["--backend-config", json.dumps({"max_lora_adapters": 4})]
    environment = os.environ | {
        "PATH": f"{directory}:{os.environ['PATH']}",
        "JAX_PLATFORMS": "cpu",
    }
    environment.pop("PYTHONPATH", None)
    with open(home / "skyrl.log", "w") as log:
        process = subprocess.Popen(
            command, env=environment, cwd=directory, stdout=log, stderr=log
        )
    try:
        end = time.monotonic() + START_S
        while not _answers(url):
            if process.poll() is not None or time.monotonic() > end:
                raise RuntimeError((home / "skyrl.log").read_text()[-3000:])
            time.sleep(0.5)
        yield url
    finally:
        process.terminate()
        process.wait()


def _answers(url: str) -> bool:
    try:
        return httpx.get(f"{url}/api/v1/healthz").is_success
    except httpx.TransportError:
        return False


def _for_older_transformers(folder: Path) -> None:
    """Say what Transformers 4 reads, which SkyRL's server has."""
    path = folder / "config.json"
    config = json.loads(path.read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    path.write_text(json.dumps(config))
    kind = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (folder / "tokenizer_config.json").write_text(json.dumps(kind))
