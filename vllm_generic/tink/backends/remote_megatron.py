# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling by megatron-core's text-generation server, `PUT /api`.

It has one model without adapters, and takes and gives texts.
"""

from typing import Any

import httpx

from vllm_generic.tink.backends.base import (
    SampledSequence,
    SampleJob,
    SampleOutput,
    Version,
)

MOST_PROMPTS = 128


class RemoteMegatron:
    """The server at MEGATRON_SERVER_URL, with the base model.

    Args:
        url: without `/api`.
        tokenizer: the one that the server has.
        max_length: of prompt and answer together.

    """

    def __init__(
        self, url: str, tokenizer: Any, max_length: int, timeout: float = 600.0
    ) -> None:
        self._url = url.rstrip("/")
        self._tokenizer = tokenizer
        self._max_length = max_length
        self._client = httpx.Client(timeout=timeout)

    def close(self) -> None:
        self._client.close()

    def unsupported(self, version: Version | None, job: SampleJob) -> str | None:
        params = job.params
        asked = {
            "adapters": version is not None,
            "log-probabilities of prompts": job.scores_prompt,
            "several log-probabilities for a token": job.topk_sample > 0,
            "a seed": params.seed is not None,
            "stop strings or tokens": params.stop_strings or params.stop_tokens,
            "answers that go on after the end token": params.ignore_eos,
            "top_k beside top_p": params.top_k > 0 and params.top_p < 1,
            f"more than {MOST_PROMPTS} samples": job.num_samples > MOST_PROMPTS,
            "no tokens to generate": params.max_tokens == 0,
        }
        for name, is_asked in asked.items():
            if is_asked:
                return f"Megatron's text-generation server does not take {name}"
        if self._tokenizer.encode(self._tokenizer.decode(job.prompt)) != job.prompt:
            return "the prompt is no text that a Megatron server reads as these tokens"
        return None

    def sample(self, version: Version | None, job: SampleJob) -> SampleOutput:
        answer = self._put(self._body(job))
        sequences = []
        for tokens, logprobs in zip(answer["tokens"], answer["logprobs"], strict=True):
            if tokens[: len(job.prompt)] != job.prompt:
                raise RuntimeError(
                    f"The Megatron server at {self._url} reads the prompt as other "
                    "tokens; start it with the tokenizer of this model."
                )
            drawn = tokens[len(job.prompt) :]
            stopped = bool(drawn) and drawn[-1] == self._tokenizer.eos_token_id
            values = logprobs[len(logprobs) - len(drawn) :]
            sequences.append(SampledSequence(drawn, values, stopped))
        return SampleOutput(sequences)

    def _body(self, job: SampleJob) -> dict[str, Any]:
        params = job.params
        limit = self._max_length - len(job.prompt)
        body: dict[str, Any] = {
            "prompts": [self._tokenizer.decode(job.prompt)] * job.num_samples,
            "tokens_to_generate": min(limit, params.max_tokens or limit),
            "logprobs": True,
            "no_log": True,
        }
        if params.temperature == 0:
            return body | {"top_k": 1}
        body["temperature"] = params.temperature
        if params.top_k > 0:
            body["top_k"] = params.top_k
        if params.top_p < 1:
            body["top_p"] = float(params.top_p)
        return body

    def _put(self, body: dict[str, Any]) -> dict[str, Any]:
        try:
            answer = self._client.put(f"{self._url}/api", json=body)
        except httpx.TransportError as error:
            raise ConnectionError(
                f"The Megatron server can't be reached at {self._url} ({error}). Start "
                "it, or correct MEGATRON_SERVER_URL."
            ) from error
        # it answers an error of a request by a text, with whatever status
        if answer.is_error or not isinstance(answer.json(), dict):
            raise RuntimeError(
                f"The Megatron server at {self._url} answered {answer.status_code}: "
                f"{answer.text.strip()}"
            )
        return answer.json()
