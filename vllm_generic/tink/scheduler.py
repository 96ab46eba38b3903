# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Gives the runs' requests to the trainer, in turn, and records what came of them."""

import asyncio
import json
import logging
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import numpy as np

from vllm_generic.tink import training as ops
from vllm_generic.tink.backends.base import Batch, BatchOutput
from vllm_generic.tink.checkpoints import Checkpoints
from vllm_generic.tink.codec import encode_batch_output
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.futures import Futures
from vllm_generic.tink.metrics import Metrics
from vllm_generic.tink.recent import RecentAdapters
from vllm_generic.tink.runs import Run, Runs
from vllm_generic.tink.saves import Saves
from vllm_generic.tink.store import PROTOBUF, Store

logger = logging.getLogger(__name__)
T = TypeVar("T")

SNAPSHOT_EVERY = 8  # optimizer steps; as many are computed again after a crash


class Scheduler:
    """One task of the event loop, and one thread for all that touches the trainer."""

    def __init__(
        self,
        runs: Runs,
        training: ops.Training,
        store: Store,
        futures: Futures,
        checkpoints: Checkpoints,
        saves: Saves,
        recent: RecentAdapters,
        metrics: Metrics,
    ) -> None:
        self._runs = runs
        self._training = training
        self._store = store
        self._futures = futures
        self._checkpoints = checkpoints
        self._saves = saves
        self._recent = recent
        self._metrics = metrics
        self._wake = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="trainer")
        self._turn: list[str] = []  # runs, the one that waited longest first
        self.failure: BaseException | None = None

    def wake(self) -> None:
        self._wake.set()

    async def run(self) -> None:
        """Serve requests until cancelled."""
        try:
            while True:
                steps = self._next_steps()
                if not steps:
                    self._wake.clear()
                    await self._wake.wait()
                    continue
                await self._execute(steps)
        except Exception as error:
            # /health tells it; requests are kept for the next start
            self.failure = error
            logger.exception("the scheduler stopped")
            raise

    async def close(self) -> None:
        await asyncio.to_thread(self._thread.shutdown)

    async def _in_thread(self, function: Callable[..., T], *arguments: Any) -> T:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._thread, function, *arguments)

    def _next_steps(self) -> list[ops.Step]:
        """The request whose run has waited longest, and what one pass can add to it."""
        ready = {run.id: run for run in self._runs if run.ready}
        self._turn = [key for key in self._turn if key in ready]
        self._turn += [key for key in ready if key not in self._turn]
        if not self._turn:
            return []
        first = ready[self._turn[0]]
        chosen = [first]
        if first.ready[0].kind == ops.FORWARD_BACKWARD:
            limit = self._training.trainer.max_runs_in_a_pass
            others = [ready[key] for key in self._turn[1:]]
            same = [r for r in others if r.ready[0].kind == ops.FORWARD_BACKWARD]
            chosen += same[: limit - 1]
        for run in chosen:
            self._turn.remove(run.id)
        return [self._step(run) for run in chosen]

    def _step(self, run: Run) -> ops.Step:
        operation = run.ready.popleft()
        journal = [] if run.loaded else self._runs.journal(run, operation.seq)
        return ops.Step(run, operation, journal)

    async def _execute(self, steps: list[ops.Step]) -> None:
        started = time.monotonic()
        kind = steps[0].operation.kind
        if kind == ops.FORWARD_BACKWARD:
            await self._forward_backward(steps)
        else:
            await self._guarded(steps[0], self._single(steps[0]))
        seconds = time.monotonic() - started
        for step in steps:
            step.run.progress.seconds += seconds
        self._metrics.operation(kind, seconds)

    async def _guarded(self, step: ops.Step, work: Any) -> Any:
        """Await ``work``; a failure is the request's result."""
        try:
            return await work
        except Exception as error:
            self._futures.fail_with(step.operation.id, error)
            if not isinstance(error, UserError):
                # The work may have stopped half-way, so restore the state before it.
                await self._in_thread(self._training.unload, step.run)
        return None

    async def _forward_backward(self, steps: list[ops.Step]) -> None:
        accepted, batches = [], []
        for step in steps:
            work = self._in_thread(self._training.batch, step.operation)
            batch = await self._guarded(step, work)
            if batch is not None:
                accepted.append(step)
                batches.append(batch)
        if not accepted:
            return
        try:
            outputs = await self._in_thread(
                self._training.forward_backward, accepted, batches
            )
        except Exception as error:
            for step in accepted:
                await self._guarded(step, _raise(error))
            return
        for step, batch in zip(accepted, batches, strict=True):
            output = outputs[step.run.id]
            self._count(step.run, batch, output)
            self._futures.finish(
                step.operation.id, PROTOBUF, encode_batch_output(output)
            )

    def _count(self, run: Run, batch: Batch, output: BatchOutput) -> None:
        self._metrics.trained_tokens.inc(batch.num_tokens)
        progress = run.progress
        progress.total_tokens += batch.num_tokens
        if batch.forward_only:
            return
        progress.tokens += batch.num_tokens
        progress.loss += output.metrics["loss:sum"]
        for datum in batch.data:
            weights = datum.loss_inputs.get("weights")
            progress.weight += (
                len(datum.tokens) if weights is None else float(np.abs(weights).sum())
            )

    async def _single(self, step: ops.Step) -> None:
        kind, key = step.operation.kind, step.operation.id
        if kind == ops.CREATE:
            await self._in_thread(self._training.create, step)
            result = {"model_id": step.run.id, "type": kind}
            self._futures.finish_json(key, result)
        elif kind == ops.OPTIM_STEP:
            await self._optim_step(step)
        elif kind == ops.LOAD:
            await self._load(step)
        elif kind in ops.SAVES:
            step, request = self._saves.prepare(step)
            size, adapter = await self._in_thread(self._training.save, step)
            assert step.target is not None
            self._recent.put(step.target, adapter)
            self._saves.record(step, request, size)
        else:
            raise UserError(f"unknown request {kind!r}")

    async def _optim_step(self, step: ops.Step) -> None:
        run, seq = step.run, step.operation.seq
        metrics = await self._in_thread(self._training.optim_step, step)
        with self._store.transaction():
            self._record_step(run, metrics)
            self._futures.finish_json(step.operation.id, {"metrics": metrics})
        if run.progress.step % SNAPSHOT_EVERY == 0:
            await self._in_thread(self._training.snapshot, run, seq)
            with self._store.transaction():
                self._store.snapshot_taken(run.id, seq)
            self._adopt_snapshot(run, seq)

    def _record_step(self, run: Run, metrics: dict[str, float]) -> None:
        progress = run.progress
        values = {key.split(":")[0]: value for key, value in metrics.items()}
        values["tokens"] = progress.tokens
        if progress.weight:
            values["loss"] = progress.loss / progress.weight
        progress.step += 1
        self._store.add_history(run.id, progress.step, values)
        logger.info(
            "%s step %d: %s",
            run.id,
            progress.step,
            ", ".join(f"{key} {value:.6g}" for key, value in values.items()),
        )
        progress.loss, progress.weight, progress.tokens = 0.0, 0.0, 0

    async def _load(self, step: ops.Step) -> None:
        request = step.operation.json()
        row = self._store.checkpoint(request["path"], step.run.owner)
        source = self._checkpoints.named(row["run_id"], row["kind"], row["name"])
        spec = json.loads(row["spec"])
        if spec["rank"] != step.run.spec.rank:
            raise UserError(
                f"the checkpoint is of rank {spec['rank']} and the model of rank "
                f"{step.run.spec.rank}; create a model from the checkpoint instead"
            )
        step = ops.Step(step.run, step.operation, step.journal, source=source)
        await self._in_thread(self._training.load, step)
        run, seq = step.run, step.operation.seq
        result = {"path": request["path"], "model_id": run.id, "type": ops.LOAD}
        with self._store.transaction():
            self._store.snapshot_taken(run.id, seq)
            self._futures.finish_json(step.operation.id, result)
        self._adopt_snapshot(run, seq)

    def _adopt_snapshot(self, run: Run, seq: int) -> None:
        run.snapshot_seq = seq
        self._checkpoints.remove_snapshots_but(run.id, seq)

    async def unload_unused(self, idle: float) -> None:
        """Free the adapters of runs that are closed or unused for ``idle`` seconds."""
        now = time.monotonic()
        for run in list(self._runs):
            unused = run.closed or now - run.used > idle
            if run.loaded and unused and not run.queued:
                await self._in_thread(self._training.unload, run)


async def _raise(error: Exception) -> None:
    raise error
