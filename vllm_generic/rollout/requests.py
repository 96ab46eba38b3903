# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Makes requests from a batch of prompts: checks, seeds and expected lengths."""

from __future__ import annotations

import copy
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vllm import RequestOutput
from vllm_generic.rollout.config import RolloutConfig
from vllm_generic.rollout.engines import Request


def make_requests(
    config: RolloutConfig,
    prompts: Sequence[str] | None,
    input_ids: Sequence[Sequence[int]] | None,
    seq_length: int,
    tokenizer: Any | None,
    is_eval: bool,
) -> list[Request]:
    """A request for each prompt of a batch.

    Raises:
        ValueError: a prompt is empty or leaves no room for an answer; it is named by
            its position in the batch.

    """
    if input_ids is None:
        if prompts is None or tokenizer is None:
            raise ValueError(
                "A batch needs input_ids, or prompt and a tokenizer; see build_dataset."
            )
        input_ids = [tokenizer.encode(text) for text in prompts]
    texts = prompts or [""] * len(input_ids)
    requests = []
    for index, (text, given) in enumerate(zip(texts, input_ids, strict=True)):
        ids = [int(token) for token in given]
        if not 0 < len(ids) < seq_length:
            raise ValueError(
                f"Prompt {index} of the batch has {len(ids)} tokens; expected 1 to "
                f"{seq_length - 1}, so that there is room for an answer."
            )
        params = config.sampling_params(
            len(ids), seq_length, is_eval=is_eval, tokenizer=tokenizer
        )
        requests.append(Request(text, ids, params, index))
    return requests


def set_seeds(
    requests: Iterable[Request], seed: int, iteration: int, is_eval: bool
) -> None:
    """Give each request its own seed: the same whenever a batch is repeated."""
    for request in requests:
        what = json.dumps([seed, iteration, request.prompt_index, is_eval])
        digest = hashlib.blake2b(what.encode(), digest_size=7).digest()
        request.params.seed = int.from_bytes(digest)


def one_answer_each(requests: Iterable[Request]) -> list[Request]:
    """Requests of one answer in place of those of several, with seeds of their own."""
    single = []
    for request in requests:
        for number in range(request.params.n):
            one = copy.copy(request)
            one.params = copy.deepcopy(request.params)
            one.params.n = 1
            if one.params.seed is not None:
                # Turns of an episode count on from here.
                one.params.seed += number << 16
            single.append(one)
    return single


class AnswerLengths:
    """How long answers were, to begin with the longest the next time.

    A prompt is known by its `prompt_index` in the data set. One that was never answered
    is expected to use all tokens that it may.
    """

    def __init__(self) -> None:
        self._seen: dict[int, float] = {}

    def expect(self, requests: Iterable[Request], data: Mapping[str, Any]) -> None:
        known = data.get("prompt_index")
        for request in requests:
            longest = float(request.params.max_tokens or 0)
            if known is None:
                request.expected_tokens = longest
            else:
                index = known[request.prompt_index]
                request.expected_tokens = self._seen.get(index, longest)

    def note(self, outputs: Sequence[RequestOutput], data: Mapping[str, Any]) -> None:
        for index, output in zip(data.get("prompt_index") or (), outputs, strict=False):
            total = sum(len(completion.token_ids) for completion in output.outputs)
            self._seen[index] = total / max(len(output.outputs), 1)
