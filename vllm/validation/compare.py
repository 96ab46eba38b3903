# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""Check that a served model computes what its reference computes.

The engine generates greedily; the reference then reads each whole sequence once and
says what it would have done at every position. Because it reads the *served* tokens
(teacher forcing), one near-tie counts once and has no effect on later tokens.

    report = validate(llm, lambda token_ids: model(token_ids), prompts)
    report.print_table()
    sys.exit(report.exit_code)

The two sides do not depend on each other: `served_tokens` reads what any engine
returned, and a `Reference` is any function. So `validate(llm, module)` can compare an
engine with the module that trains and still updates it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, cast

import torch
from torch import nn

from vllm.inputs import TokensPrompt
from vllm.logprobs import FlatLogprobs, PromptLogprobs, SampleLogprobs
from vllm.outputs import RequestOutput
from vllm.sampling_params import SamplingParams
from vllm.validation.report import Thresholds, TokenComparison, ValidationReport
from vllm.validation.trainer import is_trainer, logits_of_trainer

if TYPE_CHECKING:
    from vllm.entrypoints.llm import LLM
    from vllm.tokenizers import TokenizerLike

__all__ = ["validate", "validate_outputs"]

# Token ids [seq] (int64, on the CPU) -> logits [seq, vocab] of any floating dtype;
# row i predicts token i + 1.
Reference = Callable[[torch.Tensor], torch.Tensor]


def validate(
    llm: LLM,
    reference: Reference | nn.Module,
    prompts: Sequence[str | list[int]],
    max_tokens: int = 64,
    thresholds: Thresholds | None = None,
) -> ValidationReport:
    """Serve `prompts` greedily and compare every token with the reference.

    The KL is over the whole vocabulary if the engine was started with
    `max_logprobs=-1`, else over the `max_logprobs` most likely tokens. Generation
    does not stop at an end-of-sequence token. Log-probs of the prompts are asked
    for, too; therefore vLLM does not read its prefix cache here.

    Args:
        llm: The engine.
        reference: Token ids `[seq]` (int64, on the CPU) -> logits `[seq, vocab]` of
            any floating dtype; row i predicts token i + 1. Called once per prompt,
            without gradients. Or the module that trains, whole and in this process,
            which is called with ids and positions, and its output head.
        prompts: Texts or lists of token ids.
        max_tokens: Tokens to generate for each prompt.
        thresholds: What has to be kept; by default `Thresholds()`, for float32.

    Raises:
        ValueError: There is nothing to compare, or the reference's logits have
            another shape.

    """
    if not prompts or max_tokens < 1:
        raise ValueError(
            f"Nothing to validate: {len(prompts)} prompts, max_tokens={max_tokens}. "
            "Give at least one prompt and one token."
        )
    model_config = llm.llm_engine.model_config
    params = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        ignore_eos=True,
        logprobs=model_config.max_logprobs,
        prompt_logprobs=0,
        flat_logprobs=True,
        detokenize=False,  # a whole vocabulary, at every position
    )
    inputs: list[str | TokensPrompt] = [
        prompt if isinstance(prompt, str) else TokensPrompt(prompt_token_ids=prompt)
        for prompt in prompts
    ]
    outputs = llm.generate(inputs, params, use_tqdm=False)
    if is_trainer(reference):
        vocab_size = model_config.get_vocab_size()
        reference = logits_of_trainer(cast(nn.Module, reference), vocab_size)
    tokenizer = None if model_config.skip_tokenizer_init else llm.get_tokenizer()
    return validate_outputs(outputs, reference, max_tokens, thresholds, tokenizer)


@torch.no_grad()
def validate_outputs(
    outputs: Sequence[RequestOutput],
    reference: Reference,
    max_tokens: int,
    thresholds: Thresholds | None = None,
    tokenizer: TokenizerLike | None = None,
) -> ValidationReport:
    """Compare what an engine, such as an `AsyncLLM`, already generated.

    Args:
        outputs: Finished requests, generated greedily with `logprobs` and, if the
            prompts' tokens are to be compared, too, with `prompt_logprobs`.
        reference: As for `validate`.
        max_tokens: The number of tokens that every request should have generated.
        thresholds: As for `validate`.
        tokenizer: Decodes tokens for the table.

    Raises:
        ValueError: The reference's logits have another shape.

    """
    tokens: list[TokenComparison] = []
    missing = 0
    # The number of log-probs served for each generated token.
    support: list[int] = []
    vocab_size = 0
    for index, output in enumerate(outputs):
        sequence = _sequence(output)
        logprobs = _reference_logprobs(reference, sequence)
        vocab_size = logprobs.shape[1]
        missing += max(0, max_tokens - len(output.outputs[0].token_ids))
        for token in served_tokens(output):
            if token.token_id not in token.logprobs:
                missing += 1
                continue
            text = tokenizer.decode([token.token_id]) if tokenizer else ""
            row = logprobs[token.position - 1]
            tokens.append(_compare(index, token, row, text))
            if token.generated:
                support.append(len(token.logprobs))
    fewest = min(support, default=0)
    return ValidationReport(
        thresholds=thresholds or Thresholds(),
        num_prompts=len(outputs),
        tokens=tuple(tokens),
        missing_tokens=missing,
        kl_support=(
            "the whole vocabulary"
            if fewest == vocab_size > 0
            else f"the {fewest} tokens served as most likely, not the whole vocabulary"
        ),
    )


