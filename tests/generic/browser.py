# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A headless Chromium, steered by its DevTools protocol."""

import itertools
import json
import re
import shutil
import subprocess
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from websockets.sync.client import connect

NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
LISTENS = re.compile(r"DevTools listening on ws://([^/\s]+)/")


def find_browser() -> str | None:
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Page:
    """One page, in a browser of its own with the profile in ``folder``.

    ``requested`` are the addresses that the page asked for.
    """

    def __init__(self, browser: str, folder: Path) -> None:
        self._log = folder / "browser.log"
        with open(self._log, "w") as log:
            self._process = subprocess.Popen(
                [browser, "--headless", "--no-sandbox", "--disable-gpu"]
                + ["--no-first-run", "--disable-dev-shm-usage"]
                + ["--remote-debugging-port=0", f"--user-data-dir={folder}/profile"]
                + ["about:blank"],
                stdout=log,
                stderr=log,
            )
        self._ends = ExitStack()
        self._ends.callback(self._process.wait, 30)
        self._ends.callback(self._process.terminate)
        self.requested: list[str] = []
        self._numbers = itertools.count(1)
        listening = wait_for(lambda: LISTENS.search(self._log.read_text()), 60)
        self._socket = self._ends.enter_context(
            connect(self._address(listening[1]), max_size=None)
        )
        for domain in ("Network", "Page", "Runtime"):
            self.call(f"{domain}.enable")

    @staticmethod
    def _address(host: str) -> str:
        import httpx

        pages = httpx.get(f"http://{host}/json").json()
        return next(p for p in pages if p["type"] == "page")["webSocketDebuggerUrl"]

    def call(self, method: str, **params: Any) -> Any:
        number = next(self._numbers)
        message = {"id": number, "method": method, "params": params}
        self._socket.send(json.dumps(message))
        while True:
            answer = json.loads(self._socket.recv(timeout=60))
            if answer.get("method") == "Network.requestWillBeSent":
                self.requested.append(answer["params"]["request"]["url"])
            if answer.get("id") == number:
                return answer["result"]

    def open(self, url: str) -> None:
        self.call("Page.navigate", url=url)

    def value(self, expression: str) -> Any:
        """Of JavaScript, as JSON."""
        found = self.call("Runtime.evaluate", expression=expression, returnByValue=True)
        return found["result"].get("value")

    def close(self) -> None:
        self._ends.close()


def wait_for(found: Callable[[], Any], seconds: float) -> Any:
    """What `found` returns, once that is something.

    Raises TimeoutError if it never is.
    """
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        value = found()
        if value:
            return value
        time.sleep(0.1)
    raise TimeoutError(f"nothing was found in {seconds} s")
