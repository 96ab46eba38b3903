# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A GPT as people write it to train one: no line of it knows vLLM.

Learned positions are counted inside, attention is PyTorch's, the head shares the
embedding's weight, and without targets there are logits for the last token only.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn


@dataclass
class PlainConfig:
    vocab_size: int = 256
    context: int = 128
    layers: int = 2
    heads: int = 2
    width: int = 64


class PlainAttention(nn.Module):
    def __init__(self, config: PlainConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.out = nn.Linear(config.width, config.width)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (
            y.view(batch, tokens, self.heads, -1).transpose(1, 2) for y in (q, k, v)
        )
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class WrittenAttention(PlainAttention):
    """As in minGPT, with a mask that is as large as its context."""

    def __init__(self, config: PlainConfig) -> None:
        super().__init__(config)
        mask = torch.ones(1, 1, config.context, config.context).tril()
        self.register_buffer("mask", mask, persistent=False)

    def forward(self, x):
        batch, tokens, width = x.shape
        q, k, v = self.qkv(x).split(width, dim=2)
        q, k, v = (
            y.view(batch, tokens, self.heads, -1).transpose(1, 2) for y in (q, k, v)
        )
        scores = (q @ k.transpose(-2, -1)) / math.sqrt(k.size(-1))
        mask = self.mask[:, :, :tokens, :tokens]
        y = scores.masked_fill(mask == 0, float("-inf")).softmax(-1) @ v
        return self.out(y.transpose(1, 2).reshape(batch, tokens, width))


class PlainBlock(nn.Module):
    def __init__(self, config: PlainConfig, attention: type[nn.Module]) -> None:
        super().__init__()
        self.norm_1 = nn.LayerNorm(config.width)
        self.attention = attention(config)
        self.norm_2 = nn.LayerNorm(config.width)
        self.mlp = nn.Sequential(
            nn.Linear(config.width, 4 * config.width),
            nn.GELU(),
            nn.Linear(4 * config.width, config.width),
        )

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class PlainGPT(nn.Module):
    def __init__(
        self, config: PlainConfig, attention: type[nn.Module] = PlainAttention
    ) -> None:
        super().__init__()
        self.config = config
        self.tokens = nn.Embedding(config.vocab_size, config.width)
        self.places = nn.Embedding(config.context, config.width)
        blocks = (PlainBlock(config, attention) for _ in range(config.layers))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(config.width)
        self.unembed = nn.Linear(config.width, config.vocab_size, bias=False)
        self.unembed.weight = self.tokens.weight

    def forward(self, idx, targets=None):
        batch, tokens = idx.shape
        assert tokens <= self.config.context
        x = self.tokens(idx) + self.places(torch.arange(tokens, device=idx.device))
        for block in self.blocks:
            x = block(x)
        x = self.norm(x)
        if targets is None:
            return self.unembed(x[:, [-1], :]), None
        logits = self.unembed(x)
        return logits, F.cross_entropy(logits.flatten(0, 1), targets.flatten())
