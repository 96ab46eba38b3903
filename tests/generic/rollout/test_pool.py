# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Several engines: who answers what, and what happens when one is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest

from vllm import RequestOutput, SamplingParams
from vllm.outputs import CompletionOutput
from vllm_generic.rollout.async_engines import AsyncEngine, EngineLostError
from vllm_generic.rollout.engines import Request
from vllm_generic.rollout.episodes import Episode, play_all
from vllm_generic.rollout.pool import EnginePool
from vllm_generic.rollout.requests import one_answer_each, set_seeds


class Scripted:
    """An engine that answers with the last token plus one, if `act` lets it."""

    def __init__(
        self, act: Callable[[Request], Any] = lambda request: None, capacity: int = 8
    ) -> None:
        self.handle = self
        self.begun: list[int] = []
        self.cancelled: list[int] = []
        self._act = act
        self._capacity = capacity

    def capacity(self) -> int:
        return self._capacity

    async def generate(self, request: Request) -> RequestOutput:
        self.begun.append(request.prompt_index)
        reason = "stop"
        try:
            await asyncio.sleep(0)
            found = self._act(request)
            if asyncio.iscoroutine(found):
                await found
            elif found is not None:
                reason = found
        except asyncio.CancelledError:
            self.cancelled.append(request.prompt_index)
            raise
        tokens = [request.prompt_token_ids[-1] + 1]
        completion = CompletionOutput(0, "+", tokens, 0.0, None, finish_reason=reason)
        ids = request.prompt_token_ids
        return RequestOutput("0", request.prompt, ids, None, [completion], True)

    async def check(self) -> None: ...

    async def sleep(self, level: int) -> None: ...

    async def wake_up(self, tags: list[str]) -> None: ...

    async def close(self) -> None: ...


@contextmanager
def pool_of(*engines: Scripted) -> Iterator[EnginePool]:
    async def make() -> Sequence[AsyncEngine]:
        return engines

    async def seq_length(engines: Sequence[AsyncEngine]) -> int:
        return 16

    pool = EnginePool(make, seq_length, lambda engines: None)
    yield pool
    pool.close()


def requests_of(*expected: float) -> list[Request]:
    return [
        Request("", [index], SamplingParams(), index, tokens)
        for index, tokens in enumerate(expected)
    ]


def tokens_of(outputs: list[RequestOutput]) -> list[int]:
    return [output.outputs[0].token_ids[0] for output in outputs]


def lost(request: Request) -> None:
    raise EngineLostError("it was killed")


def test_the_longest_begin_first_where_the_least_is_left() -> None:
    one, other = Scripted(), Scripted()
    with pool_of(one, other) as pool:
        outputs = pool.generate(requests_of(1, 9, 5, 4, 2))
    assert tokens_of(outputs) == [1, 2, 3, 4, 5]  # in the order of the prompts
    # 9 | 5 + 4, then 2 and 1 wherever less is left
    assert one.begun[0] == 1 and other.begun[:2] == [2, 3]
    alone = Scripted(capacity=1)
    with pool_of(alone) as pool:
        pool.generate(requests_of(1, 9, 5, 4, 2))
    assert alone.begun == [1, 2, 3, 4, 0]


def test_prompts_of_a_lost_engine_are_answered_by_another() -> None:
    one, other = Scripted(lost), Scripted()
    with pool_of(one, other) as pool:
        assert tokens_of(pool.generate(requests_of(4, 3, 2, 1))) == [1, 2, 3, 4]
        assert pool.has_changed()
        assert tokens_of(pool.generate(requests_of(4, 3))) == [1, 2]
    with (
        pool_of(Scripted(lost)) as pool,
        pytest.raises(RuntimeError, match="Prompt 1 of the batch: No engine is left"),
    ):
        pool.generate(requests_of(1, 2))
        pool.generate(requests_of(1, 2))


def test_aborted_requests_are_answered_again() -> None:
    aborts = iter(["abort"] * 3)
    with pool_of(Scripted(lambda request: next(aborts, None))) as pool:
        assert tokens_of(pool.generate(requests_of(1, 1))) == [1, 2]
    with (
        pool_of(Scripted(lambda request: "abort")) as pool,
        pytest.raises(RuntimeError, match="Prompt 0 of .* has aborted it 100 times"),
    ):
        pool.generate(requests_of(1))


