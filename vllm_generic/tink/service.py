# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The parts of one service, put together, started and stopped."""

import asyncio
import logging
import time
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

from vllm_generic.tink.backends.base import Sampler, Trainer
from vllm_generic.tink.checkpoints import Checkpoints
from vllm_generic.tink.futures import Futures
from vllm_generic.tink.metrics import Metrics
from vllm_generic.tink.recent import RecentAdapters
from vllm_generic.tink.runs import Runs
from vllm_generic.tink.sampling import Sampling
from vllm_generic.tink.saves import Saves
from vllm_generic.tink.scheduler import Scheduler
from vllm_generic.tink.settings import Settings
from vllm_generic.tink.store import Store
from vllm_generic.tink.training import Training

logger = logging.getLogger(__name__)

SWEEP_SECONDS = 60.0


class Service:
    """Everything that routes use."""

    def __init__(
        self,
        settings: Settings,
        model_name: str,
        model_dir: Path,
        trainer: Trainer,
        sampler: Sampler,
    ) -> None:
        self.settings = settings
        self.model_name = model_name
        self.model_dir = model_dir
        self.trainer = trainer
        # The client loads a tokenizer by this id. It takes one with exactly two slashes
        # for a name with a suffix; this folder is on its machine or a shared disk.
        folder = str(model_dir.resolve())
        self.tokenizer_id = folder + "/." if folder.count("/") == 2 else folder
        self.started = time.time()
        settings.root.mkdir(parents=True, exist_ok=True, mode=0o700)
        self.store = Store(settings.root / "tink.db")
        self.checkpoints = Checkpoints(settings.root)
        self.futures = Futures(self.store)
        self.metrics = Metrics()
        recent = RecentAdapters(settings.max_adapters)
        self.runs = Runs(self.store, self.futures, settings.max_queued_training)
        self.sampling = Sampling(
            sampler,
            model_name,
            self.store,
            self.futures,
            self.checkpoints,
            recent,
            self.metrics,
            settings.max_queued_sampling,
        )
        self.scheduler = Scheduler(
            self.runs,
            Training(trainer, self.checkpoints),
            self.store,
            self.futures,
            self.checkpoints,
            Saves(self.store, self.futures, self.checkpoints),
            recent,
            self.metrics,
        )
        self._tasks: set[asyncio.Task[None]] = set()
        self.metrics.gauge(
            "tink_queued_training_requests",
            "Training requests that wait",
            lambda: sum(run.queued for run in self.runs),
        )
        self.metrics.gauge(
            "tink_queued_sampling_requests",
            "Sampling requests that wait or run",
            lambda: self.sampling.queued,
        )
        self.metrics.gauge(
            "tink_loaded_runs",
            "Runs whose adapter is in the trainer",
            lambda: sum(run.loaded for run in self.runs),
        )

    async def start(self) -> None:
        self.runs.reopen_pending()
        self.sampling.resume()
        self.background(self.scheduler.run())
        self.background(self._sweep_forever())

    async def stop(self) -> None:
        tasks = list(self._tasks)
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        await self.sampling.close()
        await asyncio.to_thread(self.sampling.sampler.close)
        await self.scheduler.close()
        self.store.close()

    def background(self, work: Coroutine[Any, Any, None]) -> None:
        """Run something until it ends or the service stops."""
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    def failure(self) -> str | None:
        """Why the service cannot do its work, or None."""
        if self.scheduler.failure is not None:
            error = self.scheduler.failure
            return f"training stopped: {type(error).__name__}: {error}"
        return self.sampling.sampler.failure()

    async def _sweep_forever(self) -> None:
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            await self.sweep()

    async def sweep(self) -> None:
        """Free what is expired or unused."""
        now = time.time()
        for row in self.store.expired_checkpoints(now):
            self.delete_checkpoint(row["path"])
        before = now - self.settings.keep_samplers_seconds
        for row in self.store.stale_samplers(before):
            self.store.update("samplers", row["id"], folder="")
            self.checkpoints.remove(self.checkpoints.sampler(row["id"]))
        self.store.expire_results(now - self.settings.keep_results_seconds)
        await self.scheduler.unload_unused(self.settings.idle_seconds)

    def delete_checkpoint(self, path: str) -> None:
        row = self.store.checkpoint(path)
        self.store.delete_checkpoint(path)
        self.checkpoints.remove(
            self.checkpoints.named(row["run_id"], row["kind"], row["name"])
        )
