# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Calls all engines of a trainer together, and collects their failures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from typing import Any, TypeVar

from vllm.distributed.weight_sync.clients import Client, Mode, client_of

T = TypeVar("T")


class Engines:
    """What the trainer's first rank calls.

    Args:
        engines: What a user names as engines.
        timeout: Seconds for any call.

    Raises:
        TypeError: one of them is no engine.

    """

    def __init__(self, engines: Sequence[object], timeout: float) -> None:
        self._clients = [client_of(each, timeout) for each in engines]
        # Of this update, by name: not to be called again; failed in a call; begun.
        self._lost: set[str] = set()
        self._failed: set[str] = set()
        self._begun: set[str] = set()
        self.slept = False  # one of them, before this update
        self.urls = [client.url for client in self._clients if client.url is not None]

    def look(self) -> None:
        """Learn how many ranks the engines have, and which weights they serve."""
        self._sizes = self._all(lambda client: client.size())
        self._versions = self._all(lambda client: client.version())

    @property
    def version(self) -> int:
        """The newest number that an engine's weights have; 0 if none has one."""
        return max((int(v) for v in self._versions if v.isdecimal()), default=0)

    def rank_names(self) -> list[str]:
        """What each engine rank is called, in the order of their numbers."""
        names = []
        for client, size in zip(self._clients, self._sizes, strict=True):
            names += [
                client.name if size == 1 else f"rank {rank} of {client.name}"
                for rank in range(size)
            ]
        return names

    def init(self, info: dict[str, Any]) -> None:
        """Let all engines meet this trainer.

        One that has older weights than others, because it was started again, refuses
        requests from now until it is updated.
        """
        firsts = accumulate(self._sizes, initial=0)
        for client, first, has in zip(
            self._clients, firsts, self._versions, strict=False
        ):
            refuses = ""
            if self.version and has != str(self.version):
                refuses = (
                    f"This engine has version {has} of the weights, and other engines "
                    f"of its trainer have version {self.version}."
                )
            client.init(info | {"first_rank": first, "refuses": refuses})

    def begin(self, update: int, pause: Mode | None) -> list[str]:
        """Let all engines start to receive, paused first if `mode` is given.

        If one fails, nothing is to be sent to any.
        """
        self._lost.clear()
        self._failed.clear()
        self._begun.clear()

        def wake(client: Client) -> None:
            if client.wake():
                self.slept = True

        def begin(client: Client) -> None:
            client.begin(update)
            self._begun.add(client.name)

        self.slept = False
        failures = self.call(wake)
        if pause is not None and not failures:
            failures = self.call(lambda client: client.pause(pause))
        return failures or self.call(begin)

    def finish(self, version: str | None) -> list[str]:
        """Let the engines that have begun commit or discard; returns their failures."""

        def finish(client: Client) -> None:
            if client.name in self._begun:
                client.finish(version)

        return self.call(finish)

    def call(self, action: Callable[[Client], None]) -> list[str]:
        """Call every engine, also after one has failed; returns the failures.

        What an engine says after its first failure of an update is left out.
        """

        def attempt(client: Client) -> str:
            name = client.name
            if name in self._lost:
                return ""
            try:
                action(client)
            except Exception as error:
                if isinstance(error, (ConnectionError, TimeoutError)):
                    self._lost.add(name)
                if name not in self._failed:
                    self._failed.add(name)
                    return f"{name}: {type(error).__name__}: {error}"
            return ""

        return [failure for failure in self._all(attempt) if failure]

    def check(self) -> None:
        """Raise ConnectionError if an engine is known to be gone."""
        for client in self._clients:
            client.check()

    def _all(self, action: Callable[[Client], T]) -> list[T]:
        if len(self._clients) == 1:
            return [action(self._clients[0])]
        with ThreadPoolExecutor(max(1, len(self._clients))) as pool:
            return list(pool.map(action, self._clients))
