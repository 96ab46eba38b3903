# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The calls of an engine that an update needs, for each way to reach an engine."""

from __future__ import annotations

import asyncio
import concurrent.futures
import inspect
import threading
import time
from collections.abc import Callable, Coroutine
from typing import Any, Literal, Protocol, runtime_checkable

import requests

from vllm.distributed.weight_transfer.base import (
    WeightTransferInitRequest,
    WeightTransferUpdateRequest,
)
from vllm.entrypoints.llm import LLM
from vllm.v1.engine.async_llm import AsyncLLM

Mode = Literal["keep", "wait", "abort"]
WEIGHTS, KV_CACHE = ["weights"], ["kv_cache"]  # tags of what sleeps
FIRST_VERSION = "default"
HEALTH_S = 2.0  # between two looks whether a server is there


@runtime_checkable
class Client(Protocol):
    """One engine, or several that share a front-end.

    Calls raise ConnectionError if the engine is gone, and TimeoutError if it is late.
    """

    name: str
    url: str | None
    """Where it listens on a network, if it is in another program."""

    def check(self) -> None:
        """Raise ConnectionError if it is gone, as far as that is seen at once."""

    def version(self) -> str:
        """The label of its weights; "default" before the first update."""

    def size(self) -> int:
        """How many ranks it has, those of data-parallel engines included."""

    def init(self, info: dict[str, Any]) -> None: ...

    def wake(self) -> bool:
        """Wake the weights if the engine sleeps; whether it does."""

    def begin(self, update: int) -> None:
        """Let all ranks start to receive."""

    def pause(self, mode: Mode) -> None: ...

    def finish(self, version: str | None) -> None:
        """Let all ranks commit or discard. Without a version the label stays."""

    def clear_caches(self) -> None:
        """Forget what old weights have computed: keys, values and embeddings of images.

        Also what a KV connector keeps elsewhere, if it can forget.

        Raises:
            RuntimeError: something still holds keys and values.

        """

    def resume(self) -> None:
        """Let requests run, after waking the KV cache if it sleeps."""


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
    if isinstance(engine, Client):
        return engine
    raise TypeError(
        f"WeightSync got {engine!r} as an engine; expected an LLM, an AsyncLLM, or the "
        'URLs of servers, such as ["http://host:8000"].'
    )


class LLMClient:
    """An `LLM`, whose requests all have ended when it is not in a call."""

    name = "the LLM"
    url: str | None = None

    def __init__(self, llm: LLM) -> None:
        self._llm = llm
        self._slept = False

    def check(self) -> None:
        pass  # its processes are those of its ranks, or end them

    def version(self) -> str:
        get = getattr(self._llm, "get_weight_version", None)  # since 0.32.0
        return FIRST_VERSION if get is None else get()

    def size(self) -> int:
        return self._llm.llm_engine.vllm_config.parallel_config.world_size_across_dp

    def init(self, info: dict[str, Any]) -> None:
        self._llm.init_weight_transfer_engine(WeightTransferInitRequest(info))

    def wake(self) -> bool:
        self._slept = self._llm.llm_engine.is_sleeping()
        if self._slept:
            self._llm.wake_up(tags=WEIGHTS)
        return self._slept

    def begin(self, update: int) -> None:
        _start(self._llm.start_weight_update, lambda: self.finish(None))
        self._llm.update_weights(WeightTransferUpdateRequest({"update": update}))

    def pause(self, mode: Mode) -> None:
        pass

    def finish(self, version: str | None) -> None:
        self._llm.finish_weight_update(**_version(self._llm, version))

    def clear_caches(self) -> None:
        _require_reset(self._llm.reset_prefix_cache(reset_connector=True))
        if self._llm.model_config.is_multimodal_model:
            self._llm.llm_engine.reset_encoder_cache()

    def resume(self) -> None:
        if self._slept:
            self._llm.wake_up(tags=KV_CACHE)


