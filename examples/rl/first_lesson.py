# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A first lesson from right answers, so that some samples of the model are right."""

import torch
import torch.nn.functional as F
from reverse_digits import DIGITS, answer_to, logprobs_of, problems, prompts_of
from torch import nn


def logprobs_of_answers(
    model: nn.Module, digits: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Of problems with their right answers.

    Returns:
        Log-probabilities of all tokens at each place of the answers,
        `[count, DIGITS + 1, vocab]`, and the right tokens, `[count, DIGITS + 1]`.

    """
    prompts = prompts_of(digits)
    tokens = torch.tensor([[*prompt, *answer_to(prompt)] for prompt in prompts])
    return logprobs_of(model, tokens)[:, DIGITS:-1], tokens[:, DIGITS + 1 :]


@torch.no_grad()
def share_right(model: nn.Module, digits: torch.Tensor) -> float:
    """The share of problems that the model would answer right, greedily."""
    logprobs, right = logprobs_of_answers(model, digits)
    return float((logprobs.argmax(-1) == right).all(dim=1).float().mean())


def pretrain(model: nn.Module, goal: float, most_steps: int, seed: int) -> int:
    """Show the model right answers until it answers the share `goal` of others right.

    Returns:
        The steps, at most `most_steps`. How many it takes depends on the seed, and a
        model that knows too little or too much shows nothing of reinforcement learning.

    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    others = problems(200, seed=1, held_out=True)
    for step in range(most_steps):
        if share_right(model, others) >= goal:
            return step
        digits = problems(64, seed=1000 * seed + step)
        logprobs, right = logprobs_of_answers(model, digits)
        F.nll_loss(logprobs.flatten(0, 1), right.flatten()).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
    return most_steps
