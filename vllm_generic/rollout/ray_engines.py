# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines in processes that Ray has placed on the nodes of its cluster.

Ray decides where each is, starts it, and says when it is gone. Its calls are those of
an `AsyncLLM` in this program, and those that `WeightSync` makes of one.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError

from vllm import AsyncEngineArgs, RequestOutput
from vllm.distributed.weight_sync.clients import AsyncLLMClient, Mode
from vllm.v1.engine.async_llm import AsyncLLM
from vllm_generic.rollout.async_engines import AsyncLLMEngine, EngineLostError
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.engine_args import Factory, engine_args, register
from vllm_generic.rollout.engines import Request

# Requests and calls of an update; vLLM's own limit is `max_num_seqs`.
MOST_CALLS = 1 << 16


class _Placed:
    """What Ray starts: an engine, with its side of both kinds of calls."""

    async def start(self, config: RolloutConfig, factory: Factory | str | None) -> Any:
        """Make the engine; its capacity and its longest sequence."""
        if factory is not None:
            register(config, factory)
        args = AsyncEngineArgs(**engine_args(config))
        engine = AsyncLLM.from_engine_args(args)
        self._engine = AsyncLLMEngine(engine)
        self._client = AsyncLLMClient(engine, config.timeout)
        return self._engine.capacity(), engine.model_config.max_model_len

    async def engine(self, call: str, *arguments: Any) -> Any:
        return await getattr(self._engine, call)(*arguments)

    async def client(self, call: str, *arguments: Any) -> Any:
        # In a thread, because it waits for the engine in this event loop.
        return await asyncio.to_thread(getattr(self._client, call), *arguments)


class RayEngine:
    """An engine of a node, by Ray's handle of its process."""

    def __init__(self, actor: Any, name: str, timeout: float) -> None:
        self.handle = RayClient(actor, name, timeout)
        self.name = name
        self._actor = actor
        self._capacity = 0
        self.seq_length = 0

    async def start(
        self, config: RolloutConfig, factory: Factory | str | None, asked: object
    ) -> None:
        """Wait for its process, and make the engine there.

        Args:
            config: How to make it.
            factory: Builds the model.
            asked: What it needs of a node, for messages.

        Raises:
            TimeoutError: Ray has not started it, as where there is no room.

        """
        placed = self._actor.__ray_ready__.remote()
        ready, _ = await asyncio.to_thread(ray.wait, [placed], timeout=config.timeout)
        if not ready:
            raise TimeoutError(
                f"Ray has not started {self.name} in {config.timeout:.0f} s. It asks "
                f"for {asked}, and the cluster has {ray.available_resources()} free. "
                "Change ray_options, or wait longer by timeout."
            )
        start = self._actor.start.remote(config, factory)
        self._capacity, self.seq_length = await self._answer(start)

    def capacity(self) -> int:
        return self._capacity

    async def generate(self, request: Request) -> RequestOutput:
        return await self._call("generate", request)

    async def check(self) -> None:
        await self._call("check")

    async def sleep(self, level: int) -> None:
        await self._call("sleep", level)

    async def wake_up(self, tags: list[str]) -> None:
        await self._call("wake_up", tags)

    async def close(self) -> None:
        try:
            await self._call("close")
        except EngineLostError:
            return  # with its node
        ray.kill(self._actor)

    async def _call(self, name: str, *arguments: Any) -> Any:
        return await self._answer(self._actor.engine.remote(name, *arguments))

    async def _answer(self, answer: Any) -> Any:
        try:
            return await answer
        except asyncio.CancelledError:
            ray.cancel(answer)
            raise
        except RayActorError as error:
            raise EngineLostError(f"{self.name} is gone: {error}") from error
        except RayTaskError as error:
            raise error.cause from None


class RayClient:
    """The calls that `WeightSync` makes of such an engine."""

    def __init__(self, actor: Any, name: str, timeout: float) -> None:
        self.name = name
        # Where all nodes find each other, and so this program's address towards them.
        self.url = f"tcp://{ray.get_runtime_context().gcs_address}"
        self._actor = actor
        self._timeout = timeout

    def check(self) -> None:
        self._call("check")

    def version(self) -> str:
        return self._call("version")

    def size(self) -> int:
        return self._call("size")

    def init(self, info: dict[str, Any]) -> None:
        self._call("init", info)

    def wake(self) -> bool:
        return self._call("wake")

    def begin(self, update: int) -> None:
        self._call("begin", update)

    def pause(self, mode: Mode) -> None:
        self._call("pause", mode)

    def finish(self, version: str | None) -> None:
        self._call("finish", version)

    def clear_caches(self) -> None:
        self._call("clear_caches")

    def resume(self) -> None:
        self._call("resume")

    def _call(self, name: str, *arguments: Any) -> Any:
        answer = self._actor.client.remote(name, *arguments)
        try:
            return ray.get(answer, timeout=self._timeout)
        except GetTimeoutError as error:
            raise TimeoutError(f"No answer within {self._timeout:.0f} s.") from error
        except RayActorError as error:
            raise ConnectionError(f"{self.name} is gone: {error}") from error
        except RayTaskError as error:
            raise error.cause from None


async def place(
    config: RolloutConfig, factory: Factory | str | None
) -> Sequence[RayEngine]:
    """Engines on the nodes of Ray's cluster, as many as `ray_engines` says."""
    if not ray.is_initialized():
        ray.init()
    devices = (
        config.tensor_model_parallel_size
        * config.pipeline_model_parallel_size
        * config.data_parallel_size
    )
    resource = "num_gpus" if "GPU" in ray.cluster_resources() else "num_cpus"
    asked = {resource: devices} | config.ray_options
    defaults = {"scheduling_strategy": "SPREAD", "max_concurrency": MOST_CALLS}
    actor = ray.remote(_Placed).options(**(defaults | asked))
    engines = [
        RayEngine(actor.remote(), f"engine {number} of Ray", config.timeout)
        for number in range(config.ray_engines)
    ]
    starts = (engine.start(config, factory, asked) for engine in engines)
    outcomes = await asyncio.gather(*starts, return_exceptions=True)
    failures = [each for each in outcomes if isinstance(each, BaseException)]
    if failures:
        for engine in engines:
            ray.kill(engine._actor)
        raise failures[0]
    return engines
