# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling by a Hugging Face model: the fallback where vLLM is not used."""

import asyncio
import math
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import torch

from vllm.lora.adapted_module import AdaptedModule
from vllm.lora.adapter import Adapter
from vllm_generic.tink.backends import hf_model
from vllm_generic.tink.backends.base import (
    NO_LOGPROB,
    SampledSequence,
    SampleJob,
    SampleOutput,
    SamplingParams,
    TopK,
    Version,
)
from vllm_generic.tink.backends.packed_model import PackedModel, WholeModel
from vllm_generic.tink.errors import UserError
from vllm_generic.tink.losses import target_logprobs

STOP_STRING_WINDOW = 32  # tokens that are decoded to look for a stop string


class HFSampler:
    """Draws tokens with a cache, then scores the whole sequence as the trainer does.

    Args:
        model: the Hugging Face model, which draws.
        scorer: the module that is trained, or one that shares its weights. It scores
            one sequence at a time.
        tokenizer: for stop strings.
        max_adapters: that are kept in memory.

    """

    engine = None

    def __init__(
        self,
        model: Any,
        scorer: PackedModel | WholeModel,
        tokenizer: Any,
        max_adapters: int = 8,
    ) -> None:
        self.base = model
        self.tokenizer = tokenizer
        self.max_length = hf_model.max_length(model)
        self.vocab_size = int(model.config.vocab_size)
        self.max_adapters = max_adapters
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="sampler")
        self._drawer = AdaptedModule(model)
        self._scorer = AdaptedModule(scorer, vocab_size=self.vocab_size)
        self._adapters: OrderedDict[str, Adapter] = OrderedDict()  # by version's key

    def close(self) -> None:
        self._thread.shutdown()

    def failure(self) -> str | None:
        return None

    async def sample(self, version: Version | None, job: SampleJob) -> SampleOutput:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(
            self._thread, self._sample_version, version, job
        )

    @torch.no_grad()
    def _sample_version(self, version: Version | None, job: SampleJob) -> SampleOutput:
        adapter = None if version is None else self._adapter(version)
        # A request for log-probabilities alone comes as one for a single token.
        adapters = [] if adapter is None else [adapter]
        rows = torch.zeros(max(len(job.prompt), job.num_samples), dtype=torch.int64)
        with self._drawer.active(adapters, rows, tokens=1):
            drawn = self._draw(self.base, job)
        sequences = [
            self._scored(adapter, job, tokens, stopped) for tokens, stopped in drawn
        ]
        return SampleOutput(sequences, **self._score_prompt(adapter, job))

    def _adapter(self, version: Version) -> Adapter:
        adapter = self._adapters.get(version.key)
        if adapter is None:
            adapter = version.read().named_as(self._scorer.sites)
            try:
                adapter.check_fits(self._scorer.sites)
            except ValueError as error:
                raise UserError(str(error)) from error
            self._adapters[version.key] = adapter
        self._adapters.move_to_end(version.key)
        while len(self._adapters) > self.max_adapters:
            self._adapters.popitem(last=False)
        return adapter

    def _draw(self, model: Any, job: SampleJob) -> list[tuple[list[int], bool]]:
        params, count = job.params, job.num_samples
        limit = self.max_length - len(job.prompt)
        limit = min(limit, limit if params.max_tokens is None else params.max_tokens)
        generators = [_generator(params.seed, index) for index in range(count)]
        prompt = torch.tensor([job.prompt], device=self.base.device)
        result = model(input_ids=prompt, use_cache=True, logits_to_keep=1)
        cache = result.past_key_values
        cache.batch_repeat_interleave(count)
        logits = result.logits[:, -1].expand(count, -1)  # [samples, vocabulary]
        drawn: list[list[int]] = [[] for _ in range(count)]
        stopped = [False] * count
        for step in range(limit):
            for index in range(count):
                if not stopped[index]:
                    token = _draw_token(logits[index], params, generators[index])
                    drawn[index].append(token)
                    stopped[index] = self._stops(drawn[index], params)
            if all(stopped) or step == limit - 1:
                break
            # samples that have ended go on with their last token, unused
            last = torch.tensor([[tokens[-1]] for tokens in drawn])
            result = model(
                input_ids=last.to(self.base.device),
                past_key_values=cache,
                use_cache=True,
            )
            logits = result.logits[:, -1]
        return list(zip(drawn, stopped, strict=True))

    def _stops(self, tokens: list[int], params: SamplingParams) -> bool:
        if tokens[-1] in params.stop_tokens:
            return True
        if not params.ignore_eos and tokens[-1] == self.tokenizer.eos_token_id:
            return True
        if not params.stop_strings:
            return False
        text = self.tokenizer.decode(tokens[-STOP_STRING_WINDOW:])
        return any(stop in text for stop in params.stop_strings)

    def _logits(self, adapter: Adapter | None, tokens: list[int]) -> torch.Tensor:
        """Logits [N - 1, vocabulary]: row i predicts token i + 1."""
        (logits,) = self._scorer.logits([(adapter, torch.tensor(tokens[:-1]))])
        return logits.cpu()

    def _scored(
        self, adapter: Adapter | None, job: SampleJob, tokens: list[int], stopped: bool
    ) -> SampledSequence:
        if not tokens:
            return SampledSequence([], [], False)
        logits = self._logits(adapter, job.prompt + tokens)
        targets = np.asarray((job.prompt + tokens)[1:])
        logprobs = target_logprobs(logits, targets)[-len(tokens) :]
        topk = None
        if job.topk_sample:
            topk = _topk(logits[-len(tokens) :], job.topk_sample)
        return SampledSequence(tokens, logprobs.tolist(), stopped, topk)

    def _score_prompt(self, adapter: Adapter | None, job: SampleJob) -> dict[str, Any]:
        """What is asked for about the prompt; position 0 has no log-probability."""
        if not job.scores_prompt:
            return {}
        out: dict[str, Any] = {}
        length = len(job.prompt)
        if length > 1:
            logits = self._logits(adapter, job.prompt)
        else:
            logits = torch.empty(0, self.base.config.vocab_size)
        first = (
            1
            if job.prompt_logprobs_last_n is None
            else (length - job.prompt_logprobs_last_n)
        )
        if job.prompt_logprobs:
            values = np.full(length, math.nan, np.float32)
            values[1:] = target_logprobs(logits, np.asarray(job.prompt[1:])).numpy()
            values[:first] = math.nan
            out["prompt_logprobs"] = values
        if job.topk_prompt:
            # an unscored position is token 0 with the client's mark for "none"
            topk = _topk(logits, job.topk_prompt)
            ids = np.zeros((length, job.topk_prompt), np.int32)
            values = np.full((length, job.topk_prompt), NO_LOGPROB, np.float32)
            ids[1:], values[1:] = topk.token_ids, topk.logprobs
            ids[:first], values[:first] = 0, NO_LOGPROB
            out["topk_prompt"] = TopK(ids, values)
        if job.target_tokens is not None:
            wanted_ids = job.target_tokens
            values = target_logprobs(logits, np.maximum(wanted_ids, 0)).numpy()
            out["target_logprobs"] = np.where(wanted_ids < 0, 0.0, values).astype("f4")
        if job.alt_tokens_k:
            out["alt_tokens"] = _alternatives(logits, job)
        return out


