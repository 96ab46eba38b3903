# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
import asyncio
from types import SimpleNamespace

from vllm.v1.engine.async_llm import AsyncLLM


def test_requests_end_when_the_engine_is_shut_down():
    """A stream that waits for outputs would wait for ever."""
    aborted: list[str] = []

    async def never() -> None:
        await asyncio.Event().wait()

    def abort(requests: list[str], internal: bool) -> None:
        assert internal
        aborted.extend(requests)

    llm = SimpleNamespace(
        output_handler=None,
        engine_core=SimpleNamespace(get_output_async=never),
        output_processor=SimpleNamespace(
            request_states={"a": None, "b": None}, abort_requests=abort
        ),
        log_stats=False,
        logger_manager=None,
        renderer=SimpleNamespace(mm_processor_cache=None),
    )

    async def shut_down() -> None:
        AsyncLLM._run_output_handler(llm)
        await asyncio.sleep(0)
        llm.output_handler.cancel()
        await asyncio.wait([llm.output_handler])

    asyncio.run(shut_down())
    assert aborted == ["a", "b"]