@dataclass(frozen=True)
class ServedToken:
    """One token as an engine reported it.

    Args:
        position: Its index in the sequence, prompt included.
        token_id: The token.
        generated: Whether the engine chose it; otherwise it is of the prompt.
        logprobs: The log-probabilities, in nats, that were reported at its position, by
            token. Empty if none were.

    """

    position: int
    token_id: int
    generated: bool
    logprobs: dict[int, float]


def served_tokens(output: RequestOutput) -> Iterator[ServedToken]:
    """The tokens of a finished request that can be compared.

    Those are the generated ones and, if their log-probs were asked for, the prompt's.
    The first token is left out, because nothing predicts it.
    """
    completion, start = output.outputs[0], len(output.prompt_token_ids or [])
    for position, token_id in enumerate(_sequence(output)):
        if position == 0:
            continue
        if position >= start:
            logprobs = _logprobs_at(completion.logprobs, position - start)
        elif output.prompt_logprobs is not None:
            logprobs = _logprobs_at(output.prompt_logprobs, position)
        else:
            continue
        yield ServedToken(position, token_id, position >= start, logprobs)


def _sequence(output: RequestOutput) -> list[int]:
    """The token ids of the prompt and of what was generated after it."""
    return [*(output.prompt_token_ids or []), *output.outputs[0].token_ids]


def _logprobs_at(
    logprobs: SampleLogprobs | PromptLogprobs | None, index: int
) -> dict[int, float]:
    """Log-prob of each token that the engine reported at `index`, none if none."""
    if logprobs is None or index >= len(logprobs):
        return {}
    if isinstance(logprobs, FlatLogprobs):  # without an object for each log-prob
        at = slice(logprobs.start_indices[index], logprobs.end_indices[index])
        return dict(zip(logprobs.token_ids[at], logprobs.logprobs[at], strict=True))
    return {token: entry.logprob for token, entry in (logprobs[index] or {}).items()}


def _reference_logprobs(reference: Reference, sequence: list[int]) -> torch.Tensor:
    """Log-probs `[seq, vocab]` in float64, on the CPU."""
    logits = reference(torch.tensor(sequence))
    if (
        logits.dim() != 2
        or len(logits) != len(sequence)
        or (logits.shape[1] <= max(sequence))
    ):
        raise ValueError(
            f"The reference returned logits of shape {list(logits.shape)} for "
            f"{len(sequence)} token ids up to {max(sequence)}; expected "
            f"[{len(sequence)}, vocab], without a batch axis."
        )
    return logits.to("cpu", torch.float64).log_softmax(-1)


def _compare(
    prompt: int, token: ServedToken, reference: torch.Tensor, text: str
) -> TokenComparison:
    """Compare a token with the reference's log-probs `[vocab]` at its position."""
    served = token.logprobs[token.token_id]
    expected = reference[token.token_id].item()
    kl = _kl(token.logprobs, reference)
    pair = {served, expected}
    numbers = {kl or 0.0} | (set() if pair == {-math.inf} else pair)
    return TokenComparison(
        prompt=prompt,
        position=token.position,
        token_id=token.token_id,
        generated=token.generated,
        served_logprob=served,
        reference_logprob=expected,
        rank=0 if reference.isnan().any() else int((reference > expected).sum()) + 1,
        kl=kl,
        finite=all(map(math.isfinite, numbers)),
        text=text,
    )


def _kl(served: dict[int, float], reference: torch.Tensor) -> float | None:
    """KL(served || reference) over the served tokens, both normalized over these."""
    if len(served) < 2:
        return None
    p = torch.tensor(list(served.values()), dtype=torch.float64).log_softmax(-1)
    q = reference[list(served)].log_softmax(-1)
    return torch.where(p.isneginf(), 0.0, p.exp() * (p - q)).sum().item()
