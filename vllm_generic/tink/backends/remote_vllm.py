# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Sampling by vLLM servers elsewhere, through `/v1/completions`."""

import math
import threading
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import numpy as np

from vllm_generic.tink.backends.base import (
    NO_LOGPROB,
    SampledSequence,
    SampleJob,
    SampleOutput,
    TopK,
    Version,
)
from vllm_generic.tink.backends.vllm_servers import VLLMServers

MOST_LOGPROBS = 20  # what a server answers unless it is started with --max-logprobs
TOKEN = "token_id:"  # before a token's id, where the answer would have its text


class RemoteVLLM:
    """Servers of the base model with ``--enable-lora``.

    They read adapters from the service's folders, so they run on its machine or share
    its disk, with ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=1``.
    """

    def __init__(self, urls: Sequence[str], max_adapters: int) -> None:
        self._urls = urls
        self._max_adapters = max_adapters
        self._servers: VLLMServers | None = None
        self._lock = threading.Lock()
        # of each server, the names of its adapters, the one used longest ago first
        self._loaded: dict[str, OrderedDict[str, None]] = {}
        self._locks: dict[str, threading.Lock] = {}

    def close(self) -> None:
        if self._servers is not None:
            self._servers.close()

    def unsupported(self, version: Version | None, job: SampleJob) -> str | None:
        if job.target_tokens is not None or job.alt_tokens_k:
            return "vLLM's API has no log-probabilities of chosen tokens"
        if max(job.topk_prompt, job.topk_sample) > MOST_LOGPROBS:
            return f"vLLM's API has at most {MOST_LOGPROBS} log-probabilities a token"
        if job.scores_prompt and version is not None:
            names = version.read().factors
            if any(name.split(".")[-1] == "lm_head" for name in names):
                return "vLLM scores prompts without an adapter of the head"
        return None

    def sample(self, version: Version | None, job: SampleJob) -> SampleOutput:
        servers = self._connected()
        body = _body(job)

        def ask(url: str) -> Any:
            body["model"] = servers.model
            if version is not None:
                self._load(servers, url, version)
                body["model"] = version.key
            return servers.request("POST", url, "/v1/completions", json=body).json()

        return _output(job, servers.least_busy(ask)["choices"])

    def _connected(self) -> VLLMServers:
        with self._lock:
            if self._servers is None:
                self._servers = VLLMServers(self._urls)
                for url in self._servers.urls:
                    self._loaded[url] = OrderedDict()
                    self._locks[url] = threading.Lock()
            return self._servers

    def _load(self, servers: VLLMServers, url: str, version: Version) -> None:
        with self._locks[url]:
            loaded = self._loaded[url]
            if version.key not in loaded:
                adapter = {"lora_name": version.key, "lora_path": str(version.folder)}
                servers.request("POST", url, "/v1/load_lora_adapter", json=adapter)
                loaded[version.key] = None
            loaded.move_to_end(version.key)
            while len(loaded) > 2 * self._max_adapters:
                oldest = {"lora_name": loaded.popitem(last=False)[0]}
                servers.request("POST", url, "/v1/unload_lora_adapter", json=oldest)


def _body(job: SampleJob) -> dict[str, Any]:
    params = job.params
    body = {
        "prompt": job.prompt,
        "n": job.num_samples,
        "max_tokens": params.max_tokens,
        "seed": params.seed,
        "temperature": params.temperature,
        "top_k": max(params.top_k, 0),
        "top_p": params.top_p,
        "stop": list(params.stop_strings),
        "stop_token_ids": list(params.stop_tokens),
        "include_stop_str_in_output": True,
        "ignore_eos": params.ignore_eos,
        "logprobs": job.topk_sample,
        "return_tokens_as_token_ids": True,
        "return_token_ids": True,
    }
    if job.scores_prompt:
        body["prompt_logprobs"] = job.topk_prompt
    return body


def _output(job: SampleJob, choices: list[dict[str, Any]]) -> SampleOutput:
    sequences = []
    for choice in sorted(choices, key=lambda choice: choice["index"]):
        logprobs = choice["logprobs"]
        top = None
        if job.topk_sample:
            entries = [
                {int(key.removeprefix(TOKEN)): value for key, value in entry.items()}
                for entry in logprobs["top_logprobs"]
            ]
            top = top_k(entries, job.topk_sample)
        sequences.append(
            SampledSequence(
                choice["token_ids"],
                logprobs["token_logprobs"],
                choice["finish_reason"] == "stop",
                top,
            )
        )
    if not job.scores_prompt:
        return SampleOutput(sequences)
    scored = [
        {int(token): entry["logprob"] for token, entry in (position or {}).items()}
        for position in choices[0]["prompt_logprobs"]
    ]
    first = 1
    if job.prompt_logprobs_last_n is not None:
        first = len(job.prompt) - job.prompt_logprobs_last_n
    values = np.full(len(job.prompt), math.nan, np.float32)
    for position in range(first, len(job.prompt)):
        values[position] = scored[position][job.prompt[position]]
    none: list[dict[int, float]] = [{}] * first
    return SampleOutput(
        sequences,
        prompt_logprobs=values if job.prompt_logprobs else None,
        topk_prompt=(
            top_k(none + scored[first:], job.topk_prompt) if job.topk_prompt else None
        ),
    )


def top_k(entries: Sequence[dict[int, float]], k: int) -> TopK:
    """The k likeliest tokens of each position; none where there is no entry."""
    ids = np.zeros((len(entries), k), np.int32)
    values = np.full((len(entries), k), NO_LOGPROB, np.float32)
    for row, entry in enumerate(entries):
        # the token itself is in an entry too, whatever its rank
        ranked = sorted(entry.items(), key=lambda item: -item[1])[:k]
        for column, (token, logprob) in enumerate(ranked):
            ids[row, column], values[row, column] = token, logprob
    return TopK(ids, values)
