# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A task with a verifiable answer, and a model that trains and serves.

A problem is `314159=`, and its answer is `951413` and an end.
"""

import torch
from torch import nn

from vllm.model_executor.layers import TrainableFlashAttention

DIGITS = 6
PAD, END, EQUALS = 10, 11, 12
WORDS = [*"0123456789", "_", ".", "="]
CONFIG = {
    "architectures": ["ReverseGPT"],
    "hidden_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "vocab_size": len(WORDS),
    "max_position_embeddings": 32,
    "eos_token_id": END,
    "dtype": "float32",
}


class Block(nn.Module):
    def __init__(self, hidden: int, heads: int) -> None:
        super().__init__()
        self.attn_norm = nn.RMSNorm(hidden)
        self.attn = TrainableFlashAttention(hidden, heads, rope_theta=1e4)
        self.mlp = nn.Sequential(
            nn.RMSNorm(hidden),
            nn.Linear(hidden, 4 * hidden),
            nn.GELU(),
            nn.Linear(4 * hidden, hidden),
        )

    def forward(self, x: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = x + self.attn(self.attn_norm(x), positions)
        return x + self.mlp(x)


class ReverseGPT(nn.Module):
    """Tokens `[batch, seq]` in training, `[tokens]` in vLLM -> hidden states."""

    def __init__(self) -> None:
        super().__init__()
        hidden, heads = CONFIG["hidden_size"], CONFIG["num_attention_heads"]
        self.embedding = nn.Embedding(CONFIG["vocab_size"], hidden)
        self.blocks = nn.ModuleList(
            Block(hidden, heads) for _ in range(CONFIG["num_hidden_layers"])
        )
        self.norm = nn.RMSNorm(hidden)
        self.lm_head = nn.Linear(hidden, CONFIG["vocab_size"], bias=False)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        x = self.embedding(input_ids)
        for block in self.blocks:
            x = block(x, positions)
        return self.norm(x)


def logprobs_of(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Log-probabilities of all next tokens, `[batch, seq]` -> `[batch, seq, vocab]`."""
    hidden_states = model(tokens, torch.arange(tokens.shape[1]))
    return model.lm_head(hidden_states).log_softmax(-1)


def problems(count: int, seed: int, held_out: bool = False) -> torch.Tensor:
    """`[count, DIGITS]` digits. The multiples of 97 are held out."""
    generator = torch.Generator().manual_seed(seed)
    numbers = torch.randint(97, 10**DIGITS, (count, 1), generator=generator)
    rest = numbers % 97
    numbers -= rest if held_out else (rest == 0).long()
    powers = 10 ** torch.arange(DIGITS - 1, -1, -1)
    return numbers // powers % 10


def prompts_of(digits: torch.Tensor) -> list[list[int]]:
    return [[*row, EQUALS] for row in digits.tolist()]


def answer_to(prompt: list[int]) -> list[int]:
    return [*reversed(prompt[:-1]), END]


def reward(prompt: list[int], answer: list[int]) -> float:
    """The share of tokens that are right."""
    right = answer_to(prompt)
    return sum(a == b for a, b in zip(answer, right, strict=False)) / len(right)


def whole_reward(prompt: list[int], answer: list[int]) -> float:
    """1 if all tokens are right, else 0."""
    return float(answer == answer_to(prompt))


# With shares of right tokens some seeds learn slowly: those whose model knows one of
# the digits less than the others.
REWARDS = {"whole": whole_reward, "share": reward}


def text_of(tokens: list[int]) -> str:
    return "".join(WORDS[token] for token in tokens)
