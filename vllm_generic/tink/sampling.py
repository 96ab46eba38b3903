# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Samplers, and the requests to them."""

import asyncio
import time
from pathlib import Path

import numpy as np

from vllm_generic.tink import requests
from vllm_generic.tink.backends.base import (
    SampleJob,
    Sampler,
    SamplingParams,
    Version,
)
from vllm_generic.tink.checkpoints import Checkpoints
from vllm_generic.tink.codec import csr_to_dense, encode_sample_output
from vllm_generic.tink.errors import BusyError, UserError, require_base_model
from vllm_generic.tink.futures import Futures
from vllm_generic.tink.metrics import Metrics
from vllm_generic.tink.recent import RecentAdapters
from vllm_generic.tink.store import PROTOBUF, Row, Store

SAMPLE = "sample"


def sampling_params(params: requests.SamplingParams) -> SamplingParams:
    """Without ``stop``, sampling ends at the end-of-sequence token; with [], never."""
    stop = params.stop
    if stop is None:
        stop = []
    elif isinstance(stop, str):
        stop = [stop]
    return SamplingParams(
        max_tokens=params.max_tokens,
        seed=params.seed,
        temperature=params.temperature,
        top_k=params.top_k,
        top_p=params.top_p,
        stop_strings=tuple(item for item in stop if isinstance(item, str)),
        stop_tokens=tuple(item for item in stop if isinstance(item, int)),
        ignore_eos=params.stop == [],
    )


def _targets(tensor: requests.TensorData) -> np.ndarray:
    values = np.asarray(tensor.data, np.int64)
    if tensor.sparse_crow_indices is None:
        return values.reshape(tensor.shape)
    rows = np.asarray(tensor.sparse_crow_indices, np.int64)
    columns = np.asarray(tensor.sparse_col_indices or [], np.int64)
    return csr_to_dense(values, rows, columns, tensor.shape, pad=-1)