def test_one_failure_names_its_prompt_and_ends_the_others() -> None:
    def act(request: Request) -> Any:
        if request.prompt_index == 1:
            raise ValueError("too long")
        return asyncio.sleep(60)

    engine = Scripted(act)
    wrong = pytest.raises(RuntimeError, match="Prompt 1 of the batch: too long")
    with pool_of(engine) as pool, wrong:
        pool.generate(requests_of(3, 2, 1))
    assert sorted(engine.cancelled) == [0, 2]


def test_an_interrupted_call_ends_its_requests(monkeypatch: pytest.MonkeyPatch) -> None:
    engine = Scripted(lambda request: asyncio.sleep(60))
    with pool_of(engine) as pool:
        submit = pool.submit

        def interrupted(coroutine: Any) -> Any:
            future = submit(coroutine)
            wait = future.result

            def result() -> Any:
                with pytest.raises(TimeoutError):
                    wait(0.2)
                raise KeyboardInterrupt

            future.result = result  # type: ignore[method-assign]
            return future

        monkeypatch.setattr(pool, "submit", interrupted)
        with pytest.raises(KeyboardInterrupt):
            pool.generate(requests_of(1, 1))
        monkeypatch.undo()
        assert pool.call(asyncio.sleep(0.01)) is None
        assert sorted(engine.cancelled) == [0, 1]


# ---- Episodes


def episodes_of(pool: EnginePool, *prompts: list[int]) -> list[Episode]:
    return [
        Episode(
            {"limit": index},
            Request("", prompt, SamplingParams(max_tokens=4, seed=7), index),
            8,
            pool.answer,
            None,
            lambda: 3,
        )
        for index, prompt in enumerate(prompts)
    ]


def test_an_episode_keeps_its_tokens_as_they_were() -> None:
    async def play(episode: Episode) -> int:
        turns = 0
        while (turn := await episode.sample()).token_ids:
            episode.give([50 + turns, 60])
            turns += 1
        assert turn.finish_reason == "length" and episode.room == 0
        return turns

    with pool_of(Scripted()) as pool:
        episodes = episodes_of(pool, [1], [2, 2])
        assert pool.call(play_all(play, episodes, None)) == [3, 2]
    sample = episodes[0].sample_so_far
    # What does not fit is cut off: of the last two given tokens, one.
    assert sample.token_ids == [2, 50, 60, 61, 51, 60, 61]
    assert sample.sampled == [True, False, False, True, False, False, True]
    assert sample.versions == [3, -1, -1, 3, -1, -1, 3]
    assert len(sample.logprobs) == 7


def test_episodes_that_fail() -> None:
    async def raises(episode: Episode) -> None:
        await episode.sample()
        if episode.row["limit"] == 1:
            raise KeyError("tool")
        await asyncio.sleep(60)

    async def hangs(episode: Episode) -> None:
        if episode.row["limit"] == 0:
            await asyncio.sleep(60)

    async def gives_text(episode: Episode) -> None:
        episode.give("text")

    with pool_of(Scripted()) as pool:
        for play, timeout, error, message in (
            (raises, None, RuntimeError, "episode of prompt 1 of .*KeyError: 'tool'"),
            (hangs, 0.2, TimeoutError, "Episodes of prompt 0 of the batch have not"),
            (gives_text, None, RuntimeError, "text 'text', and the engine has no"),
        ):
            with pytest.raises(error, match=message):
                pool.call(play_all(play, episodes_of(pool, [1], [2]), timeout))


def test_seeds() -> None:
    """The same for the same batch, and for every request another one."""

    def seeds(iteration: int, is_eval: bool = False) -> list[int]:
        requests = [Request("", [1], SamplingParams(n=2), index) for index in (0, 1)]
        set_seeds(requests, 5, iteration, is_eval)
        return [request.params.seed for request in one_answer_each(requests)]

    assert seeds(0) == seeds(0)
    found = seeds(0) + seeds(1) + seeds(0, is_eval=True)
    assert len(set(found)) == 12
