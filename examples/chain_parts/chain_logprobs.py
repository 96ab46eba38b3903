# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The trainer's log-probabilities of what an engine has sampled, and how far off."""

import torch
from chain_models import Subject
from torch import nn


def logprobs_of(
    subject: Subject, model: nn.Module, rows: list[dict]
) -> list[torch.Tensor]:
    """Of the tokens of each row's answer, `[tokens]`, with gradients."""
    whole = [torch.tensor(row["prompt"] + row["answer"]) for row in rows]
    tokens = nn.utils.rnn.pad_sequence(whole, batch_first=True)  # [rows, seq]
    found = subject.logits(model, tokens).log_softmax(-1)
    starts = [len(row["prompt"]) for row in rows]
    return [
        found[i, start - 1 : len(ids) - 1].gather(-1, ids[start:, None])[:, 0]
        for i, (start, ids) in enumerate(zip(starts, whole, strict=True))
    ]


@torch.no_grad()
def farthest(subject: Subject, model: nn.Module, rows: list[dict]) -> float:
    """The largest |Δ log p| between `model` and what an engine has sampled."""
    ours = logprobs_of(subject, model, rows)
    return max(map(distance, ours, [row["logprobs"] for row in rows]))


def distance(ours: torch.Tensor, theirs: list[float]) -> float:
    return float((ours.detach() - torch.tensor(theirs)).abs().max())