class AsyncLLMClient:
    """An `AsyncLLM`, called from another thread than that of its event loop."""

    name = "the AsyncLLM"
    url: str | None = None

    def __init__(self, engine: AsyncLLM, timeout: float) -> None:
        self._engine = engine
        self._timeout = timeout
        self._mode: Mode = "keep"
        self._slept = False
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
        try:
            return future.result(self._timeout)
        except concurrent.futures.TimeoutError:
            future.cancel()
            raise TimeoutError(f"No answer within {self._timeout:.0f} s.") from None

    def check(self) -> None:
        if self._engine.errored:
            raise ConnectionError(f"{self.name} has died: {self._engine.dead_error}")

    def version(self) -> str:
        get = getattr(self._engine, "get_weight_version", None)  # since 0.32.0
        return FIRST_VERSION if get is None else self._run(get())

    def size(self) -> int:
        return self._engine.vllm_config.parallel_config.world_size_across_dp

    def init(self, info: dict[str, Any]) -> None:
        request = WeightTransferInitRequest(info)
        self._run(self._engine.init_weight_transfer_engine(request))

    def wake(self) -> bool:
        self._slept = self._run(self._engine.is_sleeping())
        if self._slept:
            self._run(self._engine.wake_up(WEIGHTS))
        return self._slept

    def begin(self, update: int) -> None:
        _start(
            lambda: self._run(self._engine.start_weight_update()),
            lambda: self.finish(None),
        )
        request = WeightTransferUpdateRequest({"update": update})
        self._run(self._engine.update_weights(request))

    def pause(self, mode: Mode) -> None:
        self._mode = mode
        # Not pause_generation(), which then sleeps for 20 ms while nothing is served.
        core = self._engine.engine_core
        self._run(core.pause_scheduler_async(mode=mode, clear_cache=False))

    def finish(self, version: str | None) -> None:
        self._run(self._engine.finish_weight_update(**_version(self._engine, version)))

    def clear_caches(self) -> None:
        # Requests that go on compute their keys and values anew.
        keep = self._mode == "keep"
        reset = self._engine.reset_prefix_cache(keep, reset_connector=True)
        _require_reset(self._run(reset))
        if self._engine.model_config.is_multimodal_model:
            self._run(self._engine.reset_encoder_cache())

    def resume(self) -> None:
        if self._slept:
            self._run(self._engine.wake_up(KV_CACHE))
        self._run(self._engine.resume_generation())


class HTTPClient:
    """A server that was started with `VLLM_SERVER_DEV_MODE=1`."""

    def __init__(self, url: str, timeout: float) -> None:
        self.url: str | None = url.rstrip("/")
        self._timeout = timeout
        self._session = requests.Session()
        self._mode: Mode = "keep"
        self._slept = False
        self._checked = 0.0
        self.name = self.url

    def _call(
        self, method: str, path: str, optional: bool = False, **arguments: Any
    ) -> Any:
        try:
            answer = self._session.request(
                method, f"{self.url}{path}", timeout=self._timeout, **arguments
            )
        except requests.Timeout:
            raise TimeoutError(
                f"{path} was not answered within {self._timeout:.0f} s."
            ) from None
        except requests.ConnectionError as error:
            raise ConnectionError(f"The server is gone: {error}") from error
        if answer.status_code == requests.codes.not_found:
            if optional:
                return None
            raise RuntimeError(
                f"{self.url} has no {path}. Start the server with "
                "VLLM_SERVER_DEV_MODE=1, and where only trainers can reach it."
            )
        if not answer.ok:
            self._session.close()  # the server closes its end after an error
            raise RuntimeError(f"{self.url}{path}: {answer.text.strip()[:500]}")
        return answer.json() if answer.content else None

    def check(self) -> None:
        if time.monotonic() < self._checked + HEALTH_S:
            return
        self._checked = time.monotonic()
        try:
            answer = requests.get(f"{self.url}/health", timeout=HEALTH_S)
        except requests.Timeout:
            return  # it may be busy
        except requests.ConnectionError as error:
            raise ConnectionError(f"{self.name} is gone: {error}") from error
        if answer.status_code == requests.codes.service_unavailable:
            raise ConnectionError(f"The engine of {self.name} has died.")

    def version(self) -> str:
        info = self._call("GET", "/weight_info", optional=True)  # since 0.32.0
        return FIRST_VERSION if info is None else str(info["weight_version"])

    def size(self) -> int:
        return int(self._call("GET", "/get_world_size")["world_size"])

    def init(self, info: dict[str, Any]) -> None:
        self._call("POST", "/init_weight_transfer_engine", json={"init_info": info})

    def wake(self) -> bool:
        # A server that runs without sleep mode may have no such path.
        found = self._call("GET", "/is_sleeping", optional=True)
        self._slept = bool(found and found["is_sleeping"])
        if self._slept:
            self._call("POST", "/wake_up", params={"tags": WEIGHTS})
        return self._slept

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
        params = {"reset_running_requests": keep, "reset_external": "true"}
        answer = self._call("POST", "/reset_prefix_cache", params=params)
        _require_reset(answer is None or answer["success"])
        self._call("POST", "/reset_encoder_cache", optional=True)

    def resume(self) -> None:
        if self._slept:
            self._call("POST", "/wake_up", params={"tags": KV_CACHE})
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


def _require_reset(done: bool) -> None:
    if not done:
        raise RuntimeError(
            "Keys and values of the old weights are still in its cache, because "
            "something holds them, such as a transfer by a KV connector. Call update() "
            "again before you trust its answers."
        )


def _version(engine: LLM | AsyncLLM, version: str | None) -> dict[str, str]:
    """The argument for it, of releases that have one."""
    parameters = inspect.signature(engine.finish_weight_update).parameters
    return _given(version) if "weight_version" in parameters else {}


def _given(version: str | None) -> dict[str, str]:
    return {} if version is None else {"weight_version": version}
