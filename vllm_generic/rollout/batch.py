# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""From an engine's outputs to the tensors that a trainer takes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from vllm import RequestOutput
from vllm.outputs import CompletionOutput

NOT_SAMPLED = -1


@dataclass
class Sample:
    """One answer to a prompt, token by token, as it was sampled.

    The lists from `token_ids` to `versions` have one entry for each token after the
    prompt.

    Args:
        prompt_index: The position of its prompt in the batch.
        prompt: The prompt's text, if it has one.
        prompt_token_ids: The prompt's tokens.
        token_ids: The tokens after the prompt: sampled, or given by an environment.
        logprobs: Their log-probabilities; 0 where a token was not sampled.
        sampled: Whether the model has sampled the token.
        versions: Of which update the weights were; -1 where a token was not sampled.
        text: The text after the prompt.
        finish_reason: "stop", "length", or "abort".
        prompt_logprobs: Those of the prompt's tokens after the first, if asked for.

    """

    prompt_index: int
    prompt: str | None
    prompt_token_ids: list[int]
    token_ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    sampled: list[bool] = field(default_factory=list)
    versions: list[int] = field(default_factory=list)
    text: str = ""
    finish_reason: str | None = None
    prompt_logprobs: list[float] | None = None


def samples_of(output: RequestOutput, prompt_index: int, version: int) -> list[Sample]:
    """The answers of one request.

    Args:
        output: The engine's output, with log-probabilities of the sampled tokens.
        prompt_index: The position of its prompt in the batch.
        version: Of which update the weights were, if the release of vLLM does not say.

    """
    prompt_token_ids = list(output.prompt_token_ids or ())
    prompt_logprobs = None
    if output.prompt_logprobs is not None:
        rest = zip(prompt_token_ids[1:], output.prompt_logprobs[1:], strict=True)
        prompt_logprobs = [at[token].logprob for token, at in rest if at is not None]
    return [
        Sample(
            prompt_index=prompt_index,
            prompt=output.prompt,
            prompt_token_ids=prompt_token_ids,
            token_ids=list(completion.token_ids),
            logprobs=_logprobs(completion),
            sampled=[True] * len(completion.token_ids),
            versions=_versions(completion, version),
            text=completion.text,
            finish_reason=completion.finish_reason,
            prompt_logprobs=prompt_logprobs,
        )
        for completion in output.outputs
    ]


def collate(
    samples: Sequence[Sample], pad_token_id: int, length: int | None = None
) -> dict[str, Any]:
    """The batch that `VLLMModule.forward_step` returns.

    Args:
        samples: The answers, grouped by prompt.
        pad_token_id: What follows a sequence that is shorter than the longest.
        length: Of all sequences; that of the longest if None.

    Returns:
        Tensors and lists, `samples` long:

        - `all_tokens`: int64 `[samples, length]`, prompt and answer, padded right.
        - `logprobs`: float32 `[samples, length - 1]`; entry `t` is that of token
          `t + 1`, and 0 where that was not sampled.
        - `loss_mask`: float32 `[samples, length]`, 1 where a token was sampled.
        - `weight_versions`: int64 `[samples, length]`, -1 where it was not sampled.
        - `lengths`: int64 `[samples]`, tokens before the padding.
        - `prompt_index`: int64 `[samples]`, the position of the prompt in the batch.
        - `no_padded_query_ids`: each prompt's tokens, int64 `[prompt]`.
        - `str_prompts`, `str_outputs`, `finish_reasons`: lists of `str`.

    Raises:
        ValueError: a sequence is longer than `length`.

    """
    lengths = [len(s.prompt_token_ids) + len(s.token_ids) for s in samples]
    longest = max(lengths, default=0)
    if length is None:
        length = longest
    if longest > length:
        index = samples[lengths.index(longest)].prompt_index
        raise ValueError(
            f"The answer to prompt {index} makes {longest} tokens with it; expected at "
            f"most {length}. Lower max_new_tokens, or raise seq_length."
        )
    # [samples, length]
    shape = (len(samples), length)
    all_tokens = torch.full(shape, pad_token_id, dtype=torch.int64)
    logprobs = torch.zeros(shape)
    loss_mask = torch.zeros(shape)
    weight_versions = torch.full(shape, NOT_SAMPLED, dtype=torch.int64)
    # NumPy reads a list several times as fast as PyTorch does.
    places = [t.numpy() for t in (all_tokens, logprobs, loss_mask, weight_versions)]
    for row, (sample, end) in enumerate(zip(samples, lengths, strict=True)):
        begin = len(sample.prompt_token_ids)
        places[0][row, :begin] = sample.prompt_token_ids
        values = sample.token_ids, sample.logprobs, sample.sampled, sample.versions
        for place, numbers in zip(places, values, strict=True):
            place[row, begin:end] = numbers
        if sample.prompt_logprobs is not None:
            places[1][row, 1:begin] = sample.prompt_logprobs
    return {
        "all_tokens": all_tokens,
        "logprobs": logprobs[:, 1:],
        "loss_mask": loss_mask,
        "weight_versions": weight_versions,
        "lengths": torch.tensor(lengths, dtype=torch.int64),
        "prompt_index": torch.tensor([s.prompt_index for s in samples]),
        "no_padded_query_ids": [
            tokens[: len(sample.prompt_token_ids)].clone()
            for tokens, sample in zip(all_tokens, samples, strict=True)
        ],
        "str_prompts": [s.prompt or "" for s in samples],
        "str_outputs": [s.text for s in samples],
        "finish_reasons": [s.finish_reason or "" for s in samples],
    }


def _logprobs(completion: CompletionOutput) -> list[float]:
    if completion.logprobs is None:
        return [0.0] * len(completion.token_ids)
    steps: Iterable[Any] = zip(completion.token_ids, completion.logprobs, strict=True)
    return [at[token].logprob for token, at in steps]


def _versions(completion: CompletionOutput, version: int) -> list[int]:
    """The update whose weights sampled each token; vLLM has it since 0.32."""
    spans = getattr(completion, "weight_versions", None)
    if spans is None:
        return [version] * len(completion.token_ids)
    versions: list[int] = []
    for span in spans:
        versions += [int(span.version)] * (span.end - span.start)
    return versions


def number_versions(output: RequestOutput, number: Callable[[str], int]) -> None:
    """Replace an engine's labels of its weights by numbers of updates."""
    for completion in output.outputs:
        for span in getattr(completion, "weight_versions", None) or ():
            span.version = str(number(span.version))
