# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""One way to ask for answers, whatever kind of engine there is."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from vllm import LLM, RequestOutput, SamplingParams
from vllm.distributed.weight_sync import WeightSync


@dataclass
class Request:
    """A prompt, and how to sample its answers.

    Args:
        prompt: The text, or "".
        prompt_token_ids: The tokens, which alone the engine sees.
        params: How to sample.
        prompt_index: Its position in the batch.
        expected_tokens: About how long an answer will be; the longest begin first.
        batch: Requests of an earlier batch begin before those of a later one.

    """

    prompt: str
    prompt_token_ids: list[int]
    params: SamplingParams
    prompt_index: int
    expected_tokens: float = 0.0
    batch: int = 0


class Engine(Protocol):
    """What a `VLLMModule` asks of the engine or engines behind it."""

    def seq_length(self) -> int:
        """The most tokens of a prompt and its answer."""

    def tokenizer(self) -> Any | None:
        """The engine's tokenizer, if it has one."""

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """The outputs of all requests, in their order.

        If it raises, also KeyboardInterrupt, none of the requests goes on.
        """

    def make_sync(self, make: Callable[[Any], WeightSync]) -> WeightSync:
        """Call `make` with the engines, where it has to be called."""

    def has_changed(self) -> bool:
        """Whether an engine was lost since `make_sync`."""

    def lost_some(self) -> bool:
        """Look at all engines: whether some are lost, and others are left."""

    def sleep(self, level: int) -> None: ...

    def wake_up(self, tags: list[str]) -> None: ...

    def close(self) -> None: ...


class LocalEngine:
    """An `LLM` of this program: all requests of a batch at once, in a fixed order."""

    def __init__(self, llm: LLM) -> None:
        self._llm = llm

    def seq_length(self) -> int:
        return self._llm.model_config.max_model_len

    def tokenizer(self) -> Any | None:
        if self._llm.model_config.skip_tokenizer_init:
            return None
        return self._llm.get_tokenizer()

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

    def make_sync(self, make: Callable[[Any], WeightSync]) -> WeightSync:
        return make(self._llm)

    def has_changed(self) -> bool:
        return False

    def lost_some(self) -> bool:
        return False

    def sleep(self, level: int) -> None:
        if self._llm.model_config.enable_sleep_mode:
            self._llm.sleep(level)

    def wake_up(self, tags: list[str]) -> None:
        if self._llm.model_config.enable_sleep_mode:
            self._llm.wake_up(tags)

    def close(self) -> None:
        self._llm.llm_engine.engine_core.shutdown()