def _generator(seed: int | None, index: int) -> torch.Generator:
    """Random numbers of one sample; equal seeds give equal samples, index by index."""
    generator = torch.Generator()
    if seed is None:
        generator.seed()
    else:
        sequence = np.random.SeedSequence([seed % 2**64, index])
        generator.manual_seed(int(sequence.generate_state(1, np.uint64)[0] >> 1))
    return generator


def _draw_token(
    logits: torch.Tensor, params: SamplingParams, generator: torch.Generator
) -> int:
    """One token of logits [vocabulary]."""
    logits = logits.float().cpu()
    if params.temperature == 0:
        return int(logits.argmax())
    logits = logits / params.temperature
    if params.top_k > 0:
        kept = logits.topk(min(params.top_k, len(logits))).values[-1]
        logits = logits.masked_fill(logits < kept, -math.inf)
    if params.top_p < 1:
        values, order = logits.softmax(-1).sort(descending=True)
        # a token is dropped if those before it already reach top_p
        dropped = order[(values.cumsum(-1) - values) >= params.top_p]
        logits = logits.index_fill(0, dropped[dropped != order[0]], -math.inf)
    return int(torch.multinomial(logits.softmax(-1), 1, generator=generator))


def _topk(logits: torch.Tensor, k: int) -> TopK:
    top = torch.log_softmax(logits.float(), -1).topk(k)
    return TopK(top.indices.numpy().astype(np.int32), top.values.numpy())


def _alternatives(logits: torch.Tensor, job: SampleJob) -> TopK:
    """Tokens drawn at every position of the prompt but the first."""
    logprobs = torch.log_softmax(logits.float(), -1)
    scale = job.params.temperature or 1e-6
    drawn = torch.multinomial(
        (logits.float() / scale).softmax(-1),
        job.alt_tokens_k,
        replacement=True,
        generator=_generator(job.params.seed, 0),
    )
    return TopK(drawn.numpy().astype(np.int32), logprobs.gather(-1, drawn).numpy())
