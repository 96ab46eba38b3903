# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A plain PyTorch language model, small enough to start an engine in seconds."""

import torch
from torch import nn

from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.parallel_context import ParallelContext

VOCAB = 128
HEADS = 2
HEAD_DIM = 32
HIDDEN = HEADS * HEAD_DIM
LAYERS = 2
POSITIONS = 256

CONFIG = {
    "architectures": ["TinyModel"],
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": POSITIONS,
}


class TinyBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.qkv = nn.Linear(HIDDEN, 3 * HIDDEN)
        self.attention = TrainableAttention(HEADS, HEAD_DIM)
        self.projection = nn.Linear(HIDDEN, HIDDEN)

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        q, k, v = self.qkv(self.norm(hidden_states)).chunk(3, dim=-1)
        shape = (*q.shape[:-1], HEADS, HEAD_DIM)
        out = self.attention(q.view(shape), k.view(shape), v.view(shape))
        return hidden_states + self.projection(out.flatten(-2))


class TinyModel(nn.Module):
    """Trains on `[batch, seq]` tokens and serves flattened ones."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(POSITIONS, HIDDEN)
        self.layers = nn.ModuleList(TinyBlock() for _ in range(LAYERS))
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)

    def forward(self, input_ids: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
        hidden_states = self.embedding(input_ids) + self.positions(positions)
        for layer in self.layers:
            hidden_states = layer(hidden_states)
        return hidden_states


def trained_model() -> TinyModel:
    """The same weights on every call, large enough for a decided argmax."""
    generator = torch.Generator().manual_seed(0)
    model = TinyModel()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=1.0, generator=generator)
    return model


def full_sequence_logits(model: TinyModel, token_ids: list[int]) -> torch.Tensor:
    """`[seq, vocab]`, without a cache."""
    ids = torch.tensor(token_ids)
    with torch.no_grad():
        return model.lm_head(model(ids, torch.arange(len(token_ids))))


def greedy(model: TinyModel, prompt: list[int], tokens: int) -> list[int]:
    """The greedy continuation, recomputed in full for every token."""
    token_ids = list(prompt)
    for _ in range(tokens):
        token_ids.append(int(full_sequence_logits(model, token_ids)[-1].argmax()))
    return token_ids[len(prompt) :]


def build(vllm_config: object, parallel_context: ParallelContext) -> TinyModel:
    """A factory that other processes import as `tiny_model:build`."""
    return TinyModel()
