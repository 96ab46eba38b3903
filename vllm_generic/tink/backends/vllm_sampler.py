# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling by vLLM in this process: many requests, of many adapters, at once."""

import math
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

import vllm.envs as envs
from vllm.lora.adapter import Adapter
from vllm_generic.tink.backends import packed_model
from vllm_generic.tink.backends.base import (
    SampledSequence,
    SampleJob,
    SampleOutput,
    TopK,
    Version,
)
from vllm_generic.tink.backends.remote_vllm import top_k
from vllm_generic.tink.backends.shared_versions import SharedVersions
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.settings import Settings

RANKS = (1, 8, 16, 32, 64, 128, 256, 320, 512)  # what vLLM takes for max_lora_rank


class VLLMSampler:
    """vLLM's engine with LoRA. The adapters of one batch may all differ.

    The engine serves the module that is trained, registered by `packed_model`, or in
    the exact mode by `megatron_engine`. Adapters come to it through shared memory.
    """

    def __init__(self, folder: Path, settings: Settings) -> None:
        try:
            from vllm import AsyncEngineArgs
            from vllm.v1.engine.async_llm import AsyncLLM
        except ImportError as error:
            raise ImportError(
                f"vLLM is not available ({error}); install it, or sample with hf"
            ) from error

        if settings.trainer == "megatron" and envs.VLLM_BATCH_INVARIANT:
            from vllm_generic.tink.backends import megatron_engine

            megatron_engine.register(folder)
        else:
            packed_model.register(folder)
        rank: Any = min(known for known in RANKS if known >= settings.max_lora_rank)
        self._max_rank = rank
        arguments = AsyncEngineArgs(
            model=str(folder),
            dtype="float32" if settings.device == "cpu" else "auto",
            gpu_memory_utilization=settings.gpu_memory_utilization,
            enable_lora=True,
            max_loras=settings.max_adapters,
            max_lora_rank=rank,
            # log-probabilities of all tokens, where one is asked for by its id
            max_logprobs=-1,
            logprobs_mode="raw_logprobs",
        )
        self.engine = AsyncLLM.from_engine_args(arguments)
        self.tokenizer = self.engine.get_tokenizer()
        self.max_length = self.engine.model_config.max_model_len
        self.vocab_size = self.engine.model_config.get_vocab_size()
        self._adapters = SharedVersions(most=2 * settings.max_adapters)

    def close(self) -> None:
        self.engine.shutdown()
        self._adapters.close()

    @contextmanager
    def _lora(self, version: Version | None) -> Iterator[Any]:
        """The LoRARequest of a version, whose memory is kept until the end."""
        if version is None:
            yield None
            return
        with self._adapters.request(version, self._check) as request:
            yield request

    def _check(self, adapter: Adapter) -> None:
        rank = max(adapter.config.rank_of(name) for name in adapter.factors)
        if rank > self._max_rank:
            raise UserError(
                f"the adapter has rank {rank}, and this service samples from ranks "
                f"up to {self._max_rank}; start it with --max-lora-rank {rank}"
            )

    def failure(self) -> str | None:
        return "vLLM's engine has died" if self.engine.errored else None

    async def sample(self, version: Version | None, job: SampleJob) -> SampleOutput:
        result = None
        with self._lora(version) as request:
            stream = self.engine.generate(
                {"prompt_token_ids": job.prompt},
                self._params(job),
                uuid.uuid4().hex,
                lora_request=request,
            )
            async for output in stream:
                result = output
        if result is None:
            raise RuntimeError("the engine gave no result")
        prompt: Any = result.prompt_logprobs
        sequences = [_sequence(output, job.topk_sample) for output in result.outputs]
        return SampleOutput(sequences, **_prompt(job, prompt))

    def _params(self, job: SampleJob) -> Any:
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = job.params
        limit = self.max_length - len(job.prompt)
        if params.max_tokens == 0:
            raise UserError("max_tokens is 0; vLLM draws at least one token")
        prompt_logprobs: int | None = None
        if job.target_tokens is not None or job.alt_tokens_k:
            prompt_logprobs = -1
        elif job.prompt_logprobs or job.topk_prompt:
            prompt_logprobs = job.topk_prompt
        return SamplingParams(
            n=job.num_samples,
            max_tokens=min(limit, params.max_tokens or limit),
            seed=params.seed,
            temperature=params.temperature,
            top_k=max(params.top_k, 0),
            top_p=params.top_p,
            stop=list(params.stop_strings),
            stop_token_ids=list(params.stop_tokens),
            include_stop_str_in_output=True,
            ignore_eos=params.ignore_eos,
            logprobs=job.topk_sample,
            prompt_logprobs=prompt_logprobs,
            output_kind=RequestOutputKind.FINAL_ONLY,
        )


def _top(entries: list[dict[int, Any] | None], k: int) -> TopK:
    return top_k(
        [
            {token: item.logprob for token, item in (entry or {}).items()}
            for entry in entries
        ],
        k,
    )


def _sequence(output: Any, topk: int) -> SampledSequence:
    tokens = list(output.token_ids)
    logprobs = [
        entry[token].logprob
        for token, entry in zip(tokens, output.logprobs, strict=True)
    ]
    top = _top(output.logprobs, topk) if topk else None
    return SampledSequence(tokens, logprobs, output.finish_reason == "stop", top)


def _prompt(job: SampleJob, entries: list[dict[int, Any] | None]) -> dict[str, Any]:
    """What is asked for about the prompt, of the engine's entries for each position."""
    out: dict[str, Any] = {}
    length = len(job.prompt)
    last_n = job.prompt_logprobs_last_n
    first = 1 if last_n is None else length - last_n
    if job.prompt_logprobs:
        values = np.full(length, math.nan, np.float32)
        for position in range(first, length):
            entry = entries[position]
            assert entry is not None
            values[position] = entry[job.prompt[position]].logprob
        out["prompt_logprobs"] = values
    if job.topk_prompt:
        none = [None] * first
        out["topk_prompt"] = _top([*none, *entries[first:]], job.topk_prompt)
    if job.target_tokens is not None:
        targets = np.zeros(job.target_tokens.shape, np.float32)
        for (row, column), token in np.ndenumerate(job.target_tokens):
            entry = entries[row + 1]
            if token >= 0 and entry is not None:
                targets[row, column] = entry[int(token)].logprob
        out["target_logprobs"] = targets
    if job.alt_tokens_k:
        out["alt_tokens"] = _alternatives(job, entries[1:])
    return out


def _alternatives(job: SampleJob, entries: list[dict[int, Any] | None]) -> TopK:
    """Tokens drawn at every position of the prompt but the first."""
    random = np.random.default_rng(job.params.seed)
    scale = job.params.temperature or 1e-6
    ids = np.zeros((len(entries), job.alt_tokens_k), np.int32)
    values = np.zeros(ids.shape, np.float32)
    for row, entry in enumerate(entries):
        assert entry is not None
        tokens = np.fromiter(entry, np.int64)
        logprobs = np.array([item.logprob for item in entry.values()])
        weights = np.exp((logprobs - logprobs.max()) / scale)
        drawn = random.choice(len(tokens), job.alt_tokens_k, p=weights / weights.sum())
        ids[row], values[row] = tokens[drawn], logprobs[drawn]
    return TopK(ids, values)
