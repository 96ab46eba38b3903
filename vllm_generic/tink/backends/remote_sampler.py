# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling by servers elsewhere, and by Hugging Face where they cannot do it."""

import asyncio
import logging
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

from vllm_generic.tink.backends.base import (
    SampleJob,
    SampleOutput,
    Sampler,
    Version,
)

logger = logging.getLogger(__name__)

THREADS = 64  # as many requests are under way at once


class Remote(Protocol):
    """A client of servers; called from many threads."""

    def unsupported(self, version: Version | None, job: SampleJob) -> str | None:
        """What of this the servers cannot do, or None."""

    def sample(self, version: Version | None, job: SampleJob) -> SampleOutput:
        """Raises ConnectionError if no server can be reached."""

    def close(self) -> None:
        """Close connections."""


class RemoteSampler:
    """Asks ``remote``; ``local`` is the fallback, which the log tells of."""

    engine = None

    def __init__(self, remote: Remote, local: Sampler) -> None:
        self._remote = remote
        self._local = local
        self._threads = ThreadPoolExecutor(THREADS, thread_name_prefix="remote")
        self._told: set[str] = set()  # reasons that the log has, until it works again
        self.tokenizer: Any = local.tokenizer
        self.max_length = local.max_length
        self.vocab_size = local.vocab_size

    def failure(self) -> str | None:
        return self._local.failure()

    def close(self) -> None:
        self._threads.shutdown()
        self._remote.close()
        self._local.close()

    async def sample(self, version: Version | None, job: SampleJob) -> SampleOutput:
        reason = self._remote.unsupported(version, job)
        if reason is None:
            loop = asyncio.get_running_loop()
            try:
                output = await loop.run_in_executor(
                    self._threads, self._remote.sample, version, job
                )
            except ConnectionError as error:
                reason = str(error)
            else:
                self._told.clear()
                return output
        if reason not in self._told:
            self._told.add(reason)
            logger.warning("sampling by Hugging Face instead: %s", reason)
        return await self._local.sample(version, job)
