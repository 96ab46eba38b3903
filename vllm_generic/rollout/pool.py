# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Several engines that answer one queue of requests, the longest first.

Each request goes to the engine that has the least left to do ("longest processing time
first", which ends at most a third later than the best division). Requests of an engine
that is lost, and requests that were aborted, go back to the queue.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import itertools
import threading
from collections.abc import Awaitable, Callable, Coroutine, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from vllm import RequestOutput
from vllm.distributed.weight_sync import WeightSync
from vllm.logger import init_logger
from vllm_generic.rollout.async_engines import AsyncEngine, EngineLostError
from vllm_generic.rollout.engines import Request

logger = init_logger(__name__)
T = TypeVar("T")

MOST_ABORTS = 100


@dataclass
class _Member:
    """An engine of the pool, and what it has to do."""

    engine: AsyncEngine
    tokens: float = 0.0
    sequences: int = 0


@dataclass(order=True)
class _Job:
    """A request in the queue, in the order in which requests begin."""

    key: tuple[int, float, int]
    request: Request = field(compare=False)
    answer: asyncio.Future[RequestOutput] = field(compare=False)
    aborts: int = field(default=0, compare=False)


class EnginePool:
    """An `Engine` of one or several asynchronous ones, with an event loop of its own.

    Args:
        make: Makes the engines, in that loop.
        seq_length: The most tokens of a prompt and its answer, of those engines.
        tokenizer: The engines' tokenizer, if they have one.

    """

    def __init__(
        self,
        make: Callable[[], Awaitable[Sequence[AsyncEngine]]],
        seq_length: Callable[[Sequence[AsyncEngine]], Awaitable[int]],
        tokenizer: Callable[[Sequence[AsyncEngine]], Any | None],
    ) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="rollout-engines", daemon=True
        )
        self._thread.start()
        self._numbers = itertools.count()
        self._members: list[_Member] = []
        self._lost: list[AsyncEngine] = []
        self._changed = False
        self._failure: str | None = None

        async def start() -> tuple[int, Any | None]:
            engines = await make()
            self._members = [_Member(engine) for engine in engines]
            self._queue: asyncio.PriorityQueue[_Job] = asyncio.PriorityQueue()
            self._room = asyncio.Condition()
            self._tasks: set[asyncio.Task[None]] = set()
            self._dispatcher = asyncio.create_task(self._dispatch())
            return await seq_length(engines), tokenizer(engines)

        try:
            self._seq_length, self._tokenizer = self.call(start())
        except BaseException:
            self._stop_loop()
            raise

    # ---- What a VLLMModule asks of an engine

    def seq_length(self) -> int:
        return self._seq_length

    def tokenizer(self) -> Any | None:
        return self._tokenizer

    def generate(self, requests: Sequence[Request]) -> list[RequestOutput]:
        return self.call(self.answer_all(requests))

    def make_sync(self, make: Callable[[Any], WeightSync]) -> WeightSync:
        async def in_loop() -> WeightSync:
            self._changed = False
            return make([member.engine.handle for member in self._members])

        return self.call(in_loop())

    def has_changed(self) -> bool:
        return self._changed

    def lost_some(self) -> bool:
        async def look() -> bool:
            for member in list(self._members):
                try:
                    await member.engine.check()
                except EngineLostError as error:
                    self._lose(member, error)
            return self._changed and bool(self._members)

        return self.call(look())

    def sleep(self, level: int) -> None:
        self.call(self._every(lambda engine: engine.sleep(level)))

    def wake_up(self, tags: list[str]) -> None:
        self.call(self._every(lambda engine: engine.wake_up(tags)))

    def close(self) -> None:
        async def end() -> None:
            self._dispatcher.cancel()
            for task in self._tasks:
                task.cancel()
            await asyncio.gather(*self._tasks, return_exceptions=True)
            engines = [member.engine for member in self._members] + self._lost
            for engine in engines:
                await engine.close()

        self.call(end())
        self._stop_loop()

    # ---- For those who call from, or wait for, the event loop

    def submit(self, coroutine: Coroutine[Any, Any, T]) -> concurrent.futures.Future[T]:
        """Run something in the engines' event loop."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def call(self, coroutine: Coroutine[Any, Any, T]) -> T:
        """Run it, and wait for it; what interrupts the wait ends it."""
        future = self.submit(coroutine)
        try:
            return future.result()
        except BaseException:
            future.cancel()
            raise

    async def answer_all(self, requests: Sequence[Request]) -> list[RequestOutput]:
        """The outputs of all requests; if one fails, the others are ended."""
        return await all_or_none([self.answer(request) for request in requests])

    async def answer(self, request: Request) -> RequestOutput:
        """The output of one request.

        Raises:
            RuntimeError: no engine is left, or the request fails; it names the prompt.

        """
        key = (request.batch, -request.expected_tokens, next(self._numbers))
        job = _Job(key, request, self._loop.create_future())
        self._queue.put_nowait(job)
        return await job.answer  # cancelling this cancels the future

    # ---- Inside the event loop

    async def _dispatch(self) -> None:
        while True:
            job = await self._queue.get()
            if job.answer.done():
                continue
            async with self._room:
                await self._room.wait_for(lambda: not self._members or self._free())
            if not self._members:
                self._fail(job)
                continue
            member = min(self._free(), key=lambda each: each.tokens)
            # Counted here, so that the next request sees it.
            member.tokens += job.request.expected_tokens * job.request.params.n
            member.sequences += job.request.params.n
            task = asyncio.create_task(self._work(member, job))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    def _free(self) -> list[_Member]:
        return [m for m in self._members if m.sequences < m.engine.capacity()]

    async def _work(self, member: _Member, job: _Job) -> None:
        """Let an engine do a job, unless nobody waits for it any more."""
        work = asyncio.ensure_future(member.engine.generate(job.request))
        job.answer.add_done_callback(lambda _: work.cancel())
        try:
            output = await work
        except EngineLostError as error:
            self._lose(member, error)
            self._queue.put_nowait(job)
        except asyncio.CancelledError:
            job.answer.cancel()
        except Exception as error:
            if not job.answer.done():
                job.answer.set_exception(_of_prompt(job.request, error))
        else:
            self._take(job, output)
        finally:
            work.cancel()
            member.tokens -= job.request.expected_tokens * job.request.params.n
            member.sequences -= job.request.params.n
            async with self._room:
                self._room.notify_all()

    def _take(self, job: _Job, output: RequestOutput) -> None:
        """Hand an output out, or have an aborted one made again."""
        if job.answer.done():
            return
        if not any(each.finish_reason == "abort" for each in output.outputs):
            job.answer.set_result(output)
            return
        job.aborts += 1
        if job.aborts < MOST_ABORTS:
            self._queue.put_nowait(job)
        else:
            error = RuntimeError(f"The engine has aborted it {job.aborts} times.")
            job.answer.set_exception(_of_prompt(job.request, error))

    def _lose(self, member: _Member, error: EngineLostError) -> None:
        if member not in self._members:
            return  # another request has noticed
        self._members.remove(member)
        self._lost.append(member.engine)
        self._changed = True
        logger.warning(
            "An engine is lost; %d are left, which answer its prompts again. %s",
            len(self._members),
            error,
        )
        if not self._members:
            self._failure = f"No engine is left. The last one: {error}"

    def _fail(self, job: _Job) -> None:
        error = EngineLostError(self._failure or "No engine is left.")
        job.answer.set_exception(_of_prompt(job.request, error))

    async def _every(self, action: Callable[[AsyncEngine], Awaitable[None]]) -> None:
        await asyncio.gather(*(action(member.engine) for member in self._members))

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


def _of_prompt(request: Request, error: Exception) -> RuntimeError:
    named = RuntimeError(f"Prompt {request.prompt_index} of the batch: {error}")
    named.__cause__ = error
    return named


async def all_or_none(coroutines: Iterable[Coroutine[Any, Any, T]]) -> list[T]:
    """The results of all; what one raises ends the others, and is raised."""
    tasks = [asyncio.ensure_future(each) for each in coroutines]
    try:
        return await asyncio.gather(*tasks)
    except BaseException:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        raise
