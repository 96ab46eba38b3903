# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""vLLM servers of one model, over HTTP. All methods may be called from any thread."""

import threading
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import httpx

T = TypeVar("T")

DOWN_SECONDS = 10.0  # a server that cannot be reached is asked last for so long


class VLLMServers:
    """A request goes to the server with the fewest under way.

    Raises:
        ConnectionError: none of them can be reached.

    """

    def __init__(self, urls: Sequence[str], timeout: float = 600.0) -> None:
        self.urls = [url.rstrip("/") for url in urls]
        self._client = httpx.Client(timeout=timeout)
        self._busy = dict.fromkeys(self.urls, 0)
        self._down = dict.fromkeys(self.urls, 0.0)  # until when, by time.monotonic
        self._lock = threading.Lock()
        self.adapters: dict[str, str] = {}
        models = self.least_busy(
            lambda url: self.request("GET", url, "/v1/models").json()["data"]
        )
        self.model = models[0]["id"]

    def close(self) -> None:
        self._client.close()

    def request(self, method: str, url: str, path: str, **options: Any) -> Any:
        """Raises ConnectionError if no server answers, RuntimeError if it refuses."""
        try:
            answer = self._client.request(method, url + path, **options)
        except httpx.TransportError as error:
            raise ConnectionError(
                f"The vLLM server can't be reached at {url} ({error}). Start it with "
                "`trl vllm-serve --model … --enable-lora`, or correct VLLM_BASE_URL."
            ) from error
        if answer.is_error:
            raise RuntimeError(
                f"{url}{path} answered {answer.status_code}: {answer.text}"
            )
        return answer

    def everywhere(self, path: str, **options: Any) -> None:
        """A POST to every server."""
        for url in self.urls:
            self.request("POST", url, path, **options)

    def least_busy(self, work: Callable[[str], T]) -> T:
        """Do ``work`` with the server with the fewest requests of this process.

        One that cannot be reached is left out.
        """
        tried: set[str] = set()
        while True:
            with self._lock:
                now = time.monotonic()
                url = min(
                    (url for url in self.urls if url not in tried),
                    key=lambda url: (self._down[url] > now, self._busy[url]),
                )
                self._busy[url] += 1
            try:
                return work(url)
            except ConnectionError:
                tried.add(url)
                self._down[url] = time.monotonic() + DOWN_SECONDS
                if len(tried) == len(self.urls):
                    raise
            finally:
                with self._lock:
                    self._busy[url] -= 1
