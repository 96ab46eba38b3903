# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Where the ranks of a trainer and of its engines find each other.

A `TCPStore` of the trainer's first rank holds manifests and what each rank says about
an update. Values are JSON: nothing that comes from the network is unpickled.
"""

from __future__ import annotations

import base64
import json
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit

from torch.distributed import DistNetworkError, DistStoreError, TCPStore

from vllm.distributed.weight_sync.manifest import Manifest, Shard
from vllm.distributed.weight_sync.memory import wait_until


class Rendezvous:
    """The store, with a key for each thing that is said in it.

    Args:
        host: Where the store is, or what the trainer's machine is called.
        port: 0 to make a store here.
        timeout: Seconds for any wait.

    """

    def __init__(self, host: str, port: int, timeout: float) -> None:
        self.timeout = timeout
        listener = None
        if port == 0:  # PyTorch's own listens on all addresses
            listener = socket.create_server((host, 0))
            port = listener.getsockname()[1]
        try:
            self.store = TCPStore(
                host,
                port,
                is_master=listener is not None,
                wait_for_workers=False,
                timeout=timedelta(seconds=timeout),
                master_listen_fd=None if listener is None else listener.detach(),
            )
        except (DistNetworkError, DistStoreError) as error:
            raise ConnectionError(
                f"The trainer's store at {host}:{port} cannot be reached: {error}"
            ) from error
        self.address = (host, self.store.port)

    def set(self, key: str, value: Any) -> None:
        self.store.set(key, json.dumps(value))

    def has(self, key: str) -> bool:
        return self.store.check([key])

    def get(
        self,
        key: str,
        check: Callable[[], None] = lambda: None,
        what: str = "",
        limit: float | None = None,
    ) -> Any:
        """Wait for `key`.

        Args:
            key: Under which something is said.
            check: Called from time to time; it may raise.
            what: What is waited for, for messages.
            limit: Seconds, if not `timeout`.

        Raises:
            TimeoutError: nobody has set it within the time limit.
            ConnectionError: the store, and with it the trainer, is gone.

        """
        return json.loads(self._wait(key, check, what or key, limit))

    def _wait(
        self, key: str, check: Callable[[], None], what: str, limit: float | None = None
    ) -> bytes:
        limit = self.timeout if limit is None else limit
        deadline = time.monotonic() + limit
        try:
            # Polls, because `TCPStore.wait` logs each time-out as an error.
            wait_until(lambda: self.has(key), deadline, f"{what}, {limit:.0f} s", check)
            return self.store.get(key)
        except (DistNetworkError, DistStoreError) as error:
            raise ConnectionError(f"The trainer is gone: {error}") from error

    def forget(self, key: str) -> None:
        self.store.delete_key(key)

    def set_manifest(self, side: str, rank: int, manifest: Manifest) -> None:
        text = base64.b64encode(manifest.to_bytes()).decode()
        self.store.set(f"{side}/{rank}", text)

    def get_manifests(self, side: str, size: int) -> list[Manifest]:
        known: dict[bytes, list[Shard]] = {}
        return [
            Manifest.from_bytes(
                base64.b64decode(
                    self._wait(
                        f"{side}/{rank}",
                        lambda: None,
                        f"{side} rank {rank} to say which tensors it holds",
                    )
                ),
                known,
            )
            for rank in range(size)
        ]


def address_towards(urls: list[str]) -> str:
    """The address of this machine that the first of `urls` can reach."""
    if not urls:
        return "127.0.0.1"
    parts = urlsplit(urls[0])
    port = parts.port or (443 if parts.scheme == "https" else 80)
    with socket.create_connection((parts.hostname or "", port), timeout=10) as peer:
        return peer.getsockname()[0]
