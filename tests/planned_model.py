# SPDX-License-Identifier: Apache-2.0
# SPDX-FileCopyrightText: Copyright contributors to the vLLM project
"""A plain model with plans, for their tests."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from vllm.model_executor.layers import TrainableAttention
from vllm.model_executor.parallel_context import ParallelContext

VOCAB, HIDDEN, HEADS, LAYERS = 128, 64, 2, 3
CONFIG = {
    "architectures": ["PlanModel"],
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "vocab_size": VOCAB,
    "max_position_embeddings": 128,
}
TWO_RANKS = ParallelContext(tensor_parallel_size=2)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(HIDDEN)
        self.query_linear = nn.Linear(HIDDEN, HIDDEN)
        self.key_linear = nn.Linear(HIDDEN, HIDDEN)
        self.value_linear = nn.Linear(HIDDEN, HIDDEN)
        self.core = nn.ModuleDict({"attention": TrainableAttention(HEADS, 32)})
        self.output_linear = nn.Linear(HIDDEN, HIDDEN)
        self.up = nn.Linear(HIDDEN, 2 * HIDDEN)
        self.down = nn.Linear(2 * HIDDEN, HIDDEN)

    def forward(self, x):
        h = self.norm(x)
        q, k, v = self.query_linear(h), self.key_linear(h), self.value_linear(h)
        x = x + self.output_linear(self.core["attention"](q, k, v))
        return x + self.down(F.gelu(self.up(x)))


class Stack(nn.Module):
    _no_split_modules = ["Block"]

    def __init__(self, kind):
        super().__init__()
        blocks = [Block() for _ in range(LAYERS)]
        if kind is nn.ModuleDict:
            blocks = {f"layer_{i}": block for i, block in enumerate(blocks)}
        self.layers = kind(blocks)

    def forward(self, hidden_states):
        layers = self.layers
        for layer in layers.values() if isinstance(layers, nn.ModuleDict) else layers:
            hidden_states = layer(hidden_states)
        return hidden_states


class PlanModel(nn.Module):
    """Two embeddings before its stack, and a norm after it that no plan names."""

    tp_plan = {
        "embedding": "rowwise",
        "decoder.stack.layers.*.query_linear": "colwise",
        "decoder.stack.layers.*.key_linear": "colwise",
        "decoder.stack.layers.*.value_linear": "colwise",
        "decoder.stack.layers.*.output_linear": "rowwise",
        "decoder.stack.layers.*.up": "colwise",
        "decoder.stack.layers.*.down": "rowwise",
        "lm_head": "colwise_rep",
    }
    pp_plan = {
        "embedding": (["input_ids"], ["hidden_states"]),
        "positions": (["positions"], ["hidden_states"]),
        "decoder.stack.layers": (["hidden_states"], ["hidden_states"]),
        "lm_head": (["hidden_states"], ["logits"]),
    }

    def __init__(self, kind=nn.ModuleDict, tied=False, **plans):
        super().__init__()
        self.embedding = nn.Embedding(VOCAB, HIDDEN)
        self.positions = nn.Embedding(128, HIDDEN)
        self.decoder = nn.ModuleDict({"stack": Stack(kind)})
        self.norm = nn.LayerNorm(HIDDEN)
        self.lm_head = nn.Linear(HIDDEN, VOCAB, bias=False)
        if tied:
            self.lm_head.weight = self.embedding.weight
        for name, plan in plans.items():
            setattr(self, name, plan)

    def forward(self, input_ids, positions):
        x = self.embedding(input_ids) + self.positions(positions)
        return self.norm(self.decoder["stack"](x))

    def compute_logits(self, hidden_states):
        return self.lm_head(hidden_states)


def trained(kind=nn.ModuleDict, tied=False) -> PlanModel:
    generator = torch.Generator().manual_seed(0)
    model = PlanModel(kind, tied)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.4, generator=generator)
    return model


def logits_of(model, ids):
    return model.compute_logits(model(ids, torch.arange(len(ids))))


def config(**hf_config):
    """What `apply_plans` asks of an engine's config."""
    return SimpleNamespace(
        model_config=SimpleNamespace(
            hf_config=SimpleNamespace(**hf_config), get_hidden_size=lambda: HIDDEN
        ),
        compilation_config=SimpleNamespace(
            static_forward_context={}, static_all_moe_layers=[]
        ),
    )
