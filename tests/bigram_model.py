# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A small model, and what an engine would return for it."""

from types import SimpleNamespace

import torch
from torch import nn

from vllm.logprobs import FlatLogprobs, Logprob

VOCAB = 32
PROMPTS = [[3, 1, 4], [1, 5, 9, 2]]
MAX_TOKENS = 6


class BigramModel(nn.Module):
    """Logits of the next token depend on the last one only."""

    def __init__(self) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.table = nn.Embedding.from_pretrained(
            3 * torch.randn(VOCAB, VOCAB, generator=generator)
        )

    def forward(self, token_ids: torch.Tensor) -> torch.Tensor:
        return self.table(token_ids)


def serve(model: BigramModel, num_logprobs: int = VOCAB, flat: bool = True) -> list:
    """What vLLM would return for greedy requests."""

    def logprobs_at(token_ids: list[int], chosen: int) -> dict[int, Logprob]:
        row = model(torch.tensor(token_ids))[-1].log_softmax(-1)
        top = row.topk(num_logprobs).indices.tolist()
        order = row.argsort(descending=True).tolist()
        return {
            token: Logprob(row[token].item(), order.index(token) + 1)
            for token in [chosen, *top]
        }

    outputs = []
    for prompt in PROMPTS:
        of_prompt: list = [None]
        for i in range(1, len(prompt)):
            of_prompt.append(logprobs_at(prompt[:i], prompt[i]))
        sequence = list(prompt)
        generated: list = FlatLogprobs() if flat else []  # type: ignore[assignment]
        for _ in range(MAX_TOKENS):
            token = int(model(torch.tensor(sequence))[-1].argmax())
            generated.append(logprobs_at(sequence, token))
            sequence.append(token)
        completion = SimpleNamespace(
            token_ids=sequence[len(prompt) :], logprobs=generated
        )
        outputs.append(
            SimpleNamespace(
                prompt_token_ids=prompt,
                prompt_logprobs=of_prompt,
                outputs=[completion],
            )
        )
    return outputs


def failed(report) -> set[str]:
    return {check.name for check in report.checks if not check.passed}
