# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The trainer's log-probabilities of what an engine has sampled, and how far off."""

import torch
from chain_models import Subject
from torch import nn

from vllm import envs
from vllm.training.batch_invariance import token_log_probs


def logprobs_of(
    subject: Subject, model: nn.Module, rows: list[dict]
) -> list[torch.Tensor]:
    """Of the tokens of each row's answer, float32 `[tokens]`, with gradients.

    In the exact mode they are summed as an engine sums them.
    """
    device = next(model.parameters()).device
    whole = [torch.tensor(row["prompt"] + row["answer"], device=device) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(whole, batch_first=True)  # [rows, seq]
    logits = subject.logits(model, tokens)  # [rows, seq, vocab]
    starts = [len(row["prompt"]) for row in rows]
    kept = torch.cat(
        [
            logits[i, start - 1 : len(ids) - 1]
            for i, (start, ids) in enumerate(zip(starts, whole, strict=True))
        ]
    )  # [all answers' tokens, vocab]
    targets = torch.cat([ids[start:] for start, ids in zip(starts, whole, strict=True)])
    if envs.VLLM_BATCH_INVARIANT:
        found = token_log_probs(kept, targets)
    else:
        found = kept.float().log_softmax(-1).gather(-1, targets[:, None])[:, 0]
    return list(found.split([len(row["answer"]) for row in rows]))


@torch.no_grad()
def farthest(subject: Subject, model: nn.Module, rows: list[dict]) -> float:
    """The largest |Δ log p| between `model` and what an engine has sampled."""
    ours = logprobs_of(subject, model, rows)
    return max(map(distance, ours, [row["logprobs"] for row in rows]))


def distance(ours: torch.Tensor, theirs: list[float]) -> float:
    return float((ours.detach().cpu() - torch.tensor(theirs)).abs().max())
