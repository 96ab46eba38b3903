# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A task of two examples: each token is the sum of the two before it, modulo 31."""

from collections.abc import Callable

import torch
from torch import nn

VOCAB = 31


def sequences(count: int, length: int, generator: torch.Generator) -> torch.Tensor:
    """`[count, length]`, of random beginnings."""
    rows = torch.randint(VOCAB, (count, length), generator=generator)
    for i in range(2, length):
        rows[:, i] = (rows[:, i - 1] + rows[:, i - 2]) % VOCAB
    return rows


def train(
    name: str,
    module: nn.Module,
    loss_of: Callable[[torch.Tensor], torch.Tensor],
    steps: int,
    count: int,
    length: int,
    seed: int = 0,
) -> None:
    """Train `module` by AdamW on `[count, length]` new sequences in each step."""
    optimizer = torch.optim.AdamW(module.parameters(), lr=3e-3)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        loss = loss_of(sequences(count, length, generator))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 100 == 0 or step == steps - 1:
            print(f"{name}, step {step}: loss {loss.item():.4f}", flush=True)
    module.eval()
