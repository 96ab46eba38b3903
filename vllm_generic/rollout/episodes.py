# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Rollouts of many turns, as coroutines that record every token of an episode.

    async def play(episode: Episode) -> float:
        turn = await episode.sample()
        episode.give(run_tool(turn.text))
        return judge(await episode.sample())

Tokens stay as they were sampled: nothing is decoded and tokenized again.
"""

from __future__ import annotations

import asyncio
import copy
from collections import Counter
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass
from typing import Any

from vllm import RequestOutput
from vllm_generic.rollout.batch import NOT_SAMPLED, Sample, samples_of
from vllm_generic.rollout.engines import Request
from vllm_generic.rollout.pool import all_or_none

Ask = Callable[[Request], Awaitable[RequestOutput]]


@dataclass
class Turn:
    """What was sampled at once.

    Args:
        text: The text, if there is a tokenizer.
        token_ids: The tokens.
        finish_reason: "stop", or "length" if there was no more room.

    """

    text: str
    token_ids: list[int]
    finish_reason: str | None


class Episode:
    """One rollout: a prompt, and what follows it.

    Args:
        row: The columns of its prompt.
        request: The prompt, and how to sample; with `n=1`.
        seq_length: The most tokens of all together.
        ask: Asks the engine.
        tokenizer: For texts that are given.
        version: The weights' number, if vLLM's release does not say.

    """

    def __init__(
        self,
        row: dict[str, Any],
        request: Request,
        seq_length: int,
        ask: Ask,
        tokenizer: Any | None,
        version: Callable[[], int],
    ) -> None:
        self.row = row
        self.sample_so_far = Sample(
            request.prompt_index, request.prompt, list(request.prompt_token_ids)
        )
        self._request = request
        self._seq_length = seq_length
        self._ask = ask
        self._tokenizer = tokenizer
        self._version = version
        self._turns = 0

    @property
    def token_ids(self) -> list[int]:
        """The prompt's tokens and all after them."""
        return self.sample_so_far.prompt_token_ids + self.sample_so_far.token_ids

    @property
    def room(self) -> int:
        """How many tokens still fit."""
        return self._seq_length - len(self.token_ids)

    async def sample(
        self, max_tokens: int | None = None, stop: Sequence[str] = ()
    ) -> Turn:
        """Sample what follows, with the tokens so far as the prompt.

        Args:
            max_tokens: The most tokens; as configured if None.
            stop: Strings at which this turn ends, beside those that are configured.

        """
        if self.room < 1:
            self.sample_so_far.finish_reason = "length"
            return Turn("", [], "length")
        params = copy.deepcopy(self._request.params)
        params.max_tokens = min(self.room, max_tokens or params.max_tokens or self.room)
        if stop:
            given = params.stop or []
            params.stop = [*([given] if isinstance(given, str) else given), *stop]
        if params.seed is not None:
            params.seed += self._turns
        self._turns += 1
        request = copy.copy(self._request)
        request.prompt_token_ids, request.params = self.token_ids, params
        output = await self._ask(request)
        (found,) = samples_of(output, request.prompt_index, self._version())
        so_far = self.sample_so_far
        so_far.token_ids += found.token_ids
        so_far.logprobs += found.logprobs
        so_far.sampled += found.sampled
        so_far.versions += found.versions
        so_far.text += found.text
        so_far.finish_reason = found.finish_reason
        return Turn(found.text, found.token_ids, found.finish_reason)

    def give(self, what: str | Sequence[int]) -> None:
        """Append what the model has not sampled, such as a tool's answer.

        What does not fit is cut off; `room` is 0 then.

        Args:
            what: A text, or tokens.

        Raises:
            ValueError: it is a text, and there is no tokenizer.

        """
        so_far = self.sample_so_far
        if isinstance(what, str):
            if self._tokenizer is None:
                raise ValueError(
                    f"An episode was given the text {what!r}, and the engine has no "
                    "tokenizer. Give token ids."
                )
            so_far.text += what
            what = self._tokenizer.encode(what, add_special_tokens=False)
        token_ids = [int(token) for token in what][: self.room]
        so_far.token_ids += token_ids
        so_far.logprobs += [0.0] * len(token_ids)
        so_far.sampled += [False] * len(token_ids)
        so_far.versions += [NOT_SAMPLED] * len(token_ids)


Play = Callable[[Episode], Awaitable[Any]]


async def play_all(
    play: Play,
    episodes: Sequence[Episode],
    timeout: float | None,
) -> list[Any]:
    """Play all episodes at a time, and return their results.

    Raises:
        RuntimeError: one raises; its prompt is named, the others are ended.
        TimeoutError: some have not ended in time; their prompts are named.

    """

    async def one(episode: Episode) -> Any:
        prompt = episode.sample_so_far.prompt_index
        try:
            result = await play(episode)
        except Exception as error:
            raise RuntimeError(
                f"The episode of prompt {prompt} of the batch failed: "
                f"{type(error).__name__}: {error}"
            ) from error
        left[prompt] -= 1
        return result

    left = Counter(episode.sample_so_far.prompt_index for episode in episodes)
    try:
        async with asyncio.timeout(timeout):
            return await all_or_none([one(episode) for episode in episodes])
    except TimeoutError:
        prompts = ", ".join(str(prompt) for prompt in sorted(+left))
        raise TimeoutError(
            f"Episodes of prompt {prompts} of the batch have not ended in {timeout} s."
        ) from None
