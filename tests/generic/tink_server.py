# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A LoRA service in a process of its own, and the real client for it."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

STARTED = re.compile(r"tink serves \S+ on (http://\S+),")


class TinkServer:
    """``python -m vllm_generic.tink serve`` with its state in ``root``."""

    def __init__(self, root: Path, *arguments: str, port: int = 0) -> None:
        self.root = root
        self.arguments = arguments
        self.port = port
        self.log = root.with_suffix(".log")
        self._clients: list[Any] = []

    def start(self) -> "TinkServer":
        with open(self.log, "a") as log:
            log.write("--- start\n")
            log.flush()
            self.process = subprocess.Popen(
                [sys.executable, "-m", "vllm_generic.tink", "serve"]
                + ["--root", str(self.root), "--port", str(self.port)]
                + list(self.arguments),
                stdout=log,
                stderr=log,
                env=os.environ | {"OMP_NUM_THREADS": "1"},
            )
        while True:
            written = self.log.read_text().rpartition("--- start")[2]
            started = STARTED.search(written)
            if started:
                break
            if self.process.poll() is not None:
                raise RuntimeError(f"the service did not start:\n{written}")
            time.sleep(0.05)
        self.url = started[1]
        # another start has the same address, as a restarted service has
        self.port = int(self.url.rpartition(":")[2])
        return self

    def kill(self) -> None:
        """kill -9: nothing can be tidied up."""
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def stop(self) -> None:
        """End it in order, and the clients, which else send heartbeats for ever."""
        if self.process.poll() is None:
            for client in self._clients:
                client.close("success").result(timeout=60)
        self._clients.clear()
        self.process.terminate()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()

    def __enter__(self) -> "TinkServer":
        return self.start()

    def __exit__(self, *_: Any) -> None:
        self.stop()

    def client(self, key: str = "tml-local") -> Any:
        import tinker

        client = tinker.ServiceClient(base_url=self.url, api_key=key)
        self._clients.append(client)
        return client
