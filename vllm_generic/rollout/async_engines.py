# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Engines that answer while others do something else: `AsyncLLM` and servers."""

from __future__ import annotations

import json
from typing import Any, Protocol

import aiohttp

from vllm import RequestOutput
from vllm.logprobs import Logprob
from vllm.outputs import CompletionOutput
from vllm.sampling_params import RequestOutputKind
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.exceptions import EngineDeadError
from vllm_generic.rollout.engines import Request

SENT_PARAMS = (
    "n",
    "temperature",
    "top_p",
    "top_k",
    "min_p",
    "seed",
    "max_tokens",
    "ignore_eos",
    "stop",
    "stop_token_ids",
    "logprobs",
    "prompt_logprobs",
)


class EngineLostError(RuntimeError):
    """An engine's process has ended, or nobody listens at its URL."""


class AsyncEngine(Protocol):
    """One engine, called in one event loop."""

    handle: Any
    """What `WeightSync` takes."""

    def capacity(self) -> int:
        """How many sequences it works on at a time."""

    async def generate(self, request: Request) -> RequestOutput:
        """The finished output.

        Raises:
            EngineLostError: it will not answer any more.
            ValueError: it refuses the request.

        """

    async def check(self) -> None:
        """Raise `EngineLostError` if it will not answer any more."""

    async def sleep(self, level: int) -> None: ...

    async def wake_up(self, tags: list[str]) -> None: ...

    async def close(self) -> None: ...


class AsyncLLMEngine:
    """An `AsyncLLM` of this program; vLLM divides requests among its copies."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.handle = engine
        self._engine = engine
        self._number = 0

    def capacity(self) -> int:
        config = self._engine.vllm_config
        copies = config.parallel_config.data_parallel_size
        return config.scheduler_config.max_num_seqs * copies

    async def generate(self, request: Request) -> RequestOutput:
        self._number += 1
        prompt: Any = {"prompt_token_ids": request.prompt_token_ids}
        # Else each output has only those of the n answers that have just grown.
        request.params.output_kind = RequestOutputKind.FINAL_ONLY
        output = None
        try:
            async for output in self._engine.generate(  # noqa: B007
                prompt, request.params, request_id=f"rollout-{self._number}"
            ):
                pass
        except EngineDeadError as error:
            raise EngineLostError("The engine's process has ended.") from error
        assert output is not None
        output.prompt = request.prompt
        return output

    async def check(self) -> None:
        if self._engine.errored:
            raise EngineLostError("The engine's process has ended.")

    async def sleep(self, level: int) -> None:
        if self._engine.model_config.enable_sleep_mode:
            await self._engine.sleep(level)

    async def wake_up(self, tags: list[str]) -> None:
        if self._engine.model_config.enable_sleep_mode:
            await self._engine.wake_up(tags)

    async def close(self) -> None:
        self._engine.shutdown()


class ServerEngine:
    """A `vllm serve` that runs with `VLLM_SERVER_DEV_MODE=1`, by its URL.

    Args:
        url: Such as "http://127.0.0.1:8000".
        capacity: How many sequences it works on at a time.
        timeout: Seconds for a request.
        with_text: Whether it has a tokenizer, and is asked for texts, too.

    """

    def __init__(
        self, url: str, capacity: int, timeout: float, with_text: bool
    ) -> None:
        self.handle = url.rstrip("/")
        self._capacity = capacity
        self._mode = "text" if with_text else "tokens"
        self._timeout = aiohttp.ClientTimeout(total=timeout)
        self._session: aiohttp.ClientSession | None = None

    def capacity(self) -> int:
        return self._capacity

    async def seq_length(self) -> int:
        """The server's limit of a prompt and its answer."""
        models = await self._call("GET", "/v1/models")
        return int(models["data"][0]["max_model_len"])

    async def generate(self, request: Request) -> RequestOutput:
        params = {name: getattr(request.params, name) for name in SENT_PARAMS}
        body = {
            "token_ids": request.prompt_token_ids,
            "sampling_params": {k: v for k, v in params.items() if v is not None},
            "output_mode": self._mode,
        }
        found = await self._call("POST", "/inference/v1/generate", json=body)
        return _output(request, found)

    async def check(self) -> None:
        await self._call("GET", "/health")

    async def sleep(self, level: int) -> None:
        await self._call("POST", "/sleep", params={"level": str(level)})

    async def wake_up(self, tags: list[str]) -> None:
        await self._call("POST", "/wake_up", params=[("tags", tag) for tag in tags])

    async def close(self) -> None:
        """Leave the server, which goes on."""
        if self._session is not None:
            await self._session.close()

    async def _call(self, method: str, path: str, **arguments: Any) -> Any:
        if self._session is None:
            self._session = aiohttp.ClientSession(timeout=self._timeout)
        try:
            async with self._session.request(
                method, self.handle + path, **arguments
            ) as answer:
                if answer.status >= 500:
                    raise EngineLostError(
                        f"{self.handle} answers {answer.status}: {await answer.text()}"
                    )
                if answer.status >= 400:
                    raise ValueError(
                        f"{self.handle}{path} answers {answer.status}: "
                        f"{await answer.text()}"
                    )
                text = await answer.text()
                return json.loads(text) if text else None
        except (aiohttp.ClientError, TimeoutError) as error:
            raise EngineLostError(
                f"{self.handle} does not answer: {type(error).__name__}: {error}"
            ) from error


def _output(request: Request, found: dict[str, Any]) -> RequestOutput:
    """vLLM's object for a server's answer."""
    completions = []
    for choice in found["choices"]:
        token_ids = choice["token_ids"] or []
        entries = (choice["logprobs"] or {"content": []})["content"]
        logprobs = [
            {token: Logprob(entry["logprob"])}
            for token, entry in zip(token_ids, entries, strict=True)
        ]
        completion = CompletionOutput(
            index=choice["index"],
            text=choice.get("text", ""),
            token_ids=token_ids,
            cumulative_logprob=sum(entry["logprob"] for entry in entries),
            logprobs=logprobs,
            finish_reason=choice["finish_reason"],
            stop_reason=choice.get("stop_reason"),
        )
        # A release before 0.32 has no such field, here and in the answer.
        if choice.get("weight_versions") is not None:
            from vllm.outputs import WeightVersionSpan

            completion.weight_versions = [
                WeightVersionSpan(**span) for span in choice["weight_versions"]
            ]
        completions.append(completion)
    prompt_logprobs = found.get("prompt_logprobs")
    if prompt_logprobs is not None:
        prompt_logprobs = [
            at
            and {int(token): Logprob(entry["logprob"]) for token, entry in at.items()}
            for at in prompt_logprobs
        ]
    return RequestOutput(
        request_id=found["request_id"],
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        prompt_logprobs=prompt_logprobs,
        outputs=completions,
        finished=True,
    )
