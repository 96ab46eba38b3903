# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The calls of an engine that an update needs, for each way to reach an engine."""

from __future__ import annotations

import asyncio
import inspect
import threading
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol

import requests

from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.entrypoints.llm import LLM
from vllm.v1.engine.async_llm import AsyncLLM

Mode = Literal["keep", "wait", "abort"]
WEIGHTS, KV_CACHE = ["weights"], ["kv_cache"]


class Client(Protocol):
    """One engine, or several that share a front-end."""

    def size(self) -> int:
        """How many ranks it has, those of data-parallel engines included."""

    def init(self, info: dict[str, Any]) -> None: ...

    def begin(self, update: int) -> None:
        """Let all ranks start to receive."""

    def pause(self, mode: Mode) -> None: ...

    def finish(self, version: str | None) -> None:
        """Let all ranks commit or discard. Without a version the label stays."""

    def clear_caches(self) -> None: ...

    def resume(self) -> None: ...


def client_of(engine: object, timeout: float) -> Client:
    """The client for what a user names as an engine.

    Raises:
        TypeError: it is none of those that are known.

    """
    if isinstance(engine, LLM):
        return LLMClient(engine)
    if isinstance(engine, AsyncLLM):
        return AsyncLLMClient(engine, timeout)
    if isinstance(engine, str):
        return HTTPClient(engine, timeout)
    raise TypeError(
        f"WeightSync got {engine!r} as an engine; expected an LLM, an AsyncLLM, or the "
        'URLs of servers, such as ["http://host:8000"].'
    )


class LLMClient:
    """An `LLM`, whose requests all have ended when it is not in a call."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def size(self) -> int:
        return self._llm.llm_engine.vllm_config.parallel_config.world_size_across_dp

    def init(self, info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine(WeightTransferInitRequest(info))

    def begin(self, update: int) -> None:
        _start(self._llm.start_weight_update, lambda: self.finish(None))
        self._llm.update_weights(WeightTransferUpdateRequest({"update": update}))

    def pause(self, mode: Mode) -> None:
        pass

    def finish(self, version: str | None) -> None:
        self._llm.finish_weight_update(**_version(self._llm, version))

    def clear_caches(self) -> None:
        self._llm.reset_prefix_cache()

    def resume(self) -> None:
        pass


class AsyncLLMClient:
    """An `AsyncLLM`, called from another thread than that of its event loop."""

    def __init__(self, engine: AsyncLLM, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._mode: Mode = "keep"
        try:
            self._loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "WeightSync of an AsyncLLM has to be made in its event loop. Make it "
                "in a coroutine, and call `await asyncio.to_thread(sync.update)`."
            ) from None
        self._loop_thread = threading.get_ident()

    def _run(self, call: Coroutine[Any, Any, Any]) -> Any:
        if threading.get_ident() == self._loop_thread:
            call.close()
            raise RuntimeError(
                "WeightSync.update() waits for the AsyncLLM, whose event loop it would "
                "stop. Call `await asyncio.to_thread(sync.update)`."
            )
        future = asyncio.run_coroutine_threadsafe(call, self._loop)
        return future.result(self._timeout)

    def size(self) -> int:
        return self._engine.vllm_config.parallel_config.world_size_across_dp

    def init(self, info: dict[str, Any]) -> None:
        request = WeightTransferInitRequest(info)
        self._run(self._engine.init_weight_transfer_engine(request))

    def begin(self, update: int) -> None:
        _start(
            lambda: self._run(self._engine.start_weight_update()),
            lambda: self.finish(None),
        )
        request = WeightTransferUpdateRequest({"update": update})
        self._run(self._engine.update_weights(request))

    def pause(self, mode: Mode) -> None:
        self._mode = mode
        self._run(self._engine.pause_generation(mode=mode, clear_cache=False))

    def finish(self, version: str | None) -> None:
        self._run(self._engine.finish_weight_update(**_version(self._engine, version)))

    def clear_caches(self) -> None:
        # Requests that go on compute their keys and values anew.
        keep = self._mode == "keep"
        self._run(self._engine.reset_prefix_cache(reset_running_requests=keep))

    def resume(self) -> None:
        self._run(self._engine.resume_generation())


class HTTPClient:
    """A server that was started with `VLLM_SERVER_DEV_MODE=1`."""

    def __init__(self, url: str, timeout: float) -> None:
        self._url = url.rstrip("/")
        self._timeout = timeout
        self._session = requests.Session()
        self._mode: Mode = "keep"

    def _call(self, method: str, path: str, **arguments: Any) -> Any:
        answer = self._session.request(
            method, f"{self._url}{path}", timeout=self._timeout, **arguments
        )
        if answer.status_code == requests.codes.not_found:
            raise RuntimeError(
                f"{self._url} has no {path}. Start the server with "
                "VLLM_SERVER_DEV_MODE=1, and where only trainers can reach it."
            )
        if not answer.ok:
            self._session.close()  # the server closes its end after an error
            raise RuntimeError(f"{self._url}{path}: {answer.text.strip()[:500]}")
        return answer.json() if answer.content else None

    def size(self) -> int:
        return int(self._call("GET", "/get_world_size")["world_size"])

    def init(self, info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": info})

    def begin(self, update: int) -> None:
        _start(
            lambda: self._call("POST", "/start_weight_update"),
            lambda: self.finish(None),
        )
        info = {"update_info": {"update": update}}
        self._call("POST", "/update_weights", json=info)

    def pause(self, mode: Mode) -> None:
        self._mode = mode
        self._call("POST", "/pause", params={"mode": mode, "clear_cache": "false"})

    def finish(self, version: str | None) -> None:
        self._call("POST", "/finish_weight_update", json=_given(version))

    def clear_caches(self) -> None:
        keep = str(self._mode == "keep").lower()
        self._call(
            "POST", "/reset_prefix_cache", params={"reset_running_requests": keep}
        )

    def resume(self) -> None:
        self._call("POST", "/resume")


def _start(start: Callable[[], None], finish: Callable[[], None]) -> None:
    """Start an update, after ending one that a killed trainer has left open.

    Nothing of that one is committed: the engine forgot it when it met this trainer.
    """
    try:
        start()
    except Exception as error:
        try:
            finish()
        except Exception:
            raise error from None  # none was open, so the first says what is wrong
        start()


def _version(engine: LLM | AsyncLLM, version: str | None) -> dict[str, str]:
    """The argument for it, of releases that have one."""
    parameters = inspect.signature(engine.finish_weight_update).parameters
    return _given(version) if "weight_version" in parameters else {}


def _given(version: str | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": version}