class Sampling:
    def __init__(
        self,
        sampler: Sampler,
        base_model: str,
        store: Store,
        futures: Futures,
        checkpoints: Checkpoints,
        recent: RecentAdapters,
        metrics: Metrics,
        max_queued: int,
    ) -> None:
        self.sampler = sampler
        self._base_model = base_model
        self._store = store
        self._futures = futures
        self._checkpoints = checkpoints
        self._recent = recent
        self._metrics = metrics
        self._max_queued = max_queued
        self._tasks: dict[str, asyncio.Task[None]] = {}

    @property
    def queued(self) -> int:
        return len(self._tasks)

    def create(self, owner: str, request: requests.CreateSamplingSession) -> str:
        """A sampler of a checkpoint or of the base model; answers its id."""
        self._store.open_session(request.session_id, owner)
        if request.model_path is not None:
            self._store.checkpoint(request.model_path, owner)
        else:
            require_base_model(request.base_model, self._base_model)
        key = f"{request.session_id}:sample:{request.sampling_session_seq_id}"
        if self._store.find("samplers", key) is None:
            self._store.insert(
                "samplers",
                id=key,
                session_id=request.session_id,
                owner=owner,
                model_path=request.model_path,
                created=time.time(),
            )
        return key

    def submit(self, owner: str, request: requests.Sample) -> str:
        """Acknowledge a request for samples; answers its id."""
        sampler = self._store.get("samplers", request.sampling_session_id, owner)
        self._store.open_session(sampler["session_id"], owner)
        self.job(request)
        key = f"{sampler['id']}/{request.seq_id}"
        if len(self._tasks) >= self._max_queued and key not in self._tasks:
            raise BusyError(f"{len(self._tasks)} sampling requests are queued")
        added = self._futures.add(
            owner, sampler["id"], request.seq_id, SAMPLE, request.canonical()
        )
        if added is not None:
            self._start(added)
        return key

    def resume(self) -> None:
        """Take up the requests that an earlier process acknowledged."""
        for queue in self._store.pending_queues():
            if self._store.find("samplers", queue) is not None:
                for row in self._store.operations(queue):
                    self._start(row)

    def cancel(self, key: str) -> None:
        """End a request that nobody waits for any more."""
        task = self._tasks.get(key)
        if task is not None:
            task.cancel()
            self._futures.fail(key, "the client cancelled this request", "user")

    async def close(self) -> None:
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    def _start(self, row: Row) -> None:
        task = asyncio.create_task(self._run(row))
        self._tasks[row["id"]] = task
        task.add_done_callback(lambda _: self._tasks.pop(row["id"], None))

    async def _run(self, row: Row) -> None:
        key = row["id"]
        try:
            request = requests.Sample.model_validate_json(row["body"])
            job = self.job(request)
            started = time.monotonic()
            output = await self.sampler.sample(self.version(row["queue"]), job)
            self._metrics.operation(SAMPLE, time.monotonic() - started)
        except Exception as error:
            self._futures.fail_with(key, error)
        else:
            self._metrics.prompt_tokens.inc(len(job.prompt))
            drawn = sum(len(sequence.tokens) for sequence in output.sequences)
            self._metrics.sampled_tokens.inc(drawn)
            self._futures.finish(key, PROTOBUF, encode_sample_output(output))

    def version(self, sampler_id: str) -> Version | None:
        """The weights of a sampler, or None for the base model."""
        row = self._store.get("samplers", sampler_id)
        if row["folder"] == "":
            raise UserError(
                f"the weights of sampler {sampler_id!r} are no longer kept: its "
                "session is over. Save weights under a name to keep them."
            )
        if row["folder"] is not None:
            return self._version(row["id"], self._checkpoints.sampler(row["id"]))
        if row["model_path"] is None:
            return None
        return self.checkpoint_version(row["model_path"], row["owner"])

    def checkpoint_version(self, path: str, owner: str) -> Version:
        row = self._store.checkpoint(path, owner)
        folder = self._checkpoints.named(row["run_id"], row["kind"], row["name"])
        # a name that was saved again has other weights
        return self._version(f"{path}@{row['created']}", folder)

    def _version(self, key: str, folder: Path) -> Version:
        return Version(key, folder, self._recent.get(folder))

    def job(self, request: requests.Sample) -> SampleJob:
        """The request as the sampler takes it; UserError if it cannot."""
        prompt: list[int] = []
        for chunk in request.prompt.chunks:
            if chunk.type != "encoded_text":
                raise UserError(
                    f"the prompt has a chunk of kind {chunk.type!r}; "
                    "this service takes text only"
                )
            prompt += chunk.tokens
        if not 0 < len(prompt) < self.sampler.max_length:
            raise UserError(
                f"the prompt has {len(prompt)} tokens; expected 1 to "
                f"{self.sampler.max_length - 1}"
            )
        vocab_size = self.sampler.vocab_size
        if not 0 <= min(prompt) <= max(prompt) < vocab_size:
            raise UserError(f"the prompt has a token outside 0 to {vocab_size - 1}")
        if request.record_stability_info:
            raise UserError(
                "record_stability_info is for stable_reinforce, which is not available"
            )
        last_n = request.prompt_logprobs_last_n
        if last_n is not None and last_n >= len(prompt):
            raise UserError(
                f"prompt_logprobs_last_n is {last_n}; expected 1 to {len(prompt) - 1}"
            )
        targets = None
        if request.target_prompt_logprobs is not None:
            targets = _targets(request.target_prompt_logprobs)
            if targets.ndim != 2 or len(targets) != len(prompt) - 1:
                raise UserError(
                    f"target_prompt_logprobs has the shape {list(targets.shape)}; "
                    f"expected [{len(prompt) - 1}, K]"
                )
            if targets.size and targets.max() >= vocab_size:
                raise UserError(
                    f"target_prompt_logprobs has a token above {vocab_size - 1}"
                )
        return SampleJob(
            prompt=prompt,
            params=sampling_params(request.sampling_params),
            num_samples=request.num_samples,
            prompt_logprobs=bool(request.prompt_logprobs),
            topk_prompt=min(request.topk_prompt_logprobs, vocab_size),
            topk_sample=min(request.topk_sample_logprobs, vocab_size),
            target_tokens=targets,
            alt_tokens_k=request.prompt_alt_tokens_k,
            prompt_logprobs_last_n=last_n,
        )
