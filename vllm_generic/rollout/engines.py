# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One way to ask for answers, whatever kind of engine there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm import LLM, RequestOutput, SamplingParams


@dataclass
class Request:
    """A prompt, and how to sample its answers.

    Args:
        prompt: The text, or "".
        prompt_token_ids: The tokens, which alone the engine sees.
        params: How to sample.
        prompt_index: Its position in the batch.

    """

    prompt: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_index: int


class Engine(Protocol):
    """What a `VLLMModule` asks of the engine or engines behind it."""

    handles: Any
    """What `WeightSync` takes as its engine."""

    def seq_length(self) -> int:
        """The most tokens of a prompt and its answer."""

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """The outputs of all requests, in their order.

        If it raises, also KeyboardInterrupt, none of the requests goes on.
        """

    def sleep(self, level: int) -> None: ...

    def wake_up(self, tags: list[str] | None) -> None: ...

    def close(self) -> None: ...


class LocalEngine:
    """An `LLM` of this program: all requests of a batch at once, in a fixed order."""

    def __init__(self, llm: LLM) -> None:
        self.handles = llm
        self._llm = llm

    def seq_length(self) -> int:
        return self._llm.model_config.max_model_len

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        prompts: list[Any] = [
            {"prompt_token_ids": request.prompt_token_ids} for request in requests
        ]
        params = [request.params for request in requests]
        request_ids = self._llm.enqueue(prompts, params, use_tqdm=False)
        try:
            outputs = self._llm.wait_for_completion(RequestOutput, use_tqdm=False)
        except BaseException:
            # Else the next call would also wait for these requests.
            self._llm.llm_engine.abort_request(request_ids, internal=True)
            raise
        for request, output in zip(requests, outputs, strict=True):
            output.prompt = request.prompt
        return outputs

    def sleep(self, level: int) -> None:
        self._llm.sleep(level)

    def wake_up(self, tags: list[str] | None) -> None:
        self._llm.wake_up(tags)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
