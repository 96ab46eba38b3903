# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""The prompts of the self-check, and the steps in which the engine would read them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

# Lengths that no axis of a model is likely to have.
PROMPT, OTHER_PROMPT = 41, 23
SHORTEST = 8
DECODE_STEPS = 3
# Windows that a prompt is made longer for, and by how much it is longer.
LONG, BEYOND = 512, 13
# At each end of a piece of a long prompt, the tokens whose logits are compared.
COMPARED = 8


@dataclass(frozen=True)
class Piece:
    """The tokens `start` to `end` of a request, which one step reads."""

    request: int
    start: int
    end: int

    @property
    def tokens(self) -> int:
        return self.end - self.start

    @property
    def is_decode(self) -> bool:
        return self.start > 0 and self.tokens == 1

    def compared(self) -> list[int]:
        """The positions whose logits are compared."""
        positions = list(range(self.start, self.end))
        if len(positions) <= PROMPT:
            return positions
        return positions[:COMPARED] + positions[-COMPARED:]


def steps_of(lengths: list[int], max_tokens: int) -> list[list[Piece]]:
    """Each prompt in two chunks or more and decode steps, the next one a step later.

    So two requests are read in turns, and a chunk of one is beside a decode step of the
    other. Decode steps come first in a batch, as in vLLM's.

    Args:
        lengths: tokens of each request.
        max_tokens: the most that one step may read.

    """
    steps: list[list[Piece]] = []
    for request, length in enumerate(lengths):
        prefill = length - DECODE_STEPS
        chunk = min(-(-prefill // 2), max(1, max_tokens // len(lengths)))
        ends = [*range(chunk, prefill, chunk), *range(prefill, length + 1)]
        for index, (start, end) in enumerate(zip([0, *ends], ends, strict=False)):
            while len(steps) <= index + request:
                steps.append([])
            steps[index + request].append(Piece(request, start, end))
    return [sorted(step, key=lambda piece: not piece.is_decode) for step in steps]


def token_ids(
    length: int, vocab_size: int, special: Collection[int], seed: int
) -> torch.Tensor:
    """Tokens `[length]` (int64) without `special` ones, the same on every rank."""
    generator = torch.Generator().manual_seed(seed)
    ordinary = [i for i in range(min(vocab_size, 4096)) if i not in special] or [0]
    index = torch.randint(
        len(ordinary), (length,), generator=generator, device=torch.device("cpu")
    )
    return torch.tensor(ordinary, device=torch.device("cpu"))[index]
